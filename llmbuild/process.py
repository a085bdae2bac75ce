"""Run a tool in a child process with limits; whatever it does, the answer is its output file or a `Failure`.

The floor between `spec` and the stages: compiler, frontend jobs and profiler workers are all started here, so that
none outlives us and none can take us down.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from time import monotonic

from llmbuild.spec.variant import Failure, Stage

LOG_BYTES = 64 << 10
"""How much of a tool's output is kept with a failure: the end of it."""


TIME_UP = "was ended when the time of the whole run was up"


@dataclass(frozen=True)
class Limits:
    """What a child may use: wall seconds, and bytes of address space; 0 does not bound them.

    A GPU's driver reserves more addresses than any machine has memory, so what runs on one is not bounded. `until` is
    the moment of the monotonic clock at which whatever still runs is ended.
    """

    seconds: float = 600.0
    memory_bytes: int = 16 << 30
    until: float = inf

    def left_s(self) -> float:
        """Return how long a step that begins now may take."""
        return min(self.seconds, max(0.0, self.until - monotonic()))

    def told(self) -> str:
        """Return what became of a child that ran out of time."""
        return TIME_UP if monotonic() >= self.until else f"ran past {self.seconds:.0f} s"


_running: set[subprocess.Popen[bytes]] = set()
"""Children under way, so that an interruption in one thread ends those of all."""

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def confine(limits: Limits) -> Callable[[], None]:
    """Return what a child does before it becomes the tool: limits, no core file, and death with its parent.

    The last is Linux only and covers a parent that was killed and could not tidy up.
    """

    def prepare() -> None:
        if limits.memory_bytes:
            resource.setrlimit(resource.RLIMIT_AS, (limits.memory_bytes, limits.memory_bytes))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if _LIBC is not None:
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    return prepare


def run(
    command: Sequence[str], stage: Stage, limits: Limits, output: Path, env: Mapping[str, str] | None = None
) -> Failure | None:
    """Run `command`, which is to write `output`; return None when it did, else why not.

    The child has a process group of its own, which is killed whole on a time-out or an interruption.
    """
    with tempfile.TemporaryFile() as log:
        try:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=None if env is None else {**os.environ, **env},
                preexec_fn=confine(limits),
            )
        except OSError as error:
            return Failure(stage, f"cannot start {command[0]}: {error}", shlex.join(command), "", lasting=False)
        _running.add(child)
        try:
            code: int | None = child.wait(limits.left_s())
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _running.discard(child)
            stop_group(child)
        if code == 0 and output.is_file():
            return None
        return failure_of(command, stage, limits, code, tail(log.fileno()))


def say(text: str) -> None:
    """Write a line to standard output, all of it.

    After a device of IREE was closed, the system ends a blocking write short (what is left of its io_uring interrupts
    it), and an unbuffered Python (PYTHONUNBUFFERED) drops what a pipe did not take at once.
    """
    sys.stdout.flush()
    left = memoryview(f"{text}\n".encode())
    while left:
        left = left[os.write(sys.stdout.fileno(), left) :]


def stop_all() -> None:
    """End every child that `run` waits for in any thread."""
    for child in list(_running):
        stop_group(child)


def stop_group(child: subprocess.Popen[bytes]) -> None:
    """End a child and whatever it started, if it still runs, and reap it."""
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def tail(descriptor: int) -> str:
    """Return the end of an open file as text."""
    size = os.lseek(descriptor, 0, os.SEEK_END)
    os.lseek(descriptor, max(0, size - LOG_BYTES), os.SEEK_SET)
    return os.read(descriptor, LOG_BYTES).decode(errors="replace")


def failure_of(command: Sequence[str], stage: Stage, limits: Limits, code: int | None, log: str) -> Failure:
    """Return the failure of a child that ended with `code` (None: it ran out of time) and printed `log`."""
    name = Path(command[0]).name
    if code is None:
        return Failure(stage, f"{name} {limits.told()}", shlex.join(command), log, lasting=False)
    if code < 0:
        told = signal.Signals(-code).name if -code in signal.valid_signals() else str(-code)
        killed = -code == signal.SIGKILL
        return Failure(stage, f"{name} crashed with {told}", shlex.join(command), log, lasting=not killed)
    if code == 0:
        return Failure(stage, f"{name} ended well but wrote no file", shlex.join(command), log, lasting=False)
    lines = [x.strip() for x in log.splitlines() if x.strip()]
    reason = next(
        (x for x in lines if "error:" in x),
        next((x for x in lines if "error" in x.lower()), f"{name} ended with {code}"),
    )
    passing = "No space left" in log or "bad_alloc" in log or "out of memory" in log.lower()
    return Failure(stage, reason[:500], shlex.join(command), log, lasting=not passing)
