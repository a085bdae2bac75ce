"""Holds a program that lends something, `srun`, and ends it in order when who asked for it is gone, however that ended.

    start.py llmbuild.process.keeper PROGRAM [ARGUMENT]...

A program that is killed with who started it cannot give back what it has. So it runs below a second process, in a
session of its own, which sees the end of its input and of the first process. Imports the standard library alone: it
starts at once, and forks while there is one thread.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading

PIECE = 1 << 16
LOOK_S = 0.2
"""Seconds between two looks at who is still there."""
GRACE_S = 10.0
"""Seconds that the program has to end by itself, and again to give back what it has."""


def main(*command: str) -> None:
    """Run a program until it ends, or until nobody is there who asks."""
    front = os.getpid()
    keeper = os.fork()
    if not keeper:
        os.setsid()
        os._exit(_keep(command, front))
    _, status = os.waitpid(keeper, 0)
    sys.exit(os.waitstatus_to_exitcode(status))


def _keep(command: tuple[str, ...], front: int) -> int:
    """Hold the program; return its exit code."""
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
    with contextlib.suppress(OSError, ValueError):  # it has ended, or its input was closed
        while data := os.read(0, PIECE):
            left = memoryview(data)
            while left:
                left = left[process.stdin.write(left) or 0 :]
    silent.set()


def _ended(process: subprocess.Popen[bytes]) -> int:
    """End the program: by the end of its input, by asking, or at last by force."""
    assert process.stdin is not None
    process.stdin.close()
    for end in (process.terminate, process.kill):
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(GRACE_S)
        end()
    return process.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
