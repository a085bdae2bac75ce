"""The server of `prefork`: a process that imports modules once, and forks itself for every job.

    python -P -E start.py llmbuild.process.preloaded DESCRIPTOR MODULE...

The descriptor is a socket of llmbuild. Each message on it is a job: a module or script with its arguments, the limit
of its addresses, and two more descriptors, of the file that it prints to and of the job's channel. On the channel the
server says `BEGUN`, then the exit code, or else `NOT` and why there is no process; when llmbuild closes its side
first, the job's group is killed. The server ends when llmbuild does, which closes every socket.

A fork copies the thread that calls it and no other, so that the server forks only where it has one, and computes
nothing itself: pools of threads begin in the jobs.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import sys
import threading
from pathlib import Path
from time import monotonic, sleep

from llmbuild.process import start
from llmbuild.process.child import Limits, confine

BEGUN, NOT = b"begun", b"not "
MESSAGE_BYTES = 1 << 17
"""Maximum size of a job's message: Linux takes a single argument of a command up to this size."""

_DRIVERS = ("/dev/nvidia", "/dev/kfd", "/dev/dri/")
"""Devices whose drivers do not survive a fork."""
_ENDING_S = 1.0
"""Seconds until a thread that was joined is gone from /proc."""


def main(arguments: list[str]) -> None:
    """Import the modules, and fork until llmbuild is gone; in the process of a job, run it."""
    control = socket.socket(fileno=int(arguments[0]))
    control.set_inheritable(False)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for name in arguments[1:]:
        if _events(control, 0):
            return
        preload(name)
    settle()
    if why := unfit():
        sys.exit(f"it cannot fork: {why}")
    words = _Server(control).serve()
    if words is None:
        os._exit(0)
    _work(words)


def _work(words: list[str]) -> None:
    """Run a job, and end its process as Python itself would."""
    code = 0
    try:
        start.launch(words)
    except BaseException as error:
        told = error.code or 0 if isinstance(error, SystemExit) else error
        if not isinstance(told, int):
            gc.unfreeze()  # else libraries complain that their types are never freed, in the middle of what is told
            raise
        code = told
    _leave(code)


def _leave(code: int) -> None:
    """End this process as Python does, but for what it imported: to free all that takes longer than a small job.

    A file that an imported module keeps open is not written out; one that the job itself leaves open is.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    gc.collect()
    sys.stdout.flush()
    sys.stderr.flush()
    ctypes.CDLL(None).fflush(None)
    os._exit(code & 0xFF)


def preload(name: str) -> None:
    """Import a module; one that the installed version lacks is left out."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):
            raise


def settle() -> None:
    """Make what was imported cheap to share, and end the threads that an import has started."""
    gc.collect()
    gc.freeze()  # a collection in a job then neither visits these objects nor copies their pages
    child = os.fork()  # OpenBLAS joins its threads when a process forks, and starts them again when it computes
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


def unfit() -> str:
    """Return why this process must not fork; empty where it may."""
    until = monotonic() + _ENDING_S
    while (threads := sum(1 for _ in Path("/proc/self/task").iterdir())) > 1:
        if monotonic() > until:
            return f"{threads} threads run after its imports"
        sleep(0.01)
    opened = [str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return next((f"{name} is open after its imports" for name in opened if name.startswith(_DRIVERS)), "")


def _events(one: socket.socket, asked: int = select.POLLIN) -> int:
    """Return what happened on a socket; a hang-up is told without being asked for."""
    poll = select.poll()
    poll.register(one, asked)
    return next((event for _, event in poll.poll(0)), 0)


class _Server:
    """The jobs that run, each with the socket on which llmbuild waits for it."""

    def __init__(self, control: socket.socket) -> None:
        self._control, self._own = control, os.getpid()
        self._jobs: dict[int, socket.socket] = {}
        self._stopped: set[int] = set()
        self._woken, self._wake = os.pipe()
        os.set_blocking(self._woken, False)
        os.set_blocking(self._wake, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)

    def serve(self) -> list[str] | None:
        """Fork jobs until llmbuild closes its side; return in the process of a job, with its words."""
        while True:
            poll = select.poll()
            poll.register(self._control, select.POLLIN)
            poll.register(self._woken, select.POLLIN)
            waiting = {job.fileno(): pid for pid, job in self._jobs.items() if pid not in self._stopped}
            for descriptor in waiting:
                poll.register(descriptor, select.POLLIN)
            happened = dict(poll.poll())
            if happened.get(self._control.fileno(), 0) & (select.POLLHUP | select.POLLERR):
                self._end_all()
                return None
            if self._woken in happened:
                os.read(self._woken, 1 << 12)
            self._answer()
            for descriptor in waiting.keys() & happened.keys():
                self._stop(waiting[descriptor])
            if self._control.fileno() in happened and (words := self._take()):
                return words

    def _answer(self) -> None:
        """Tell llmbuild of the jobs that ended."""
        for pid, channel in list(self._jobs.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                _say(channel, str(os.waitstatus_to_exitcode(status)).encode())
                channel.close()
                del self._jobs[pid]
                self._stopped.discard(pid)

    def _stop(self, pid: int) -> None:
        """Kill a job and what it started; it is not reaped yet, so that the number is its own."""
        if pid in self._jobs:
            self._stopped.add(pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # it may not have its group yet
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)

    def _end_all(self) -> None:
        for pid in self._jobs:
            self._stop(pid)
        for pid in self._jobs:
            os.waitpid(pid, 0)

    def _take(self) -> list[str] | None:
        """Fork for the next message; return its words in the new process."""
        message, descriptors, _, _ = socket.recv_fds(self._control, MESSAGE_BYTES, 2, socket.MSG_CMSG_CLOEXEC)
        if not message:
            return None
        log, channel = descriptors[0], socket.socket(fileno=descriptors[1])
        request = json.loads(message)
        pid = self._fork(channel)
        if pid == 0:
            self._become(int(request["memory_bytes"]), log, channel)
            return [str(word) for word in request["words"]]
        os.close(log)
        if pid:
            self._jobs[pid] = channel
            _say(channel, BEGUN)
        else:
            channel.close()
        return None

    def _fork(self, channel: socket.socket) -> int | None:
        """Fork; return None where there is no process, which llmbuild is told."""
        if _events(channel):
            return None  # it does not wait any more
        if why := unfit():
            _say(channel, NOT + why.encode())
            return None
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            return os.fork()
        except OSError as error:
            _say(channel, NOT + f"it cannot fork: {error.strerror}".encode())
            return None

    def _become(self, memory_bytes: int, log: int, channel: socket.socket) -> None:
        """Make a job of this new process, as `child.run` would have started it."""
        os.setsid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.dup2(log, 1)
        os.dup2(log, 2)
        for descriptor in (log, self._woken, self._wake):
            os.close(descriptor)
        for one in (self._control, channel, *self._jobs.values()):
            one.close()
        confine(Limits(memory_bytes=memory_bytes))()
        if os.getppid() != self._own:  # the server died before the kernel knew that this process is to die with it
            os.kill(os.getpid(), signal.SIGKILL)


def _say(channel: socket.socket, message: bytes) -> None:
    with contextlib.suppress(OSError):  # llmbuild waits no more
        channel.send(message)


if __name__ == "__main__":
    main(sys.argv[1:])
