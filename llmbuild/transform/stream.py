"""An archive in the making: tensors are made and written piece by piece, on all cores, and what is finished is kept.

A journal beside the archive says which units are written and what their bytes are, so that a second run in the same
folder goes on with them, whatever ended the first one.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np

from llmbuild import digest
from llmbuild.transform.archive import Layout
from llmbuild.transform.weights import Array

PIECE = 1 << 22
"""Bytes that are read at once to see whether a journal tells the truth."""


@dataclass(frozen=True)
class Region:
    """Bytes of a tensor."""

    tensor: str
    offset: int
    size: int


@dataclass(frozen=True)
class Piece:
    """Bytes that were made for a tensor, from `offset` on."""

    tensor: str
    offset: int
    data: Array


Task = Callable[[], Iterable[Piece]]


@dataclass(frozen=True)
class Unit:
    """What is finished together: regions, and the tasks that fill them, in any order and in parallel."""

    name: str
    regions: tuple[Region, ...]
    tasks: tuple[Task, ...]


class Draft:
    """The file of an archive that is being written, and its journal.

    Raises:
        OSError: no room on the disk for all of it, which is told before anything is made.
    """

    def __init__(self, path: Path, layout: Layout, key: str = "") -> None:
        """Begin an archive, or go on with the one of the same `key` and layout; without a key begin anew."""
        self.path, self.layout, self._sizes = path, layout, dict(layout.sizes)
        self._journal, self._lock = path.with_suffix(".journal"), Lock()
        self._heading = json.dumps({"key": key, "layout": digest.of(layout.sizes)})
        known = key and path.is_file() and self._journal.is_file()
        lines = self._journal.read_text("ascii", "replace").splitlines() if known else []
        same = bool(lines) and lines[0] == self._heading
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | (0 if same else os.O_TRUNC), 0o644)
        if same:
            os.ftruncate(self._file, layout.file_bytes)
        elif layout.file_bytes and hasattr(os, "posix_fallocate"):
            self._reserve()
        else:
            os.ftruncate(self._file, layout.file_bytes)
        os.pwrite(self._file, layout.head, 0)
        self._log = os.open(self._journal, os.O_RDWR | os.O_CREAT | os.O_APPEND | (0 if same else os.O_TRUNC), 0o644)
        if not same:
            self._say(self._heading)
        self._told = dict(filter(None, map(_entry, lines[1:]))) if same else {}

    def _reserve(self) -> None:
        try:
            os.posix_fallocate(self._file, 0, self.layout.file_bytes)
        except OSError:
            self.path.unlink()  # what there is of it would keep the disk full
            raise

    def has(self, unit: Unit) -> bool:
        """Return whether a unit was finished by an earlier run, and its bytes are what they were."""
        return self._told.get(unit.name) == self._sum(unit) if unit.name in self._told else False

    def write(self, piece: Piece) -> None:
        """Write a piece.

        Raises:
            ValueError: it is larger than its tensor, and would lie on the next one.
        """
        data = memoryview(np.ascontiguousarray(piece.data).reshape(-1).view(np.uint8).data)
        if piece.offset + len(data) > self._sizes[piece.tensor]:
            raise ValueError(f"{piece.tensor}: bytes beyond the {self._sizes[piece.tensor]} that it has")
        at = self.layout.places[piece.tensor] + piece.offset
        while len(data):
            count = os.pwrite(self._file, data, at)
            data, at = data[count:], at + count

    def finish(self, unit: Unit) -> None:
        """Record that a unit is written."""
        self._say(json.dumps({"unit": unit.name, "sum": self._sum(unit)}))

    def close(self) -> None:
        """Close the archive; it stays a draft until it is renamed."""
        os.close(self._file)
        os.close(self._log)

    def forget(self) -> None:
        """Remove the journal of a finished archive."""
        self._journal.unlink(missing_ok=True)

    def _say(self, line: str) -> None:
        with self._lock:
            os.write(self._log, f"{line}\n".encode())

    def _sum(self, unit: Unit) -> int:
        found = 0
        for region in unit.regions:
            at, left = self.layout.places[region.tensor] + region.offset, region.size
            while left:
                part = os.pread(self._file, min(PIECE, left), at)
                if not part:
                    return -1
                found, at, left = zlib.crc32(part, found), at + len(part), left - len(part)
        return found


def _entry(line: str) -> tuple[str, int] | None:
    """Return a line of a journal; the last one may be half a line, and a crash of the machine may spoil any."""
    try:
        body = json.loads(line)
        return str(body["unit"]), int(body["sum"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return None


class _Left:
    """A unit in the making, and how many of its tasks have not ended."""

    def __init__(self, unit: Unit) -> None:
        self.unit, self.tasks = unit, len(unit.tasks)


Begun = Sequence[Future[None]]
"""The tasks of units that were begun."""


class Pipeline:
    """Makes units on all cores: NumPy's loops run in parallel, since they release the interpreter's lock."""

    def __init__(self, draft: Draft, threads: int) -> None:
        self.draft = draft
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="weights")
        self._lock = Lock()

    def begin(self, units: Sequence[Unit]) -> Begun:
        """Begin units; they run in their order, and who finishes the last task of a unit records it."""
        return [self._pool.submit(self._run, task, left) for left in map(_Left, units) for task in left.unit.tasks]

    def finish(self, begun: Begun) -> None:
        """Wait until units are recorded.

        Raises:
            Exception: what a task raised.
        """
        for task in begun:
            task.result()

    def _run(self, task: Task, left: _Left) -> None:
        for piece in task():
            self.draft.write(piece)
        with self._lock:
            left.tasks -= 1
            is_last = not left.tasks
        if is_last:
            self.draft.finish(left.unit)

    def close(self) -> None:
        """End the threads; what has not begun is left out."""
        self._pool.shutdown(cancel_futures=True)


def cores() -> int:
    """Return how many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def whole(name: str, arrays: Mapping[str, Array]) -> Unit:
    """Return the unit of small tensors that are there already."""
    pieces = tuple(Piece(tensor, 0, array) for tensor, array in arrays.items())
    return Unit(name, tuple(Region(p.tensor, 0, p.data.nbytes) for p in pieces), (lambda: pieces,))
