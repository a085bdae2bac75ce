"""Paths as given: resolved without a check of existence."""

from __future__ import annotations

import os
from pathlib import Path


def real(path: Path) -> Path:
    """Return a path without links; of a link that points to itself, the link, where `Path.resolve` raises."""
    return Path(os.path.realpath(path))
