"""llmbuild's exceptions; an error of a tool is a `Failure` value instead.

LlmbuildError            reported by a command in one message, without a traceback
├── InputError           an invalid recipe, target, option or model                    exit 2
│   └── ChoiceRefused    choices that conflict with a model or each other: for a search one point's `Failure`
├── CatalogError         a catalog that cannot be read or written as it stands          exit 2
├── LoadRefused          an artifact that must not be opened on this host              exit 2
├── NothingUsable        a build that ended without one usable variant                 exit 1
├── NoVariant            no variant meets the SLO; carries the pick with its reasons    exit 3
│   └── UnknownLoad      no variant has a load curve of this host
└── NoPlan               a fleet cannot take its load within its SLOs                   exit 3
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import Any

_TODO = {
    errno.EACCES: "its owner can give access, or name another place",
    errno.EPERM: "its owner can give access, or name another place",
    errno.EROFS: "name a place that can be written",
    errno.ENOSPC: "free some space and run the same command again",
    errno.EDQUOT: "free some space and run the same command again",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


class LlmbuildError(Exception):
    """What failed, where, and what to do next, in one message."""

    exit_code = 1


class InputError(LlmbuildError):
    """Bad input: the message names the file, the line and the key."""

    exit_code = 2


class ChoiceRefused(InputError):
    """Choices that conflict with a model, a target or each other; another point of the space may be valid."""


class CatalogError(LlmbuildError):
    """The catalog cannot be used as it stands: missing, newer, corrupt, read-only or full."""

    exit_code = 2


class LoadRefused(LlmbuildError):
    """An artifact failed a check that comes before any of its bytes is executed."""

    exit_code = 2


class NothingUsable(LlmbuildError):
    """A build ended without one usable variant."""

    exit_code = 1


class NoVariant(LlmbuildError):
    """No variant meets the SLO on this host; `pick` says why for each one."""

    exit_code = 3

    def __init__(self, message: str, pick: Any = None) -> None:
        super().__init__(message)
        self.pick = pick


class UnknownLoad(NoVariant):
    """No variant has a load curve of this host: nothing is known of what it holds."""


class NoPlan(LlmbuildError):
    """A fleet has no place for part of its load: the message says for what, and what is missing."""

    exit_code = 3


def sentence(error: OSError) -> str:
    """Return an error of the system as one sentence: the path, the cause, and what to do where known."""
    paths = [os.fsdecode(p) for p in (error.filename, error.filename2) if isinstance(p, (str, bytes, os.PathLike))]
    cause = error.strerror or str(error) or type(error).__name__
    todo = _TODO.get(error.errno or 0, "")
    if "temporary directory" in cause:
        todo = "set TMPDIR to a folder that can be written"
    return ": ".join(text for text in (" -> ".join(paths), cause, todo) if text)


@contextlib.contextmanager
def as_our_errors(kind: type[LlmbuildError] = InputError) -> Iterator[None]:
    """Turn errors of the system into llmbuild's, for callers of the library."""
    try:
        yield
    except OSError as error:
        raise kind(sentence(error)) from error
