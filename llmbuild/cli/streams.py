"""Where the commands meet the system: streams that are closed, full, pipes or of another encoding, and its refusals.

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
"""What a shell shows of a command whose reader went away, as `head` does."""


_OF_WRITING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF}


class PipeClosed(Exception):
    """Nobody reads our output any more; click must not see this as an `OSError`, which it ends with exit code 1."""


def prepare() -> None:
    """Make the streams fit for what is printed, before anything is done.

    A descriptor of a closed stream would be given to the next file that is opened, and then be written to by whatever
    prints; so what is closed is put to the null device first.

    Raises:
        InputError: standard output is closed, so that all would be lost.
    """
    lost = sys.stdout is None
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            _to_null(number)
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115 - a stream for good
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # an ASCII or Latin-1 terminal gets an escape, not an error
    if lost:
        raise InputError("standard output is closed: redirect it to a file, or to /dev/null")


@contextlib.contextmanager
def piped() -> Iterator[None]:
    """Turn a reader that went away into `PipeClosed`."""
    try:
        yield
    except BrokenPipeError as error:
        raise PipeClosed from error


def refusal(error: OSError) -> str:
    """Return one sentence for what the system refused; an error of writing that names no file is one of our output."""
    if error.filename is None and error.errno in _OF_WRITING:
        quiet("stdout")
        return f"the output cannot be written: {sentence(error)}"
    return sentence(error)


def quiet(*names: str) -> None:
    """Let streams drop what they still hold, so that nothing fails when the process ends."""
    for name in names or ("stdout", "stderr"):
        with contextlib.suppress(OSError, ValueError):
            _to_null(getattr(sys, name).fileno())


def _to_null(number: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    if null != number:
        os.dup2(null, number)
        os.close(null)
