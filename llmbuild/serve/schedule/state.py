"""What a scheduler sees and says: the state of the engine, and the batch of one step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol


class Entry(NamedTuple):
    """A sequence as a scheduler sees it."""

    number: int
    """Sequences are numbered in the order of their arrival."""
    pending: int
    """Tokens to compute before its next token can be chosen."""
    decoding: bool
    """Whether it has its first token: `pending` is then 1."""
    arrival_s: float


@dataclass(frozen=True)
class State:
    """Sequences with a slot in the order of admission, those that wait in the order of arrival, and how many of these
    may be admitted, from the first on.
    """

    running: tuple[Entry, ...]
    waiting: tuple[Entry, ...]
    free: int


class Share(NamedTuple):
    """How many of its pending tokens a sequence computes in a step."""

    number: int
    tokens: int


@dataclass(frozen=True)
class Batch:
    """The rows of one step. A share of a waiting sequence admits it: it takes a free slot and keeps it to its end."""

    shares: tuple[Share, ...] = ()


class Scheduler(Protocol):
    """Decides the next batch. Equal states and clocks give equal batches."""

    def __call__(self, state: State, now_s: float) -> Batch:
        """Return the next batch: empty only where no sequence runs or waits."""
