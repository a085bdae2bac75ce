"""Estimates of steps that nobody timed: a sum of terms from figures, moved by what is known of machines and models.

What is estimated first and what is refined by an observation is one rule: an observation joins what is known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Literal

import numpy as np

from llmbuild.fleet.estimate import offsets, terms
from llmbuild.fleet.estimate.figures import Observation, Point, machines, observations
from llmbuild.fleet.estimate.offsets import Traits
from llmbuild.fleet.estimate.terms import Sum

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]
    Whole = NDArray[np.int64]

Quantity = Literal["seconds", "watts"]

REFERENCE = "H100-SXM-80GB"
"""The machine on which shares of time are taken for all, so that what is known of one does not hang on its speed."""
_FITTED, _KNOWN = 200, 600
"""Observations that variances are fitted on, and that estimates stand on: some of each variant on each machine."""


@dataclass(frozen=True)
class Together:
    """Estimates of several points and how their errors go together."""

    logs: Array
    covariance: Array
    noise: float
    """Variance of one observation beside it."""

    @property
    def deviations(self) -> Array:
        """Return standard deviations of logarithms of what would be observed."""
        return np.asarray(np.sqrt(np.diag(self.covariance) + self.noise))

    def given(self, which: Whole, logs: Array, noise: float | None = None) -> Together:
        """Return the estimates once some of the points were observed."""
        noise = self.noise if noise is None else noise
        known = self.covariance[np.ix_(which, which)] + noise * np.eye(len(which))
        gain = np.linalg.solve(known, self.covariance[which]).T
        left = self.covariance - gain @ self.covariance[which]
        return Together(self.logs + gain @ (logs - self.logs[which]), left, self.noise)


@dataclass(frozen=True)
class Estimator:
    """What is known of one quantity: factors of terms, variances of offsets, and the observations."""

    quantity: Quantity
    time: Sum
    mean: Sum
    variances: tuple[float, ...]
    known: Traits
    off: Array
    """Logarithms of the known observations over the sums of their terms."""
    noise: Array
    """Variance of each known observation."""

    def together(self, points: Sequence[Point]) -> Together:
        """Return estimates of logarithms: of seconds, or of watts of a device."""
        at = _traits(points, self.time)
        within = offsets.covariance(self.variances, self.known, self.known) + np.diag(self.noise)
        across = offsets.covariance(self.variances, at, self.known)
        gain = np.linalg.solve(within, across.T).T
        logs = _base(points, self.quantity, self.time, self.mean) + gain @ self.off
        return Together(logs, offsets.covariance(self.variances, at, at) - gain @ across.T, self.variances[-1])

    def refined(self, seen: Sequence[Observation], noise: float | None = None) -> Estimator:
        """Return an estimator that knows more observations; `noise` is the variance of their logarithms."""
        points = [each.point for each in seen]
        off = _logs(seen, self.quantity) - _base(points, self.quantity, self.time, self.mean)
        more = np.full(len(seen), self.variances[-1] if noise is None else noise)
        return replace(
            self,
            known=self.known.beside(_traits(points, self.time)),
            off=np.concatenate([self.off, off]),
            noise=np.concatenate([self.noise, more]),
        )


def learned(seen: Sequence[Observation], quantity: Quantity = "seconds") -> Estimator:
    """Return the estimator that observations lead to."""
    time = _time(seen)
    seen = [each for each in seen if each.watts] if quantity == "watts" else list(seen)
    points, logs = [each.point for each in seen], _logs(seen, quantity)
    if quantity == "watts":
        shares = time.watts(terms.seconds(points))
        mean = terms.fitted(shares, logs - np.log(_boards(points)), _weights(seen), terms.WATTS)
    else:
        mean = time
    off = logs - _base(points, quantity, time, mean)
    all_ = _traits(points, time)
    few, many = _spread(seen, _FITTED), _spread(seen, _KNOWN)
    variances = offsets.fitted(all_.take(few), off[few])
    return Estimator(quantity, time, mean, variances, all_.take(many), off[many], np.full(len(many), variances[-1]))


@cache
def shipped(quantity: Quantity) -> Estimator:
    """Return the estimator that the published batches lead to."""
    return learned(observations(), quantity)


def _time(seen: Sequence[Observation]) -> Sum:
    points = [each.point for each in seen]
    return terms.fitted(terms.seconds(points), _logs(seen, "seconds"), _weights(seen), terms.SECONDS)


def _traits(points: Sequence[Point], time: Sum) -> Traits:
    alike = [replace(point, machine=machines()[REFERENCE]) for point in points]
    return offsets.traits(points, time.shares(terms.seconds(alike)))


def _logs(seen: Sequence[Observation], quantity: Quantity) -> Array:
    return np.asarray(np.log([each.watts if quantity == "watts" else each.seconds for each in seen]))


def _base(points: Sequence[Point], quantity: Quantity, time: Sum, mean: Sum) -> Array:
    of = terms.seconds(points)
    return mean.logs(of) if quantity == "seconds" else mean.logs(time.watts(of)) + np.log(_boards(points))


def _boards(points: Sequence[Point]) -> Array:
    return np.array([point.machine.board_w for point in points])


def _cell(one: Observation) -> tuple[str, str, str, str, str, int]:
    at = one.point
    return at.machine.name, at.model.name, at.precision, at.engine, at.kind, at.devices


def _weights(seen: Sequence[Observation]) -> Array:
    """Return weights that keep a variant with many rows from outvoting the others."""
    counts = Counter(map(_cell, seen))
    return np.array([counts[_cell(each)] ** -0.5 for each in seen])


def _spread(seen: Sequence[Observation], most: int) -> Whole:
    """Return at most so many places: from each variant on each machine its first, last and middle rows, and so on."""
    ranks: list[tuple[int, int]] = []
    cells: dict[tuple[str, str, str, str, str, int], list[int]] = {}
    for i, each in enumerate(seen):
        cells.setdefault(_cell(each), []).append(i)
    for places in cells.values():
        ranks += [(rank, places[at]) for rank, at in enumerate(_halved(len(places)))]
    return np.array(sorted(place for _, place in sorted(ranks)[:most]), np.int64)


def _halved(count: int) -> list[int]:
    """Return the places of a row of so many: the ends, then the middles of the widest gaps."""
    order = [0, count - 1] if count > 1 else [0]
    gaps = [(0, count - 1)]
    while gaps:
        low, high = gaps.pop(0)
        if high - low > 1:
            middle = (low + high) // 2
            order.append(middle)
            gaps += [(low, middle), (middle, high)]
    return order
