"""How far points are off the sum of their terms, together: what one of them shows, those alike inherit.

Logarithms of ratios are taken as a Gaussian process whose covariance is a sum: of one machine, of one model, of one
engine, and so on. So an observation moves every estimate that shares something with it, by as much as the known rows
say. Nothing here depends on how fast a machine is by its data sheet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np

from llmbuild.fleet.estimate.figures import Point

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]
    Whole = NDArray[np.int64]

START = (0.03, 0.01, 0.01, 0.02, 0.01, 0.02, 0.02, 0.02, 0.004)
"""Variances before they are fitted: machine, model, precision, engine, kind, machine and engine, a variant on a
machine, its place, and noise. A variance of 0.04 is an error of 20 %."""
_LEAST = 1e-5
_TRUST = 1.0
"""Weight of those, as so many observations."""
_PLACE = 1.5
"""Distance, in logarithms of rows and positions, at which two steps of a variant say little of each other."""
_SWEEPS = 15


@dataclass(frozen=True)
class Traits:
    """What points have in common."""

    ids: Whole
    """Points x kinds of ids."""
    shares: Array
    """Of each step's time by groups of terms, points x groups."""
    place: Array
    """Logarithms of rows and of positions for each, and the share of prompts."""

    def take(self, which: Whole) -> Traits:
        """Return those of some points."""
        return Traits(self.ids[which], self.shares[which], self.place[which])

    def beside(self, others: Traits) -> Traits:
        """Return those of both."""
        return Traits(
            np.concatenate([self.ids, others.ids]),
            np.concatenate([self.shares, others.shares]),
            np.concatenate([self.place, others.place]),
        )


def traits(points: Sequence[Point], shares: Array) -> Traits:
    """Return the traits of points whose time has these shares."""
    ids = np.array([_ids(point) for point in points], np.int64).reshape(len(points), 7)
    rows = np.array([max(point.rows, 0.5) for point in points])
    seen = np.array([point.context for point in points]) / rows
    return Traits(ids, shares, np.stack([np.log(rows), 0.5 * np.log(seen + 64), 2 * shares[:, -1]], axis=1))


def _ids(at: Point) -> tuple[int, ...]:
    machine, model = at.machine.name, at.model.name
    variant = (machine, model, at.precision, at.engine, at.devices)
    return tuple(map(_id, (machine, model, at.precision, at.engine, at.kind, (machine, at.engine), variant)))


def _id(name: object) -> int:
    return int.from_bytes(blake2b(repr(name).encode(), digest_size=7).digest())


def parts(a: Traits, b: Traits) -> Array:
    """Return the parts of the covariance without their variances, parts x points of a x points of b."""
    same = [np.equal.outer(a.ids[:, k], b.ids[:, k]).astype(float) for k in range(a.ids.shape[1])]
    alike = a.shares @ b.shares.T
    return np.stack([*(each * alike for each in same[:-1]), same[-1], same[-1] * _near(a, b)])


def _near(a: Traits, b: Traits) -> Array:
    far = sum(np.subtract.outer(a.place[:, k], b.place[:, k]) ** 2 for k in range(a.place.shape[1]))
    return np.asarray(np.exp(-far / (2 * _PLACE**2)))


def covariance(variances: Sequence[float], a: Traits, b: Traits) -> Array:
    """Return the covariance of points without noise: the sum of the parts, none of which is kept."""
    *shared, whole, place, _ = variances
    total = np.zeros((len(a.ids), len(b.ids)))
    for k, variance in enumerate(shared):
        total += variance * np.equal.outer(a.ids[:, k], b.ids[:, k])
    own = np.equal.outer(a.ids[:, -1], b.ids[:, -1])
    return np.asarray(total * (a.shares @ b.shares.T) + own * (whole + place * _near(a, b)))


def fitted(known: Traits, off: Array) -> tuple[float, ...]:
    """Return the variances that make what is known most likely, by steps that each raise the likelihood."""
    pieces = np.concatenate([parts(known, known), np.eye(len(off))[None]])
    flat = pieces.reshape(len(pieces), -1)
    prior = np.array(START)
    variances = prior.copy()
    for _ in range(_SWEEPS):
        inverse = np.linalg.inv((variances @ flat).reshape(pieces.shape[1:]))
        solved = inverse @ off
        fit, size = flat @ np.outer(solved, solved).ravel(), flat @ inverse.ravel()
        variances = np.maximum(variances * np.sqrt((fit + _TRUST) / (size + _TRUST / prior)), _LEAST)
    return tuple(float(x) for x in variances)
