"""Lengths by a trained predictor, set right by what each tenant's answers have."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmbuild.serve.predict.model import Spread
from llmbuild.serve.request import Request

_TENANTS = 1024
_FIRST, _LAST = 8.0, 64.0
"""A tenant's first answer moves what is expected of the next by an eighth of its distance, later ones by a 64th."""
_NEWTON = 2.5
"""A normal distribution's density in its middle is 1 / (2.5 scale): by so much a rank tells of a distance."""


@dataclass
class _Offset:
    """By how much a tenant's answers are longer than predicted, in logarithms, after so many answers."""

    value: float = 0.0
    count: int = 0


class Learned:
    """Predicts by a trained model and a tenant's offset to it, and keeps the offsets. For one thread.

    An offset moves until half of a tenant's answers are longer than predicted. Of an answer that was cut is known that
    it would have been longer. `max_tokens` bounds what is predicted.
    """

    def __init__(self, location: Callable[[Sequence[int]], float], spread: Spread) -> None:
        """Take what says z of a prompt's tokens, and how far answers are from it."""
        self._says, self._spread = location, spread
        self._offsets: OrderedDict[str, _Offset] = OrderedDict()

    def predict(self, request: Request, tokens: int) -> float | None:
        """Return how many tokens an answer is expected to have in all when it has `tokens`."""
        found = self._spread.expected(self._location(request), tokens)
        most = request.params.max_tokens
        return found if most is None else min(found, float(most))

    def learn(self, request: Request, tokens: int) -> None:
        """Take an answer that has ended."""
        rank = self._spread.rank(math.log1p(tokens) - self._location(request))
        most = request.params.max_tokens
        if most is not None and tokens >= most:
            rank = (1 + rank) / 2
        mine = self._offsets.setdefault(request.tenant, _Offset())
        self._offsets.move_to_end(request.tenant)
        mine.value += _NEWTON * self._spread.scale * (rank - 0.5) / min(_FIRST + mine.count, _LAST)
        mine.count += 1
        if len(self._offsets) > _TENANTS:
            self._offsets.popitem(last=False)

    def _location(self, request: Request) -> float:
        mine = self._offsets.get(request.tenant)
        return self._says(request.prompt) + (mine.value if mine else 0.0)
