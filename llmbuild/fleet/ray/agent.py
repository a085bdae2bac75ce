"""An agent: an actor of Ray that runs one server, says how it is, and goes when the server was told to end.

It is a plain class, which Ray makes an actor of. Its server dies with it, so a node that is lost leaves nothing behind.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from time import monotonic

import llmbuild
from llmbuild.errors import InputError
from llmbuild.fleet.actuators import pinned
from llmbuild.fleet.actuators.interface import State
from llmbuild.fleet.actuators.served import CHECK_S, KILL_S, SILENT, address, ended, ready
from llmbuild.fleet.ray.cluster import Order, Told
from llmbuild.process import child


def _leave() -> None:
    """End this worker of Ray, and with it the actor."""
    os._exit(0)


class Agent:
    """Runs a server. Ray calls one method at a time."""

    def __init__(self, order: Order, leave: Callable[[], None] = _leave) -> None:
        """Start the server.

        Raises:
            InputError: this node has another version of llmbuild.
        """
        if order.version != llmbuild.__version__:
            told = f"the node has llmbuild {llmbuild.__version__}, and the orchestrator {order.version}"
            raise InputError(f"{told}: install the same on all")
        self._order, self._leave = order, leave
        self._said, self._log = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 - as long as it
        self._begun_s = self._checked_s = monotonic()
        self._silent = 0
        self._state: State = "starting"
        self._url = self._why = ""
        self._server = subprocess.Popen(
            self._words(),
            stdin=subprocess.DEVNULL,
            stdout=self._said,
            stderr=self._log,
            env=child.environment(),
            cwd=child.NEUTRAL,
            start_new_session=True,
            preexec_fn=child.confine(child.Limits(memory_bytes=0)),
        )

    def _words(self) -> list[str]:
        cores = ",".join(map(str, self._order.noted.cores))
        first = [str(Path(pinned.__file__)), cores] if cores else []
        return child.python(*first, "llmbuild", *self._order.words)

    def told(self) -> Told:
        """Return how the server is."""
        code = self._server.poll()
        if code is not None and self._state in ("starting", "ready"):
            self._state, self._url, self._why = "dead", "", ended(code, self._log)
            self._close()
        now = monotonic()
        if self._state == "starting":
            self._starts(now)
        elif self._state == "ready" and now - self._checked_s >= CHECK_S:
            self._checked_s = now
            self._silent = 0 if ready(self._url) else self._silent + 1
            if self._silent >= SILENT:
                self._signal(signal.SIGKILL)
        return Told(self._order.noted, self._state, self._url, self._server.pid, self._why)

    def _starts(self, now: float) -> None:
        url = address(self._said)
        if url and ready(url):
            self._state, self._url, self._checked_s = "ready", url, now
        elif now - self._begun_s > self._order.start_s:
            self._signal(signal.SIGKILL)

    def stop(self) -> None:
        """Send SIGTERM: the server finishes what it has begun, or is killed; then the actor goes."""
        if self._state != "draining":
            self._state, self._url = "draining", ""
            threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        self._signal(signal.SIGTERM)
        try:
            self._server.wait(self._order.drain_s + KILL_S)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._server.wait()
        self._close()
        self._leave()

    def _close(self) -> None:
        self._said.close()
        self._log.close()

    def _signal(self, name: signal.Signals) -> None:
        if self._server.poll() is None:
            self._server.send_signal(name)
