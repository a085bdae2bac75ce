"""A step as a sum of terms, each with a factor of its own: launches, bytes read, products, and what devices exchange.

Factors are not negative, so a sum never falls when a machine gets slower. They are fitted to logarithms of what was
timed, because errors are ratios.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from llmbuild.fleet.estimate.figures import WIDTHS, Point

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

SECONDS = (2e-5, 1.4, 1.6, 2.0, 2e-5, 1e-5, 2.0, 5e-9)
"""What factors are taken to be before anything was timed: seconds of a launch, and peaks over what is reached."""
WATTS = (0.3, 0.3, 0.5)
"""The same for shares of a board's limit."""
GROUPS = ((0, 5), (1,), (2, 3, 4), (6, 7))
"""Terms of launches, of weights, of rows and what they see, and of prompts."""
_TRUST = 1.0
"""Weight of a factor's prior against one observation, by squares of logarithms."""
_STEPS = 60


def seconds(points: Sequence[Point]) -> Array:
    """Return the terms of each point with factors of one, points x terms."""
    return np.array([_terms(point) for point in points]).reshape(len(points), len(SECONDS))


def _terms(at: Point) -> tuple[float, ...]:
    machine, model = at.machine, at.model
    bandwidth = machine.bandwidth * at.devices
    products = 2 * model.active / (machine.rate(at.precision) * at.devices)
    several = float(at.devices > 1)
    return (
        model.layers,
        model.read(at.rows + at.prompt) * WIDTHS[at.precision] / bandwidth,
        at.context * model.kv_bytes / bandwidth,
        at.rows * products,
        at.rows,
        several * model.layers,
        at.prompt * products,
        several * model.layers * at.prompt,
    )


@dataclass(frozen=True)
class Sum:
    """Factors of terms."""

    factors: tuple[float, ...]

    def logs(self, terms: Array) -> Array:
        """Return logarithms of the sums."""
        return np.asarray(np.log(terms @ np.array(self.factors)))

    def shares(self, terms: Array) -> Array:
        """Return what each group of terms is of the sum, points x groups."""
        parts = terms * np.array(self.factors)
        return np.asarray(np.stack([parts[:, group].sum(1) for group in GROUPS], axis=1) / parts.sum(1)[:, None])

    def watts(self, terms: Array) -> Array:
        """Return the terms of watts: a constant, and shares of the time that memory and products take."""
        parts = terms * np.array(self.factors)
        memory, products = parts[:, 1] + parts[:, 2], parts[:, 3] + parts[:, 6]
        return np.stack([np.ones(len(parts)), memory / parts.sum(1), products / parts.sum(1)], axis=1)


def fitted(terms: Array, logs: Array, weights: Array, prior: Sequence[float]) -> Sum:
    """Return the factors that bring the logarithms of the sums nearest to those given, by damped Gauss-Newton steps."""
    start, root = np.log(np.array(prior)), np.sqrt(weights)
    ridge = np.sqrt(_TRUST) * np.eye(len(start))

    def off(at: Array) -> Array:
        return np.concatenate([root * (np.log(terms @ np.exp(at)) - logs), ridge @ (at - start)])

    found, rest, damping = start.copy(), off(start), 1e-2
    for _ in range(_STEPS):
        parts = terms * np.exp(found)
        slope = np.concatenate([root[:, None] * parts / parts.sum(1)[:, None], ridge])
        step = np.linalg.solve(slope.T @ slope + damping * np.eye(len(start)), -slope.T @ rest)
        tried = off(found + step)
        if tried @ tried < rest @ rest:
            found, rest, damping = found + step, tried, damping / 3
        else:
            damping *= 4
    return Sum(tuple(float(x) for x in np.exp(found)))
