"""The exact hypervolume of a front, and the expected gain from an unmeasured point.

Every array holds losses: lower is better, and a value at or above the reference counts nothing.
"""

from __future__ import annotations

from math import erf, pi, sqrt

import numpy as np
from numpy.typing import NDArray

Losses = NDArray[np.float64]
_ERF = np.vectorize(erf, otypes=[float])


def nondominated(losses: Losses) -> Losses:
    """Return the rows of f64[N,D] that no other row weakly dominates; one of equal rows."""
    rows = np.unique(losses, axis=0)
    no_worse = (rows[None, :, :] <= rows[:, None, :]).all(-1)
    return np.asarray(rows[no_worse.sum(1) == 1])


def hypervolume(losses: Losses, reference: Losses) -> float:
    """Return the volume between f64[N,D] and the reference f64[D] that the rows dominate."""
    inside = losses[(losses < reference).all(-1)]
    return 0.0 if not len(inside) else _volume(nondominated(inside), reference)


def _volume(front: Losses, reference: Losses) -> float:
    """Sum slices along the last loss: each is a front with one dimension less."""
    if front.shape[1] == 1:
        return float(reference[0] - front[:, 0].min())
    if front.shape[1] == 2:
        ordered = front[np.argsort(front[:, 0])]
        height = np.minimum.accumulate(ordered[:, 1])
        width = np.diff(np.append(ordered[:, 0], reference[0]))
        return float((width * (reference[1] - height)).sum())
    levels = np.unique(front[:, -1])
    depths = np.diff(np.append(levels, reference[-1]))
    return float(
        sum(
            depth * _volume(nondominated(front[front[:, -1] <= level][:, :-1]), reference[:-1])
            for level, depth in zip(levels, depths, strict=True)
        )
    )


def free_cells(front: Losses, reference: Losses) -> tuple[Losses, Losses]:
    """Return the boxes of the region that no row dominates, as low and high corners f64[C,D].

    The boxes of the grid that the front's coordinates span in all losses but the last; each reaches from minus
    infinity up to the best last loss among the rows that cover it.
    """
    dimensions = len(reference)
    front = nondominated(front[(front < reference).all(-1)]) if len(front) else front.reshape(0, dimensions)
    axes = [np.concatenate(([-np.inf], np.unique(front[:, d]), [reference[d]])) for d in range(dimensions - 1)]
    low = _corners([axis[:-1] for axis in axes])
    high = _corners([axis[1:] for axis in axes])
    covering = (front[None, :, :-1] <= low[:, None, :]).all(-1)  # [C, N]
    top = np.where(covering, front[None, :, -1], reference[-1]).min(-1, initial=reference[-1])
    bottom = np.full_like(top, -np.inf)
    return np.column_stack([low, bottom]), np.column_stack([high, top])


def _corners(axes: list[Losses]) -> Losses:
    if not axes:
        return np.zeros((1, 0))
    return np.stack([grid.ravel() for grid in np.meshgrid(*axes, indexing="ij")], axis=-1)


def expected_gain(mean: Losses, spread: Losses, front: Losses, reference: Losses) -> Losses:
    """Return the expected gain in volume f64[P] of points whose losses are independent normals f64[P,D].

    Exact: within a box the gain is a product over the losses, and so is its expectation.
    """
    low, high = free_cells(front, reference)
    size = max(1, AT_ONCE // len(low))
    starts = range(0, len(mean), size)
    return np.concatenate([_gains(mean[i : i + size], spread[i : i + size], low, high) for i in starts])


AT_ONCE = 4_000_000
"""Maximum number of products of points and boxes held in memory at once."""


def _gains(mean: Losses, spread: Losses, low: Losses, high: Losses) -> Losses:
    gain = np.ones((len(mean), len(low)))
    for d in range(low.shape[1]):
        edges, where = np.unique(np.concatenate([low[:, d], high[:, d]]), return_inverse=True)
        below = _shortfall(edges, mean[:, d : d + 1], spread[:, d : d + 1])
        gain *= below[:, where[len(low) :]] - below[:, where[: len(low)]]
    return np.asarray(gain.sum(-1))


def _shortfall(edges: Losses, mean: Losses, spread: Losses) -> Losses:
    """Return the expectation of max(0, edge - loss), f64[P,E]."""
    with np.errstate(invalid="ignore"):
        z = (edges[None, :] - mean) / spread
        density = np.exp(-0.5 * z * z) / sqrt(2 * pi)
        found = spread * (z * 0.5 * (1 + _ERF(z / sqrt(2))) + density)
    return np.where(np.isneginf(edges)[None, :], 0.0, found)
