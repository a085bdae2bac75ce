"""Measure on a node of Slurm: the server of remote measurements behind `srun`, which has the node for itself.

    start.py llmbuild.profiler.allotted SRUN [OPTION]... PYTHON [ARGUMENT]...

This module as a process stands where `ssh` does for another machine. `srun` passes on what is said in both directions,
and the lease is its job. A second process, in a session of its own, holds `srun`: it ends the job in order when nothing
comes any more or the first one is gone, however that ended, and also a job that still waits for its node.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from dataclasses import dataclass

from llmbuild.process import child
from llmbuild.process.slurm import NAME, NO_OPTIONS, Options
from llmbuild.profiler.remote import Place, alone

PIECE = 1 << 16
LOOK_S = 0.2
"""Seconds between two looks at who is still there."""
GRACE_S = 10.0
"""Seconds that the server has to end by itself, and `srun` to give its job back."""


@dataclass(frozen=True)
class Allotted(Place):
    """A node of Slurm, in place of a machine for ssh."""

    options: Options = NO_OPTIONS

    def command(self, script: str) -> list[str]:
        """Return the command that runs a Python script there while it has the node."""
        return child.python(__name__, *self.words(), sys.executable, *alone(script))

    def words(self) -> list[str]:
        """Return the command that runs something there.

        Not `--unbuffered`: it gives the server a terminal, which changes bytes. One task would be bound to one core.
        """
        fixed = ("--nodes=1", "--ntasks=1", "--cpu-bind=none", "--mpi=none", "--quiet")
        return ["srun", f"--job-name={NAME}", *fixed, *self.options.words()]

    def pasted(self, command: str) -> str:
        """Return a command of that node, to be given here."""
        return f"{' '.join(self.words())} {command}"


def main(*command: str) -> None:
    """Run `srun` until it ends, or until nobody is there who asks."""
    front = os.getpid()
    keeper = os.fork()
    if not keeper:
        os.setsid()
        os._exit(_keep(command, front))
    _, status = os.waitpid(keeper, 0)
    sys.exit(os.waitstatus_to_exitcode(status))


def _keep(command: tuple[str, ...], front: int) -> int:
    """Hold `srun`; return its exit code."""
    try:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, bufsize=0)
    except OSError as error:
        print(f"cannot start {command[0]}: {error.strerror}", file=sys.stderr, flush=True)
        return 1
    silent = threading.Event()
    threading.Thread(target=_passes, args=(process, silent), daemon=True).start()
    while process.poll() is None:
        if silent.wait(LOOK_S) or os.getppid() != front:
            return _ended(process)
    return process.returncode


def _passes(process: subprocess.Popen[bytes], silent: threading.Event) -> None:
    """Pass on standard input to its end."""
    assert process.stdin is not None
    with contextlib.suppress(OSError, ValueError):  # srun has ended, or its input was closed
        while data := os.read(0, PIECE):
            left = memoryview(data)
            while left:
                left = left[process.stdin.write(left) or 0 :]
    silent.set()


def _ended(process: subprocess.Popen[bytes]) -> int:
    """End `srun`: by the end of its input, or as a terminal does, or at last by force."""
    assert process.stdin is not None
    process.stdin.close()
    for end in (process.terminate, process.kill):
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(GRACE_S)
        end()
    return process.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
