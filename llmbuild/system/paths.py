"""Paths as they are given: what a path leads to, without asking whether it is there."""

from __future__ import annotations

import os
from pathlib import Path


def real(path: Path) -> Path:
    """Return a path without links; of a link that leads to itself, the link. `Path.resolve` raises there."""
    return Path(os.path.realpath(path))
