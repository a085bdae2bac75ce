"""Run a command and watch its process tree: seconds, CPU seconds, and memory told apart. The standard library alone.

Resident memory counts mapped files too, which the system takes back when others need the room: what a process must
have is the anonymous part. Pages that two processes share count twice.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from time import monotonic, sleep

STEP_S = 0.02
"""Seconds between two looks at the memory of a tree."""

TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_FIELD = re.compile(r"^(RssAnon|RssFile|RssShmem|VmHWM):\s*(\d+) kB", re.MULTILINE)


@dataclass(frozen=True)
class Sample:
    """The memory of a tree at a time of the monotonic clock, in bytes."""

    at: float
    anonymous: int
    resident: int


@dataclass(frozen=True)
class Watched:
    """A command that has ended; times are of the monotonic clock, which all processes share."""

    code: int
    begin: float
    end: float
    cpu_s: float
    """Of the process and of all that it waited for."""
    output: str
    log: str
    samples: tuple[Sample, ...] = field(repr=False)
    largest_bytes: int = 0
    """Peak resident memory of the process of the tree that had the most (VmHWM)."""

    @property
    def wall_s(self) -> float:
        """Seconds from start to end."""
        return self.end - self.begin

    def peak(self, begin: float = -inf, end: float = inf) -> Sample:
        """Return the peaks of anonymous and resident memory between two times; 0 where nobody looked."""
        seen = [s for s in self.samples if begin <= s.at <= end] or [Sample(begin, 0, 0)]
        return Sample(end, max(s.anonymous for s in seen), max(s.resident for s in seen))

    def last_line(self) -> str:
        """Return the last line of what it told on stderr."""
        return next((line.strip() for line in reversed(self.log.splitlines()) if line.strip()), "")


def tree(root: int) -> Iterator[int]:
    """Yield a process and all its living descendants."""
    yield root
    for file in Path(f"/proc/{root}/task").glob("*/children"):
        try:
            children = file.read_text().split()
        except OSError:
            continue
        for child in children:
            yield from tree(int(child))


def cpu_s(root: int) -> float:
    """Return the CPU seconds that a tree has taken so far, with those of processes that ended in it."""
    ticks = 0
    for number in tree(root):
        try:
            fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:15]))
        except (OSError, ValueError):
            continue
    return ticks * TICK_S


def memory(process: int) -> dict[str, int]:
    """Return the kinds of memory of a process in bytes, by the names of /proc; empty for one that has ended."""
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return {}
    return {name: int(number) * 1024 for name, number in _FIELD.findall(text)}


class _Watch:
    """Looks at a tree until it is told to stop."""

    def __init__(self, root: int, step_s: float) -> None:
        self.samples: list[Sample] = []
        self.largest = 0
        self._root, self._step_s, self._done = root, step_s, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._done.is_set():
            found = [memory(number) for number in tree(self._root)]
            anonymous = sum(each.get("RssAnon", 0) for each in found)
            files = sum(each.get("RssFile", 0) + each.get("RssShmem", 0) for each in found)
            self.samples.append(Sample(monotonic(), anonymous, anonymous + files))
            self.largest = max(self.largest, *(each.get("VmHWM", 0) for each in found), 0)
            self._done.wait(self._step_s)

    def stop(self) -> None:
        self._done.set()
        self._thread.join()


def watch(
    command: Sequence[str],
    more: Mapping[str, str] | None = None,
    stdin: str = "",
    folder: Path | None = None,
    step_s: float = STEP_S,
) -> Watched:
    """Run a command to its end, with `more` in its environment and `stdin` to read."""
    with tempfile.TemporaryFile("w+") as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as log:
        given.write(stdin)
        given.seek(0)
        begin = monotonic()
        process = subprocess.Popen(
            command, stdin=given, stdout=out, stderr=log, env={**os.environ, **(more or {})}, cwd=folder
        )
        looking = _Watch(process.pid, step_s)
        try:
            _, status, used = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
        finally:
            end = monotonic()
            looking.stop()
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        log.seek(0)
        return Watched(
            process.returncode,
            begin,
            end,
            used.ru_utime + used.ru_stime,
            out.read().decode(errors="replace"),
            log.read().decode(errors="replace"),
            tuple(looking.samples),
            looking.largest,
        )


def gone(processes: Sequence[int], seconds: float) -> bool:
    """Return whether these processes end within some time; a zombie has ended."""
    end = monotonic() + seconds
    while any(_alive(number) for number in processes):
        if monotonic() > end:
            return False
        sleep(STEP_S)
    return True


def _alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def needs_linux() -> str:
    """Return why trees cannot be watched here; empty where they can."""
    if sys.platform == "linux" and Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").exists():
        return ""
    return "the memory of a process tree is read from Linux's /proc, which has no list of children here"
