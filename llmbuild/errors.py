"""The tree of our own faults; what a tool does wrong is a `Failure` value instead.

LlmbuildError            anything a command reports in one message, without a traceback
├── InputError           a recipe, target, option or model that cannot be taken        exit 2
├── CatalogError         a catalog that cannot be read or written as it stands          exit 2
├── LoadRefused          an artifact that must not be opened on this host              exit 2
├── NothingUsable        a build that ended without one usable variant                 exit 1
└── NoVariant            no variant meets the SLO; carries the pick with its reasons    exit 3
"""

from __future__ import annotations

from typing import Any


class LlmbuildError(Exception):
    """What failed, where, and what to do next, in one message."""

    exit_code = 1


class InputError(LlmbuildError):
    """Bad input: the message names the file, the line and the key."""

    exit_code = 2


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
