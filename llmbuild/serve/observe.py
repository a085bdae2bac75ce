"""What an engine tells of its work, for metrics; nothing here needs a library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Lived:
    """One sequence that has ended, with its times in seconds of the engine's clock."""

    prompt_tokens: int
    tokens: int
    reason: Literal["stop", "length", "abort"]
    arrival_s: float
    admitted_s: float | None
    first_s: float | None
    """When its first token was chosen."""
    last_s: float | None
    ended_s: float


@dataclass(frozen=True, slots=True)
class Turned:
    """One step: its sequences, all tokens that it computed and those of prompts, the chosen tokens, and its seconds.

    What a preempted sequence computes again counts as its prompt.
    """

    sequences: int
    computed: int
    prompt_tokens: int
    tokens: int
    step_s: float
    """Of the device."""
    turn_s: float
    """Of the whole turn: scheduling, the step, choosing and text, and what a drafter computed."""
    drafts: int = 0
    """Guessed tokens that it computed too."""
    right: int = 0
    """Drafts that were right."""
    draft_s: float = 0.0
    """Of the steps of a drafter."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of an engine at one time."""

    running: int
    waiting: int
    slots: int
    idle_s: float
    """Seconds since the last step ended; 0 where nothing is to be done."""
    fault: str
    """Why the engine has failed; empty while it has not."""
    open: bool
    """Whether it takes requests."""
    used: float = 0.0
    """Part of the memory for keys and values that is reserved or, where admission is by what is expected, taken."""


class Observer:
    """Takes what an engine tells, in the engine's thread; this one keeps nothing."""

    def admitted(self, prompt_tokens: int, cached: int) -> None:
        """Take a sequence that is admitted for the first time, and how many tokens of its prompt were there."""

    def preempted(self) -> None:
        """Take that a sequence has lost its place, and what it had computed."""

    def turned(self, turn: Turned) -> None:
        """Take a step."""

    def gap(self, seconds: float) -> None:
        """Take the time between two tokens of a sequence."""

    def first(self, seconds: float) -> None:
        """Take the time from an arrival to the first token."""

    def lived(self, sequence: Lived) -> None:
        """Take a sequence that has ended."""
