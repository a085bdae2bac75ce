"""The highest rate that a server holds, by bisection, and the rates at which another variant becomes the preferred one.

Nothing here measures: a search is told which rates were held, and says which one to try next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite, sqrt
from typing import Literal

STEP, MOST_STEP = 1.2, 2.0
"""Factors of a rate by which a search goes on, first and at most, while it has only rates of one kind."""
Verdict = Literal["yes", "no", "undecided"]


@dataclass(frozen=True)
class Bracket:
    """The highest rate is at least `low`, which was held, and below `high`, which was not.

    `low` is 0 where no rate was held, and `high` is infinite where all were.
    """

    low: float
    high: float

    @property
    def width(self) -> float:
        """Return by which share `high` is above `low`; infinite where one of them is not known."""
        return self.high / self.low - 1 if self.low else inf

    def errors(self, predicted: float) -> tuple[float, float]:
        """Return between which relative errors a prediction of the highest rate is."""
        return predicted / self.high - 1, predicted / self.low - 1 if self.low else inf

    def agrees(self, predicted: float, limit: float = 0.1) -> Verdict:
        """Return whether a prediction is within a relative error, whatever the rate in the bracket is."""
        least, most = self.errors(predicted)
        if -limit <= least and most <= limit:
            return "yes"
        return "no" if most < -limit or least > limit else "undecided"


def bracket(held: Mapping[float, bool]) -> Bracket:
    """Return the bracket of rates that were tried: the lowest that was not held, and the highest held below it."""
    high = min((rate for rate, holds in held.items() if not holds), default=inf)
    return Bracket(max((rate for rate, holds in held.items() if holds and rate < high), default=0.0), high)


def held_above(held: Mapping[float, bool]) -> tuple[float, ...]:
    """Return the rates that were held although a lower one was not: noise, or too few requests."""
    high = bracket(held).high
    return tuple(sorted(rate for rate, holds in held.items() if holds and rate > high))


def next_rate(held: Mapping[float, bool], first: float, width: float) -> float | None:
    """Return the rate to try next; None where the bracket is no wider than `width`.

    The search begins at `first`, goes away from it in steps that grow until it has a rate of both kinds, and then
    halves the logarithm of the bracket.
    """
    if not held:
        return first
    found = bracket(held)
    if not isfinite(found.high):
        return found.low * min(max(STEP, found.low / first), MOST_STEP)
    if not found.low:
        return found.high / min(max(STEP, first / found.high), MOST_STEP)
    return None if found.width <= width else sqrt(found.low * found.high)


@dataclass(frozen=True)
class Holding:
    """A variant, the highest rate that it holds, and its loss in the objective: lower is better."""

    name: str
    loss: float
    rate: float


@dataclass(frozen=True)
class Preferred:
    """The rates at which a variant is preferred: above `above`, up to `up_to`."""

    name: str
    above: float
    up_to: float


def preferred(variants: Sequence[Holding]) -> tuple[Preferred, ...]:
    """Return which variant is preferred at which rates, in the order of rates: at each rate the one with the least loss
    of those that hold it; of equal losses the one that holds the higher rate.
    """
    found, above = list[Preferred](), 0.0
    for one in sorted(variants, key=lambda each: (each.loss, -each.rate)):
        if one.rate > above:
            found.append(Preferred(one.name, above, one.rate))
            above = one.rate
    return tuple(found)


@dataclass(frozen=True)
class Crossing:
    """A rate at which `before` holds no more and `after` becomes the preferred one; None where no variant is left.

    `predicted` is None where load curves do not have this crossing, and `measured` where the runs do not. A measured
    one is `sure` where `after` held all rates of the bracket.
    """

    before: str
    after: str | None
    predicted: float | None = None
    measured: Bracket | None = None
    sure: bool = False


def crossings(
    losses: Mapping[str, float], predicted: Mapping[str, float], measured: Mapping[str, Bracket]
) -> tuple[Crossing, ...]:
    """Return all crossings, predicted or measured, by the variants before and behind them.

    As measured, a variant holds what was held: the lower end of its bracket.
    """
    by_curve = preferred([Holding(name, losses[name], rate) for name, rate in predicted.items()])
    by_runs = preferred([Holding(name, losses[name], found.low) for name, found in measured.items()])
    made = {pair: Crossing(*pair, rate) for pair, rate in _pairs(by_curve).items()}
    for pair in _pairs(by_runs):
        before, after = pair
        found = measured[before]
        sure = after is None or measured[after].low >= found.high
        made[pair] = replace(made.get(pair, Crossing(*pair)), measured=found, sure=sure)
    return tuple(sorted(made.values(), key=_rate))


def _pairs(spans: Sequence[Preferred]) -> dict[tuple[str, str | None], float]:
    names = [*(one.name for one in spans[1:]), None]
    return {(one.name, after): one.up_to for one, after in zip(spans, names, strict=False)}


def _rate(one: Crossing) -> float:
    return one.measured.low if one.measured else one.predicted or 0.0
