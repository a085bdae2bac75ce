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
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import inf
from pathlib import Path
from time import monotonic

from llmbuild.process.diagnosis import AGAIN, diagnose
from llmbuild.spec.variant import Failure, Stage
from llmbuild.system.resources import group_memory_limit, memory_limit

LOG_BYTES = 64 << 10
"""How much of a tool's output is kept with a failure: its beginning, where a compiler says why, and its end."""

ADDRESSES = 4 << 30
"""Bytes of address space that a child may reserve beyond all memory: libraries map more than they ever fill."""


NEUTRAL = "/"
"""Where children work: a folder that nobody but the system writes to, so that nothing is found in it by accident."""
START = Path(__file__).with_name("start.py")
_folders: tuple[str, ...] = ()

TIME_UP = "was ended when the time of the whole run was up"


@cache
def address_limit() -> int:
    """Return the bytes of address space that bound a child: what this host or container has; 0 where nothing tells."""
    bound = memory_limit()
    return bound.bytes + ADDRESSES if bound else 0


def memory_told() -> str:
    """Return how much memory there is for a child, and of what; empty where nothing tells."""
    bound = memory_limit()
    if bound is None:
        return ""
    group = group_memory_limit()
    where = f"this container may use {gib(bound.bytes)}, says {group.file}" if group else None
    return where or f"this host has {gib(bound.bytes)}"


def gib(count: float) -> str:
    """Return bytes as a person reads them."""
    return f"{count / (1 << 30):.3g} GiB"


@dataclass(frozen=True)
class Limits:
    """What a child may use: wall seconds, and bytes of address space; 0 does not bound them.

    Without a word on memory, a child may use what the host or the container has.
    A GPU's driver reserves more addresses than any machine has memory, so what runs on one is not bounded. `until` is
    the moment of the monotonic clock at which whatever still runs is ended.
    """

    seconds: float = 600.0
    memory_bytes: int = field(default_factory=address_limit)
    until: float = inf

    def left_s(self) -> float:
        """Return how long a step that begins now may take."""
        return min(self.seconds, max(0.0, self.until - monotonic()))

    def memory(self) -> str:
        """Return the limit of memory by name, for the message of a child that met it; empty without one."""
        if not self.memory_bytes:
            return ""
        there = memory_told()
        return f"the limit of {gib(self.memory_bytes)} that llmbuild set" + (f" ({there})" if there else "")

    def exceeded(self) -> str:
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


def look_in(folders: Sequence[str]) -> None:
    """Let children import from these folders too: a packed folder brings its libraries along."""
    global _folders
    _folders = tuple(str(Path(name).absolute()) for name in folders)


def python(what: str, *arguments: str) -> list[str]:
    """Return the command that runs a module of ours, or a script, by this interpreter.

    The folder it is called from, and the environment's Python variables, have no say in what it imports; it can be
    pasted into a shell anywhere.
    """
    kept = [flag for flag, on in (("-s", sys.flags.no_user_site), ("-B", sys.dont_write_bytecode)) if on]
    more = [word for name in _folders for word in ("--path", name)]
    return [sys.executable, "-P", "-E", *kept, str(START), *more, what, *arguments]


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a child: without the variables that steer Python, and with `more`."""
    return {name: text for name, text in os.environ.items() if not name.startswith("PYTHON")} | dict(more or {})


def program(name: str) -> str:
    """Return the path of a program of the system; a part of `$PATH` that depends on the folder we are in is skipped."""
    folders = [part for part in os.environ.get("PATH", os.defpath).split(os.pathsep) if Path(part).is_absolute()]
    return shutil.which(name, path=os.pathsep.join(folders)) or name


def run(
    command: Sequence[str], stage: Stage, limits: Limits, output: Path, env: Mapping[str, str] | None = None
) -> Failure | None:
    """Run `command`, which is to write `output`; return None when it did, else why not.

    The child has a process group of its own, which is killed whole on a time-out or an interruption. It works in
    `NEUTRAL`: every path in `command` is absolute.
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
    """Return the beginning and the end of an open file as text."""
    size = os.lseek(descriptor, 0, os.SEEK_END)
    if size <= LOG_BYTES:
        return os.pread(descriptor, LOG_BYTES, 0).decode(errors="replace")
    half = LOG_BYTES // 2
    parts = (os.pread(descriptor, half, 0), os.pread(descriptor, half, size - half))
    head, end = (part.decode(errors="replace") for part in parts)
    return f"{head}\n[{size - 2 * half} bytes left out]\n{end}"


def failure_of(command: Sequence[str], stage: Stage, limits: Limits, code: int | None, log: str) -> Failure:
    """Return the failure of a child that ended with `code` (None: it ran out of time) and printed `log`."""
    name, again = Path(command[0]).name, shlex.join(command)
    if code is None:
        return Failure(stage, f"{name} {limits.exceeded()}", again, log, lasting=False)
    if code == 0:
        return Failure(stage, f"{name} ended well but wrote no file; {AGAIN}", again, log, lasting=False)
    found = diagnose(name, code, log, limits.memory(), memory_told())
    # what a compiler says of its input lasts; a worker or an importer that means to refuse does so in its answer
    return Failure(stage, found.reason, again, log, found.lasting and stage == "compile")
