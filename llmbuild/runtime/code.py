"""The code of an artifact, mapped read-only."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import iree.runtime as rt

_PAGES = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)


def mapped(instance: Any, artifact: Path) -> Any:
    """Return an artifact as a module of the runtime; its file is neither copied nor written to.

    IREE's own `VmModule.mmap` opens a file for writing as well, which fails in a read-only catalog.

    Raises:
        OSError, RuntimeError, ValueError: it cannot be read, or is not an artifact.
    """
    with artifact.open("rb") as file:
        pages = mmap.mmap(file.fileno(), 0, flags=_PAGES, prot=mmap.PROT_READ)
    return rt.VmModule.wrap_buffer(instance, pages, close_buffer=True)
