"""Deadlines in place of decodes first: a step takes as long as the most urgent answer allows, and no longer.

After Lyu, Liu, Wu and Chen, "FairBatching: Fairness-Aware Batch Formation for LLM Inference", 2025. Token j of an
answer is due at arrival + TTFT + j x TPOT: an answer that is ahead of its deadlines may wait for the prompts of others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from llmbuild.serve.schedule.room import Room, least, piece
from llmbuild.serve.schedule.state import Batch, Entry, Share, State
from llmbuild.spec.load_curve import Work

AGED = 4.0
"""Times its TTFT after which a prompt that is late goes before all others: it is not put off for ever."""


@dataclass(frozen=True)
class FairBatching:
    """Fills a step up to the time that the most urgent decode leaves, but at least one TPOT.

    First come decodes that are due before the next step would end, then pieces of prompts, then other decodes, each the
    most urgent first. Prompts that are late already go behind those that can still be in time, until they are `AGED`
    times late. `step_s` tells the time of a step; `ttft_s` and `tpot_s` hold for requests that have none of their own.
    """

    step_s: Callable[[Work], float]
    ttft_s: float
    tpot_s: float
    cut: int = 1
    most_tokens: int = 512

    def __call__(self, state: State, now_s: float) -> Batch:
        """Return the next batch."""
        decodes = sorted((one for one in state.running if one.decoding), key=lambda one: self._order(one, now_s))
        paces = [self._tpot(one) for one in decodes]
        pace = min(paces, default=self.tpot_s)
        budget = max(min((self._slack(one, now_s) for one in decodes), default=math.inf), pace)
        filling = _Filling(self, budget, Room.of(state, now_s), {one.number for one in state.waiting})
        urgent = [one for one in decodes if self._slack(one, now_s) < budget + pace]
        filling.add(urgent)
        prompts = [*(one for one in state.running if not one.decoding), *state.waiting]
        filling.add(sorted(prompts, key=lambda one: self._order(one, now_s)))
        filling.add(one for one in decodes if one not in urgent)
        if not filling.shares:
            filling.force([*decodes, *sorted(prompts, key=lambda one: self._order(one, now_s))])
        return Batch(tuple(filling.shares))

    def _tpot(self, one: Entry) -> float:
        return self.tpot_s if one.tpot_s is None else one.tpot_s

    def _ttft(self, one: Entry) -> float:
        return self.ttft_s if one.ttft_s is None else one.ttft_s

    def _slack(self, one: Entry, now_s: float) -> float:
        """Return the seconds until the next token is due."""
        return one.arrival_s + self._ttft(one) + one.tokens * self._tpot(one) - now_s

    def _order(self, one: Entry, now_s: float) -> tuple[int, int, float, int]:
        slack = self._slack(one, now_s)
        if one.decoding:
            return one.priority, 0, slack, one.number
        late = slack < 0
        aged = now_s - one.arrival_s > AGED * self._ttft(one)
        return one.priority, 0 if aged else 1 + late, slack, one.number


class _Filling:
    """A batch that grows while its time allows."""

    def __init__(self, policy: FairBatching, budget: float, room: Room, waiting: set[int]) -> None:
        self._policy, self._budget, self._room, self._waiting = policy, budget, room, waiting
        self._work, self._tokens = Work(), policy.most_tokens
        self.shares: list[Share] = []

    def add(self, entries: Iterable[Entry]) -> None:
        """Add what fits of each, in order; a prompt that does not fit at all ends the prompts."""
        for one in entries:
            waits = one.number in self._waiting
            if waits and not self._room.fits(one):
                continue
            count = 1 if one.decoding and self._fits(one, 1) else 0 if one.decoding else self._most(one)
            if count:
                self._take(one, count, waits)
            elif not one.decoding:
                return

    def force(self, entries: Iterable[Entry]) -> None:
        """Add the least of the first that may run: a step is never empty."""
        for one in entries:
            waits = one.number in self._waiting
            if not waits or self._room.fits(one):
                self._take(one, 1 if one.decoding else least(one, self._policy.cut), waits)
                return

    def _take(self, one: Entry, count: int, waits: bool) -> None:
        if waits:
            self._room.take(one)
        self._work = self._work.add(_position(one), count)
        self._tokens -= 0 if one.decoding else count
        self.shares.append(Share(one.number, count))

    def _fits(self, one: Entry, count: int) -> bool:
        return self._policy.step_s(self._work.add(_position(one), count)) <= self._budget

    def _most(self, one: Entry) -> int:
        """Return the most tokens of a prompt for which there is time."""
        cut = self._policy.cut
        most = piece(one, self._tokens, cut)
        if not most or self._fits(one, most):
            return most
        if not cut:
            return 0
        low, high = 0, -(-most // cut)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._fits(one, middle * cut) else (low, middle)
        return low * cut


def _position(one: Entry) -> int:
    """Return where its next token is."""
    return one.prompt + one.tokens - 1 if one.decoding else one.computed
