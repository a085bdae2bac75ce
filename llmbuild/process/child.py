"""Run a tool in a child process with limits; the result is always its output file or a `Failure`.

The layer between `spec` and the stages: compiler, frontend jobs and profiler workers all start here, so that none
outlives llmbuild and none can crash it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from math import inf
from pathlib import Path
from time import monotonic

from llmbuild.process.diagnosis import AGAIN, diagnose
from llmbuild.spec.variant import Failure, Stage
from llmbuild.system.resources import group_memory_limit, memory_limit

LOG_BYTES = 64 << 10
"""Bytes of a tool's output kept with a failure: the beginning, where a compiler prints the cause, and the end."""

ADDRESSES = 4 << 30
"""Bytes of address space that a child may reserve beyond all memory: libraries map more than they use."""


NEUTRAL = "/"
"""Working directory of children: only the system writes there, so that no module is imported from it by accident."""
START = Path(__file__).with_name("start.py")
_folders: tuple[str, ...] = ()

TIME_UP = "was ended when the time of the whole run was up"


@cache
def address_limit() -> int:
    """Return the bytes of address space that bound a child: what this host or container has; 0 where unknown."""
    bound = memory_limit()
    return bound.bytes + ADDRESSES if bound else 0


def memory_told() -> str:
    """Return how much memory there is for a child, and whose limit it is; empty where unknown."""
    bound = memory_limit()
    if bound is None:
        return ""
    group = group_memory_limit()
    where = f"this container may use {gib(bound.bytes)}, says {group.file}" if group else None
    return where or f"this host has {gib(bound.bytes)}"


def gib(count: float) -> str:
    """Return bytes in a readable form."""
    return f"{count / (1 << 30):.3g} GiB"


@dataclass(frozen=True)
class Limits:
    """Limits of a child: wall seconds, and bytes of address space; 0 means no limit.

    By default, a child may use the memory of the host or the container. A GPU's driver reserves more addresses than
    any machine has memory, so a child that runs on one is not bounded. `until` is the time of the monotonic clock at
    which a running child is ended.
    """

    seconds: float = 600.0
    memory_bytes: int = field(default_factory=address_limit)
    until: float = inf

    def left_s(self) -> float:
        """Return the time limit of a step that begins now."""
        return min(self.seconds, max(0.0, self.until - monotonic()))

    def memory(self) -> str:
        """Return the name of the memory limit, for the message of a child that reached it; empty without one."""
        if not self.memory_bytes:
            return ""
        there = memory_told()
        return f"the limit of {gib(self.memory_bytes)} that llmbuild set" + (f" ({there})" if there else "")

    def exceeded(self) -> str:
        """Return the failure of a child that ran out of time."""
        return TIME_UP if monotonic() >= self.until else f"ran past {self.seconds:.0f} s"


_running: set[Callable[[], None]] = set()
"""What ends each running child, so that an interruption in one thread ends all of them."""

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def confine(limits: Limits) -> Callable[[], None]:
    """Return the function that a child runs before exec: limits, no core file, and death with its parent.

    The last is Linux only and covers a parent that was killed before it could clean up.
    """

    def prepare() -> None:
        if limits.memory_bytes:
            resource.setrlimit(resource.RLIMIT_AS, (limits.memory_bytes, limits.memory_bytes))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if _LIBC is not None:
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    return prepare


def look_in(folders: Sequence[str]) -> None:
    """Let children import from these folders too: a packed folder contains its libraries."""
    global _folders
    _folders = tuple(str(Path(name).absolute()) for name in folders)


def python(what: str, *arguments: str) -> list[str]:
    """Return the command that runs an llmbuild module, or a script, with this interpreter.

    The current directory and Python's environment variables do not affect its imports; the command can be pasted into
    any shell.
    """
    kept = [flag for flag, on in (("-s", sys.flags.no_user_site), ("-B", sys.dont_write_bytecode)) if on]
    more = [word for name in _folders for word in ("--path", name)]
    return [sys.executable, "-P", "-E", *kept, str(START), *more, what, *arguments]


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a child: without Python's own variables, and with `more`."""
    return {name: text for name, text in os.environ.items() if not name.startswith("PYTHON")} | dict(more or {})


def program(name: str) -> str:
    """Return the path of a system program; relative parts of `$PATH` are skipped."""
    folders = [part for part in os.environ.get("PATH", os.defpath).split(os.pathsep) if Path(part).is_absolute()]
    return shutil.which(name, path=os.pathsep.join(folders)) or name


def run(
    command: Sequence[str], stage: Stage, limits: Limits, output: Path, env: Mapping[str, str] | None = None
) -> Failure | None:
    """Run `command`, which writes `output`; return None on success, else the failure.

    The child has its own process group, which is killed on a time-out or an interruption. It works in `NEUTRAL`:
    every path in `command` is absolute.
    """
    with tempfile.TemporaryFile() as log:
        try:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment(env),
                cwd=NEUTRAL,
                preexec_fn=confine(limits),
            )
        except OSError as error:
            return Failure(
                stage,
                f"cannot start {command[0]}: {error.strerror or error}; mend that; {AGAIN}",
                shlex.join(command),
                "",
                lasting=False,
            )
        with stopped_with_all(partial(stop_group, child)):
            try:
                code: int | None = child.wait(limits.left_s())
            except subprocess.TimeoutExpired:
                code = None
            finally:
                stop_group(child)
        return outcome(command, stage, limits, code, output, log.fileno())


def say(text: str) -> None:
    """Write a complete line to standard output.

    After an IREE device is closed, a blocking write may be short (the rest of its io_uring interrupts it), and an
    unbuffered Python (PYTHONUNBUFFERED) drops the bytes that a pipe did not accept at once.
    """
    sys.stdout.flush()
    left = memoryview(f"{text}\n".encode())
    while left:
        left = left[os.write(sys.stdout.fileno(), left) :]


@contextlib.contextmanager
def stopped_with_all(stop: Callable[[], None]) -> Iterator[None]:
    """Let `stop_all` end, by `stop`, the child that this thread waits for."""
    _running.add(stop)
    try:
        yield
    finally:
        _running.discard(stop)


def stop_all() -> None:
    """End every child that a `run` waits for in any thread."""
    for stop in list(_running):
        stop()


def stop_group(child: subprocess.Popen[bytes]) -> None:
    """End a child and its descendants, if it still runs, and reap it."""
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def tail(descriptor: int) -> str:
    """Return the beginning and the end of an open file as text."""
    size = os.lseek(descriptor, 0, os.SEEK_END)
    if size <= LOG_BYTES:
        return os.pread(descriptor, LOG_BYTES, 0).decode(errors="replace")
    half = LOG_BYTES // 2
    parts = (os.pread(descriptor, half, 0), os.pread(descriptor, half, size - half))
    head, end = (part.decode(errors="replace") for part in parts)
    return f"{head}\n[{size - 2 * half} bytes left out]\n{end}"


def outcome(
    command: Sequence[str], stage: Stage, limits: Limits, code: int | None, output: Path, log: int
) -> Failure | None:
    """Return None for a child that ended well and wrote `output`, else its failure; `log`: what it printed."""
    if code == 0 and output.is_file():
        return None
    return failure_of(command, stage, limits, code, tail(log))


def failure_of(command: Sequence[str], stage: Stage, limits: Limits, code: int | None, log: str) -> Failure:
    """Return the failure of a child that exited with `code` (None: it ran out of time) and printed `log`."""
    name, again = Path(command[0]).name, shlex.join(command)
    if code is None:
        return Failure(stage, f"{name} {limits.exceeded()}", again, log, lasting=False)
    if code == 0:
        return Failure(stage, f"{name} ended well but wrote no file; {AGAIN}", again, log, lasting=False)
    found = diagnose(name, code, log, limits.memory(), memory_told())
    # A compiler's diagnostic of its input is permanent; a worker or an importer reports refusals in its answer.
    return Failure(stage, found.reason, again, log, found.lasting and stage == "compile")
