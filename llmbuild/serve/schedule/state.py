"""What a scheduler sees and says: the state of the engine, and the batch of one step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

SEEN = 64
"""Sequences at the front of the queue that a scheduler sees."""


class Entry(NamedTuple):
    """A sequence as a scheduler sees it."""

    number: int
    """Sequences are numbered in the order of their arrival."""
    pending: int
    """Tokens to compute before its next token can be chosen."""
    decoding: bool
    """Whether it has a token, and only its last one is pending: all are, once more, of one that was preempted."""
    arrival_s: float
    computed: int = 0
    """Tokens whose keys and values are there, or would be at once."""
    tokens: int = 0
    """Tokens of its answer so far."""
    prompt: int = 0
    """Tokens of its prompt."""
    tenant: str = ""
    """Of whom it is."""
    priority: int = 0
    """Lower numbers come first."""
    ttft_s: float | None = None
    """Seconds from its arrival within which its first token is asked for."""
    tpot_s: float | None = None
    """Seconds that are asked for between its tokens."""
    predicted: float | None = None
    """How many tokens its answer is expected to have, by what is known of answers before it."""
    takes: int = 1
    """Parts of the memory that are to be free when it is admitted, in the unit of `State.room`."""


@dataclass(frozen=True)
class State:
    """Sequences with a slot in the order of admission, and those that wait by priority, then by arrival.

    The first `free` of those that wait may be admitted together. A scheduler that takes others sees to it that there
    are no more of them than `slots`, and that what they take fits in `room`.
    """

    running: tuple[Entry, ...]
    waiting: tuple[Entry, ...]
    free: int
    slots: int = 0
    """Slots that are free."""
    room: int = 0
    """Parts of the memory that are free for those that wait."""
    service: Mapping[str, float] = field(default_factory=dict)
    """What each tenant was served, in weighted tokens."""


class Share(NamedTuple):
    """How many of its pending tokens a sequence computes in a step."""

    number: int
    tokens: int


@dataclass(frozen=True)
class Batch:
    """The rows of one step. A share of a waiting sequence admits it: it takes a free slot."""

    shares: tuple[Share, ...] = ()


class Scheduler(Protocol):
    """Decides the next batch. Equal states and clocks give equal batches."""

    def __call__(self, state: State, now_s: float) -> Batch:
        """Return the next batch: empty only where no sequence runs or waits."""
