"""Standard streams of the commands: closed, full, pipes or of another encoding, and errors of the system.

The loader's and the commands' own code lets an `OSError` pass; here it becomes one sentence, and an exit code.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Iterator

from llmbuild.errors import InputError, sentence

CLOSED_PIPE = 128 + int(signal.SIGPIPE)
"""The exit status in a shell of a command whose reader is gone, as after `head`."""


_OF_WRITING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF}


class PipeClosed(Exception):
    """The reader of the output is gone; not an `OSError`, which click ends with exit code 1."""


def prepare() -> None:
    """Prepare the streams for output, before any work.

    The descriptor of a closed stream would be reused for the next opened file, and output would go there; so a closed
    stream is redirected to the null device first.

    Raises:
        InputError: standard output is closed, so that all output would be lost.
    """
    lost = sys.stdout is None
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            _to_null(number)
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115 - open until exit
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # an ASCII or Latin-1 terminal gets an escape, not an error
    if lost:
        raise InputError("standard output is closed: redirect it to a file, or to /dev/null")


@contextlib.contextmanager
def piped() -> Iterator[None]:
    """Turn an error of a closed pipe into `PipeClosed`."""
    try:
        yield
    except BrokenPipeError as error:
        raise PipeClosed from error


def refusal(error: OSError) -> str:
    """Return one sentence for an error of the system; a write error without a file name is one of llmbuild's output."""
    if error.filename is None and error.errno in _OF_WRITING:
        quiet("stdout")
        return f"the output cannot be written: {sentence(error)}"
    return sentence(error)


def quiet(*names: str) -> None:
    """Let streams drop their buffers, so that no write fails when the process ends."""
    for name in names or ("stdout", "stderr"):
        with contextlib.suppress(OSError, ValueError):
            _to_null(getattr(sys, name).fileno())


def _to_null(number: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    if null != number:
        os.dup2(null, number)
        os.close(null)
