"""The predictor of lengths: a linear model of a prompt's hashed features, and how far answers are from what it says."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from llmbuild.serve.predict.features import buckets

BEYOND, GROWTH = 1.5, 1.25
"""An answer longer than any that was seen, for its prompt, is expected to have half as much again; any answer that is
under way a quarter more at least."""


@dataclass(frozen=True)
class Spread:
    """How far z = log(1 + tokens) is from what is said of it: quantiles in order, each of as many answers."""

    quantiles: tuple[float, ...]

    @cached_property
    def scale(self) -> float:
        """Half of the distance within which two thirds of the answers are."""
        count = len(self.quantiles)
        return max(1e-3, (self.quantiles[min(count - 1, count * 5 // 6)] - self.quantiles[count // 6]) / 2)

    def rank(self, beside: float) -> float:
        """Return the part of answers whose z is no further above what is said than so much."""
        return bisect_right(self.quantiles, beside) / len(self.quantiles)

    def expected(self, location: float, tokens: int) -> float:
        """Return how many tokens an answer of which `location` is said is expected to have in all when it has `tokens`.

        It is the median of those that are longer, but at least a quarter more than `tokens`, so it never falls
        while they grow.
        """
        least = max(1.0, tokens * GROWTH)
        longer = bisect_right(self.quantiles, math.log1p(tokens) - location)
        if longer == len(self.quantiles):
            return max(tokens * BEYOND, least)
        middle = (longer + len(self.quantiles)) // 2
        return max(math.expm1(location + self.quantiles[middle]), least)


@dataclass(frozen=True, eq=False)
class LengthModel:
    """What a prompt says of z: `middle`, and a mean of the `weights` f64[BUCKETS] of its features by their `rarity`."""

    middle: float
    weights: Any
    rarity: Any
    """f64[BUCKETS]: the logarithm of how few prompts have a feature. One that all have counts nothing."""
    spread: Spread

    @cached_property
    def _weighted(self) -> Any:
        return self.weights * self.rarity

    @cached_property
    def _squared(self) -> Any:
        return self.rarity * self.rarity

    def location(self, ids: Sequence[int]) -> float:
        """Return what the tokens of a prompt say of z."""
        found = buckets(ids)
        norm = float(self._squared[found].sum())
        return self.middle + float(self._weighted[found].sum()) / math.sqrt(norm) if norm else self.middle
