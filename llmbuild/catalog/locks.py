"""File locks of a catalog: the kernel releases them when their holder ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic, sleep

from llmbuild.errors import CatalogError

FOLDER = "locks"
PUBLISHING = ".publishing"
"""The lock for changes of a published folder."""
POLL_S = 0.05


@contextlib.contextmanager
def held(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold an exclusive lock; `waiting` is called once when another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _opened(path)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is not None:
                waiting()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def take(path: Path, alone: bool, seconds: float) -> int:
    """Take a shared or exclusive lock, and return its descriptor, which holds it until closed.

    Raises:
        CatalogError: others held it for longer than `seconds`.
    """
    descriptor = _opened(path)
    kind = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
    deadline = monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if monotonic() > deadline:
                os.close(descriptor)
                told = "other commands are using it" if alone else "it is being cleaned up"
                raise CatalogError(f"{path.parent}: {told}: try again when they have ended") from None
            sleep(POLL_S)


def _opened(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
