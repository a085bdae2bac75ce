"""The answer with the fewest tokens left first, by a prediction that is made again while it grows.

After Choi et al., "ELIS: Efficient LLM Iterative Scheduling System with Response Length Predictor", 2025.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmbuild.serve.schedule.room import Room, least, piece
from llmbuild.serve.schedule.state import Batch, Entry, Share, State

UNKNOWN = 256.0
"""Tokens of an answer of which nothing is predicted."""
_OVERRUN = 0.25
"""Of an answer that is longer than predicted, so large a part of it is expected again."""


def remaining(one: Entry) -> float:
    """Return how many tokens an answer is expected to have still; one that overruns its prediction has some more."""
    expected = UNKNOWN if one.predicted is None else one.predicted
    return max(expected - one.tokens, one.tokens * _OVERRUN, 1.0)


@dataclass(frozen=True)
class Isrtf:
    """Runs the sequences with the fewest tokens left, up to `rows` in a step, and admits in the same order.

    A sequence that is passed over keeps its slot. Each second of waiting counts as `ageing` tokens fewer, so that long
    answers come to their turn. A step has up to `budget` tokens, as with `Sarathi`.
    """

    rows: int = 1024
    ageing: float = 1.0
    budget: int = 96
    cut: int = 1

    def __call__(self, state: State, now_s: float) -> Batch:
        """Return the next batch."""
        waiting = {one.number for one in state.waiting}
        room, left = Room.of(state, now_s), self.budget
        shares: list[Share] = []
        prompts = 0
        for one in sorted((*state.running, *state.waiting), key=lambda one: self._order(one, now_s)):
            if len(shares) == self.rows:
                break
            if one.number in waiting and not room.fits(one):
                continue
            count = 1 if one.decoding else piece(one, left, self.cut)
            if not count and not prompts:
                count = least(one, self.cut)  # the first prompt gets on, whatever decodes beside it
            if not count:
                continue
            if one.number in waiting:
                room.take(one)
            prompts += not one.decoding
            left -= count
            shares.append(Share(one.number, count))
        return Batch(tuple(shares))

    def _order(self, one: Entry, now_s: float) -> tuple[int, float, int]:
        return one.priority, remaining(one) - self.ageing * (now_s - one.arrival_s), one.number
