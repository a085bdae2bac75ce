"""Measure on a device of a cluster of Ray: the server of remote measurements behind an actor that holds the device.

    start.py llmbuild.profiler.leased ADDRESS NODE TARGET SCRIPT

This module as a process stands where `ssh` does for another machine: what comes on stdin goes to the server there, what
that says goes to stdout. The actor takes the device's resource, one in all, so nobody else measures there meanwhile;
it is not detached, so the lease ends with this process, however that ends.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from typing import Any

from llmbuild.process import child
from llmbuild.process.rays import at_node, connected, told_of
from llmbuild.profiler.remote import Place, alone
from llmbuild.spec.target import HOST

DEVICE = "llmbuild_device"
"""A node whose device may be measured has one of this resource, and no more: it is the lease."""
SHARE = 0.001
"""What a lease takes of the resource of its target, which only says which device is right."""
PIECE = 1 << 20


def needs_of(target: str) -> dict[str, float]:
    """Return the resources of a lease on a device for a target: `host` is any device, others name theirs."""
    return {DEVICE: 1.0, **({} if target == HOST else {f"llmbuild_target_{target}": SHARE})}


@dataclass(frozen=True)
class Leased(Place):
    """A device of a cluster, in place of a machine for ssh."""

    node: str = ""
    target: str = HOST

    def command(self, script: str) -> list[str]:
        """Return the command that runs a Python script there while it holds the device."""
        return child.python(__name__, self.destination, self.node, self.target, script)


class Server:
    """A process on the device's node, and its pipes. Ray makes an actor of it."""

    def __init__(self, script: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, *alone(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=child.environment(),
            cwd=child.NEUTRAL,
            start_new_session=True,
        )

    def write(self, data: bytes) -> None:
        """Give it what it reads; nothing: it has ended, and with it everything that it began."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            if data:
                self._process.stdin.write(data)
                self._process.stdin.flush()
            else:
                self._process.stdin.close()

    def read(self) -> bytes:
        """Return what it says next; nothing at its end."""
        assert self._process.stdout is not None
        return os.read(self._process.stdout.fileno(), PIECE)


def main(address: str, node: str, target: str, script: str) -> None:
    """Hold the device and pass on what is said, until one side ends."""
    said = os.dup(1)
    os.dup2(2, 1)  # what Ray itself has to tell is no answer
    ray = connected(address, "llmbuild-build")
    made = ray.remote(Server).options(
        num_cpus=0, resources=needs_of(target), max_concurrency=2, scheduling_strategy=at_node(node)
    )
    server = made.remote(script)
    threading.Thread(target=_sends, args=(ray, server), daemon=True).start()
    try:
        while data := ray.get(server.read.remote()):
            _say(said, data)
    except ray.exceptions.RayError as error:
        sys.exit(f"the device's node {node[:8]} was lost: {told_of(error)}")


def _sends(ray: Any, server: Any) -> None:
    """Pass on standard input; its end ends the server."""
    with contextlib.suppress(ray.exceptions.RayError):
        while data := os.read(sys.stdin.fileno(), PIECE):
            ray.get(server.write.remote(data))
        ray.get(server.write.remote(b""))


def _say(descriptor: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]


if __name__ == "__main__":
    main(*sys.argv[1:])
