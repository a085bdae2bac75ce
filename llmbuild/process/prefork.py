"""Jobs that begin with their modules already imported: each is forked from a process that has imported them once.

`Prefork.run` means what `child.run` means of the same module: a group of its own that ends with llmbuild, on a
time-out and by `stop_all`; the same limits, environment and folder; the same failure. It saves what the imports
cost, seconds of a CPU for each job where they are PyTorch's. The other side is `preloaded.py`.

Only Linux: frameworks of macOS do not survive a fork. Where there is no server, jobs run by `child.run`; `told` says
why there is none.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Event, Lock
from time import monotonic

from llmbuild.process import child
from llmbuild.process.child import NEUTRAL, Limits, environment, outcome, python, stop_group, stopped_with_all, tail
from llmbuild.process.diagnosis import uncaught
from llmbuild.process.preloaded import BEGUN, MESSAGE_BYTES, NOT
from llmbuild.spec.variant import Failure, Stage

GRACE_S = 10.0
"""Seconds until a server that was told to end a job has done so; it is ended itself then, and its jobs with it."""


class Prefork:
    """Runs modules in processes that are forked from one which has imported `preload`.

    This server is started by the first job, or by `start`, and takes jobs of several threads. It has the environment
    that a job is to have: for another one it is started again, or, where other jobs run, the job runs by `child.run`.
    `env` is what all jobs have beside their own.
    """

    def __init__(self, preload: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        self.preload, self.env = tuple(preload), dict(env or {})
        self._lock = Lock()
        self._server: _Server | None = None
        self._jobs: set[_Job] = set()
        self._trouble = "" if sys.platform == "linux" else "no server on this system"
        self._told: list[str] = []

    def start(self, env: Mapping[str, str] | None = None) -> None:
        """Start the server, unless it runs; it imports in the background."""
        with self._lock:
            self._serving(env)

    def run(
        self,
        module: str,
        arguments: Sequence[str],
        stage: Stage,
        limits: Limits,
        output: Path,
        env: Mapping[str, str] | None = None,
    ) -> Failure | None:
        """Run a module, or a script, which writes `output`; return None on success, else the failure.

        Its command is the one that runs it without a server. Every path in `arguments` is absolute.
        """
        command = python(module, *arguments)
        with tempfile.TemporaryFile() as log:
            job = self._begin([module, *arguments], limits, env, log.fileno())
            if job is not None:
                try:
                    with job, stopped_with_all(job.stop):
                        code = job.wait(limits.left_s())
                finally:
                    self._ended(job)
                if not job.unserved:
                    return outcome(command, stage, limits, code, output, log.fileno())
                output.unlink(missing_ok=True)
        return child.run(command, stage, limits, output, {**self.env, **(env or {})})

    def told(self) -> list[str]:
        """Return, once, why jobs ran without the server."""
        with self._lock:
            told, self._told = self._told, []
        return told

    @property
    def running(self) -> bool:
        """Whether there is a server."""
        with self._lock:
            return self._server is not None

    def rest(self) -> None:
        """End the server, unless a job runs; the next job starts another."""
        with self._lock:
            server = None if self._jobs else self._leave()
        if server:
            server.close()

    def close(self) -> None:
        """End the server and the jobs."""
        with self._lock:
            server, jobs = self._leave(), list(self._jobs)
        for job in jobs:
            job.stop()
        if server:
            server.close()

    # --- the server --------------------------------------------------------------------------------------------------

    def _serving(self, env: Mapping[str, str] | None) -> _Server | None:
        """Return the server for a job in an environment, started if need be; None where it must run by itself."""
        if self._trouble:
            return None
        command, settled = python("llmbuild.process.preloaded"), environment({**self.env, **(env or {})})
        server = self._server
        if server is not None and (server.killed or not (self._jobs or server.fits(command, settled))):
            self._leave()
            server.close()
        if self._server is None:
            try:
                self._server = _Server(command, settled, self.preload)
            except OSError as error:
                self._give_up(f"it cannot be started: {error.strerror or error}")
                return None
            atexit.register(self.close)
        return self._server if self._server.fits(command, settled) else None

    def _begin(self, words: list[str], limits: Limits, env: Mapping[str, str] | None, log: int) -> _Job | None:
        """Send a job; return None where it must run by itself."""
        request = json.dumps({"words": words, "memory_bytes": limits.memory_bytes}).encode()
        if len(request) > MESSAGE_BYTES:
            return None
        with self._lock:
            server = self._serving(env)
            if server is None:
                return None
            channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                try:
                    socket.send_fds(server.control, [request], [log, theirs.fileno()])
                except OSError:
                    channel.close()
                else:
                    job = _Job(server, channel)
                    self._jobs.add(job)
                    return job
        self._lost(server)
        return None

    def _ended(self, job: _Job) -> None:
        with self._lock:
            self._jobs.discard(job)
            if job.refused:
                self._tell(job.refused)
        if job.lost:
            self._lost(job.server)

    def _lost(self, server: _Server) -> None:
        """See the end of a server that is gone, and so of its jobs.

        There is no other after it, for what ended one may end the next, unless it was killed with a job of ours.
        """
        with self._lock:
            if self._server is server:
                why = "" if server.killed else server.end()
                self._leave()
                server.close()
                if why:
                    self._give_up(why)

    def _leave(self) -> _Server | None:
        server, self._server = self._server, None
        atexit.unregister(self.close)
        return server

    def _give_up(self, why: str) -> None:
        self._trouble = why
        self._tell(why)

    def _tell(self, why: str) -> None:
        self._told.append(f"each job imports its libraries itself, there is no process that has imported them: {why}")


class _Server:
    """The process that imports and forks, and our side of its socket."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], preload: Sequence[str]) -> None:
        self._settings = (list(command), dict(env))
        self.ready = False
        """Whether it has begun a job: it answers then, and imports no more."""
        self.killed = False
        """Whether we ended it, and it did not die."""
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        try:
            with theirs:
                # The kernel would end it with the thread that starts it, not with llmbuild: the socket tells it.
                self._process = subprocess.Popen(
                    [*command, str(theirs.fileno()), *preload],
                    stdin=subprocess.DEVNULL,
                    stdout=self._log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env=env,
                    cwd=NEUTRAL,
                    pass_fds=[theirs.fileno()],
                )
        except OSError:
            self.control.close()
            self._log.close()
            raise

    def fits(self, command: Sequence[str], env: Mapping[str, str]) -> bool:
        """Return whether a server with this command and environment would be the same."""
        return self._settings == (list(command), dict(env))

    def end(self) -> str:
        """See the process end, and its jobs with it; return why it did."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE_S / 10)  # it has closed a socket, and is about to end
        code = self._process.poll()
        self.kill()
        if code is None:
            return "it did not answer"
        lines = [line.strip() for line in tail(self._log.fileno()).splitlines() if line.strip()]
        raised = uncaught(lines)
        said = raised.text() if raised else lines[-1] if lines else ""
        how = signal.Signals(-code).name if -code in signal.valid_signals() else str(code)
        return said if said and code >= 0 else f"it ended with {how}"

    def kill(self) -> None:
        """End the process; its jobs end with it."""
        self.killed = True
        stop_group(self._process)

    def close(self) -> None:
        """End the process, and close our side."""
        self.kill()
        self.control.close()
        self._log.close()


class _Job:
    """A job that was sent to a server, and the socket that its end is told on; a context that ends it."""

    def __init__(self, server: _Server, channel: socket.socket) -> None:
        self.server, self._channel = server, channel
        self.refused = ""
        """Why the server did not begin it."""
        self.lost = False
        """Whether the server was gone before it told of an end."""
        self._stopped = False
        self._code: int | None = None
        self._over = Event()

    @property
    def unserved(self) -> bool:
        """Whether it is to be run again, without a server."""
        return bool(self.refused) or self.lost

    def __enter__(self) -> _Job:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._end()
        finally:
            self._over.set()
            self._channel.close()

    def wait(self, seconds: float) -> int | None:
        """Return its exit code, or minus the signal that ended it; None where the time is up, and it was ended."""
        if not self._listen(seconds):
            self._end()
            return None
        return self._code

    def stop(self) -> None:
        """End the job from another thread than the one that waits for it, and see it ended."""
        if self._over.is_set():
            return
        self._stopped = True
        self._ask_end()
        if not self._over.wait(GRACE_S):
            self.server.kill()
            self._over.wait(GRACE_S)

    def _end(self) -> None:
        """End the job in the thread that waits for it."""
        if self._code is None and not self.unserved:
            self._stopped = True
            self._ask_end()
            if not self._listen(GRACE_S):
                self.server.kill()
                self._listen(GRACE_S)

    def _ask_end(self) -> None:
        with contextlib.suppress(OSError):
            self._channel.shutdown(socket.SHUT_WR)
        if not self.server.ready:
            self.server.kill()  # it imports, and would not listen for seconds

    def _listen(self, seconds: float) -> bool:
        """Wait for the end; return whether it came."""
        poll, until = select.poll(), monotonic() + seconds
        poll.register(self._channel, select.POLLIN)
        while True:
            left = max(0.0, until - monotonic())
            if not poll.poll(1000 * min(left, 3600.0)):
                if left > 3600.0:
                    continue
                return False
            try:
                message = self._channel.recv(1 << 12)
            except ConnectionResetError:
                message = b""
            if message == BEGUN:
                self.server.ready = True
                continue
            if message.startswith(NOT):
                self.refused = message.removeprefix(NOT).decode()
            elif message:
                self._code = int(message)
            elif self._stopped:
                self._code = -signal.SIGKILL  # with the server, or before it began
            else:
                self.lost = True
            return True
