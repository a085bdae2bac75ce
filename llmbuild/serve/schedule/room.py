"""What is left for a batch while a scheduler fills it: slots, memory, and tokens of prompts."""

from __future__ import annotations

from dataclasses import dataclass

from llmbuild.serve.schedule.state import Entry, State

PATIENCE_S = 20.0
"""Seconds after which nobody overtakes the request that has waited longest, where there is no memory for it yet."""


def piece(one: Entry, tokens: int, cut: int) -> int:
    """Return how many tokens of a prompt fit in so many: all of the rest, or a multiple of `cut`; 0: whole or not."""
    if one.pending <= tokens:
        return one.pending
    return max(0, tokens) // cut * cut if cut else 0


def least(one: Entry, cut: int) -> int:
    """Return the fewest tokens of a prompt that may be computed."""
    return min(one.pending, cut) if cut else one.pending


@dataclass
class Room:
    """Slots and memory that are free in a step; each admission takes of them."""

    slots: int
    parts: int
    reserved_for: int | None
    """The number of the request that nobody may overtake."""

    @staticmethod
    def of(state: State, now_s: float) -> Room:
        """Return what is free in a state."""
        oldest = min(state.waiting, key=lambda one: one.arrival_s, default=None)
        late = oldest is not None and now_s - oldest.arrival_s > PATIENCE_S and oldest.takes > state.room
        return Room(state.slots, state.room, oldest.number if oldest is not None and late else None)

    def fits(self, one: Entry) -> bool:
        """Return whether a waiting sequence may be admitted now."""
        if self.reserved_for not in (None, one.number):
            return False
        return self.slots > 0 and one.takes <= self.parts

    def take(self, one: Entry) -> None:
        """Admit a waiting sequence."""
        self.slots, self.parts = self.slots - 1, self.parts - one.takes
        if self.reserved_for == one.number:
            self.reserved_for = None
