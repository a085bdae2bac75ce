"""How many tokens an answer will have: what schedulers that prefer short answers go by."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import OrderedDict, deque
from typing import Protocol

from llmbuild.serve.request import Request

AGAIN = 50
"""Tokens after which an answer's length is predicted again."""
_KEPT, _TENANTS, _LEAST = 512, 1024, 8
"""Ended answers that are remembered of a tenant, tenants that are, and answers from which on they say something."""


class Lengths(Protocol):
    """Predicts the length of answers, and learns from those that have ended. For one thread."""

    def predict(self, request: Request, tokens: int) -> float | None:
        """Return how many tokens an answer is expected to have in all when it has `tokens`; None where unknown."""

    def learn(self, request: Request, tokens: int) -> None:
        """Take an answer that has ended after so many tokens."""


class History:
    """Expects of a tenant's answer what its last answers had that were longer: the mean of those above `tokens`.

    An answer that is longer than all of them is expected to have half as much again. `max_tokens` bounds it all. Of a
    tenant with few answers nothing is known.
    """

    def __init__(self) -> None:
        self._last: OrderedDict[str, deque[int]] = OrderedDict()
        self._sorted: dict[str, list[int]] = {}

    def predict(self, request: Request, tokens: int) -> float | None:
        """Return how many tokens an answer is expected to have in all."""
        most = request.params.max_tokens
        known = self._sorted.get(request.tenant, [])
        if len(known) < _LEAST:
            return None
        longer = known[bisect_right(known, tokens) :]
        found = sum(longer) / len(longer) if longer else tokens * 1.5
        return found if most is None else min(found, float(most))

    def learn(self, request: Request, tokens: int) -> None:
        """Take an answer that has ended."""
        last = self._last.setdefault(request.tenant, deque())
        known = self._sorted.setdefault(request.tenant, [])
        self._last.move_to_end(request.tenant)
        if len(last) == _KEPT:
            known.remove(last.popleft())
        last.append(tokens)
        insort(known, tokens)
        if len(self._last) > _TENANTS:
            gone, _ = self._last.popitem(last=False)
            del self._sorted[gone]
