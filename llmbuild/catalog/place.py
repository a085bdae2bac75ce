"""Names of the files in a catalog's folder."""

from __future__ import annotations

from pathlib import Path

from llmbuild.runtime.reader import FILE, URL_FILE
from llmbuild.runtime.trust import POINTER as PUBLISHED_FILE

__all__ = ["FILE", "PUBLISHED_FILE", "URL_FILE", "exists"]


def exists(folder: Path) -> bool:
    """Return whether `folder` holds a catalog; nothing is created."""
    return any((folder / name).is_file() for name in (FILE, URL_FILE))
