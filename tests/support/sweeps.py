"""Sweeps of which a run by default has a part, and an exhaustive one all."""

from __future__ import annotations

from collections.abc import Container, Iterable

import pytest


def sweep(names: Iterable[str], usual: Container[str]) -> list[object]:
    """Return a parameter for each name; those that are not usual are marked exhaustive."""
    return [pytest.param(name, id=name, marks=[] if name in usual else [pytest.mark.exhaustive]) for name in names]
