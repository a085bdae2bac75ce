"""What the engine tells of a request: pieces of its answers, and how each of them ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Reason = Literal["stop", "length"]
Fault = Literal["cancelled", "deadline", "engine", "closed"]
"""Why an answer was given up: by its client, its deadline, a fault, or because the engine was closed."""


@dataclass(frozen=True, slots=True)
class Logprob:
    """The log-probability of a token that was taken, and of the most likely ones, the best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Finish:
    """How an answer ended: at an end token or a stop string (`stop_reason`), or where no more may or can follow."""

    reason: Reason
    stop_reason: str | int | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """One more token of an answer, and the text that is now final; the last one has `finish`."""

    request: str
    index: int
    token: int
    text: str
    logprob: Logprob | None = None
    finish: Finish | None = None
    cached: int = 0
    """With the first token: how many tokens of the prompt another sequence had computed before."""


@dataclass(frozen=True, slots=True)
class Ended:
    """An answer that was given up; nothing follows."""

    request: str
    index: int
    fault: Fault
    why: str


Event = Delta | Ended
Outlet = Callable[[Sequence[Event]], None]
"""Takes the events of one turn, in the engine's thread."""
