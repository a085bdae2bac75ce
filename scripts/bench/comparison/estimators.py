"""What estimates are judged beside: rooflines, the nearest row scaled, low-rank completion, and boosted trees.

Each learns from observations and gives, for held-out points, logarithms of seconds or of watts, before and after some
were seen. Seconds are scaled by the roofline: by bandwidth where a step decodes, by products where it computes prompts.
Watts are scaled by the limit of the board.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from llmbuild.fleet.estimate import terms
from llmbuild.fleet.estimate.estimator import Quantity, Together, learned
from llmbuild.fleet.estimate.figures import WIDTHS, Observation, Point

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]
    Whole = NDArray[np.int64]


class Held(Protocol):
    """Estimates of held-out points."""

    def given(self, which: Whole, logs: Array) -> Array:
        """Return the logarithms of all points once some were seen."""
        ...


def logs_of(seen: Sequence[Observation], quantity: Quantity) -> Array:
    """Return the logarithms of what was observed."""
    return np.log(np.array([each.watts if quantity == "watts" else each.seconds for each in seen]))


def roofline(points: Sequence[Point], quantity: Quantity) -> Array:
    """Return logarithms of the roofline, bytes at full bandwidth and prompts at full rate, or of the board limit."""
    if quantity == "watts":
        return np.log(np.array([at.machine.board_w for at in points]))
    of = terms.seconds(points)
    return np.log(of[:, 1] + of[:, 2] + of[:, 6])


def _off(train: Sequence[Observation], quantity: Quantity) -> Array:
    return logs_of(train, quantity) - roofline([each.point for each in train], quantity)


@dataclass(frozen=True)
class Ours:
    """The estimator of the package."""

    together: Together

    def given(self, which: Whole, logs: Array) -> Array:
        """Return its estimates."""
        return self.together.given(which, logs).logs


def ours(train: Sequence[Observation], points: Sequence[Point], quantity: Quantity) -> Ours:
    """Return the estimates of the package."""
    return Ours(learned(train, quantity).together(points))


@dataclass(frozen=True)
class Shifted:
    """Estimates that are all moved by the mean of what the seen ones were off."""

    logs: Array

    def given(self, which: Whole, logs: Array) -> Array:
        """Return the moved logarithms."""
        return self.logs + float((logs - self.logs[which]).mean()) if len(which) else self.logs


# --- the nearest row, scaled ------------------------------------------------------------------------------------------


def plain(train: Sequence[Observation], points: Sequence[Point], quantity: Quantity) -> Held:
    """Return the roofline times the median of what the rows took over theirs."""
    return Shifted(roofline(points, quantity) + float(np.median(_off(train, quantity))))


@dataclass(frozen=True)
class Nearest:
    """The most similar row, scaled by the ratio of rooflines."""

    far: Array
    """Distances, held-out points x rows."""
    within: Array
    """Distances of the held-out points from each other."""
    off: Array
    """Logarithms of what the rows took over their rooflines."""
    roofs: Array

    def given(self, which: Whole, logs: Array) -> Array:
        """Return the scaled rows, moved by what they were off where something was seen; a seen row may be nearest."""
        found = self.roofs + self.off[self.far.argmin(1)]
        if not len(which):
            return found
        near = self.within[:, which]
        own = self.roofs + (logs - self.roofs[which])[near.argmin(1)]
        moved = found + float((logs - found[which]).mean())
        return np.where(near.min(1) < self.far.min(1), own, moved)


def nearest(train: Sequence[Observation], points: Sequence[Point], quantity: Quantity) -> Held:
    """Return the nearest rows, scaled."""
    known = [each.point for each in train]
    a, b = _where(points), _where(known)
    return Nearest(_distance(a, b), _distance(a, a), _off(train, quantity), roofline(points, quantity))


def _where(points: Sequence[Point]) -> tuple[Array, NDArray[np.str_]]:
    numbers = [
        (
            np.log(at.machine.bandwidth),
            np.log(at.machine.fp16),
            np.log(at.model.active),
            0.5 * np.log(at.model.kv_bytes),
            np.log(at.devices),
            np.log(at.rows + 0.5),
            0.5 * np.log(at.context / max(at.rows, 1) + 64),
            0.5 * np.log(at.prompt + 1),
        )
        for at in points
    ]
    names = [(at.engine, at.kind, at.precision) for at in points]
    return np.array(numbers), np.array(names)


def _distance(a: tuple[Array, NDArray[np.str_]], b: tuple[Array, NDArray[np.str_]]) -> Array:
    numbers = np.abs(a[0][:, None] - b[0][None]).sum(2)
    return numbers + 0.5 * (a[1][:, None] != b[1][None]).sum(2)


# --- low-rank completion ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LowRank:
    """Ratios to the roofline as a matrix of steps by machines, of rank two beside means."""

    places: Whole
    """Row of each held-out point in the matrix."""
    steps: Array
    mean: float
    roofs: Array

    def given(self, which: Whole, logs: Array) -> Array:
        """Return the products with the factors of the machine, which are solved from what was seen."""
        rows = self.steps[self.places]
        machine = np.zeros(rows.shape[1])
        machine[0] = 1.0
        if len(which):
            ridge = _RIDGE * np.eye(rows.shape[1])
            ridge[0, 0] = 1e6  # the mean of a step counts once
            off = logs - self.roofs[which] - self.mean
            seen = rows[which]
            machine = np.linalg.solve(seen.T @ seen + ridge, seen.T @ off + ridge @ machine)
        return self.roofs + self.mean + rows @ machine


_RIDGE, _RANK, _TURNS = 0.5, 2, 2


def low_rank(train: Sequence[Observation], points: Sequence[Point], quantity: Quantity) -> Held:
    """Return the completed matrix: a row is a step of a variant in powers of two, a column a machine and its engine."""
    known = [each.point for each in train]
    names = {name: i for i, name in enumerate(dict.fromkeys(map(_step, [*known, *points])))}
    columns = {name: i for i, name in enumerate(dict.fromkeys(_column(at) for at in known))}
    off = _off(train, quantity)
    mean = float(off.mean())
    row = np.array([names[_step(at)] for at in known])
    column = np.array([columns[_column(at)] for at in known])
    steps, machines = np.zeros((len(names), 2 + _RANK)), np.zeros((len(columns), 2 + _RANK))
    steps[:, 1], machines[:, 0] = 1.0, 1.0  # the mean of a step, and that of a machine
    steps[:, 2:] = np.random.default_rng(0).normal(0, 0.1, (len(names), _RANK))
    for _ in range(_TURNS):
        _solved(machines, column, steps[row], off - mean, 0)
        _solved(steps, row, machines[column], off - mean, 1)
    return LowRank(np.array([names[_step(at)] for at in points]), steps, mean, roofline(points, quantity))


def _solved(into: Array, index: Whole, others: Array, off: Array, fixed: int) -> None:
    """Set the factors of one side to the least squares of the other; one of them stays one."""
    free = [k for k in range(into.shape[1]) if k != fixed]
    for i in np.unique(index):
        own = others[index == i]
        left = off[index == i] - own[:, fixed]
        into[i, free] = np.linalg.solve(
            own[:, free].T @ own[:, free] + _RIDGE * np.eye(len(free)), own[:, free].T @ left
        )


def _step(at: Point) -> tuple[object, ...]:
    rounded = (round(np.log2(x + 1)) for x in (at.rows, at.context / max(at.rows, 1) / 4, at.prompt))
    return at.model.name, at.precision, at.devices, *rounded


def _column(at: Point) -> tuple[str, str]:
    return at.machine.name, at.engine


# --- boosted trees ----------------------------------------------------------------------------------------------------

_TREES, _DEPTH, _SHRINK, _BINS, _LEAF = 60, 3, 0.15, 32, 5


def boosted(train: Sequence[Observation], points: Sequence[Point], quantity: Quantity) -> Held:
    """Return boosted regression trees of the ratio to the roofline, on the terms, the machine and the engine."""
    known = [each.point for each in train]
    a, b = _features(known), _features(points)
    edges = [np.unique(np.quantile(column, np.linspace(0, 1, _BINS + 1)[1:-1])) for column in a.T]
    bins, asked = (
        np.stack([np.searchsorted(edge, column) for edge, column in zip(edges, of.T, strict=True)], axis=1)
        for of in (a, b)
    )
    off = _off(train, quantity)
    found, guess = np.full(len(known), off.mean()), np.full(len(points), off.mean())
    for _ in range(_TREES):
        mine, theirs = _tree(bins, off - found, asked)
        found += _SHRINK * mine
        guess += _SHRINK * theirs
    return Shifted(roofline(points, quantity) + guess)


def _features(points: Sequence[Point]) -> Array:
    engines = sorted({"vllm", "tensorrt-llm", "sglang", "splitwise"})
    kinds = ("batch", "decode", "prefill", "serving", "steady")
    return np.array(
        [
            (
                *own,
                np.log(at.machine.bandwidth),
                np.log(at.machine.fp16),
                np.log(at.model.active),
                np.log(at.devices),
                np.log(at.rows + 1),
                np.log(at.prompt + 1),
                WIDTHS[at.precision],
                *(float(at.engine == name) for name in engines),
                *(float(at.kind == name) for name in kinds),
            )
            for at, own in zip(points, np.log(terms.seconds(points) + 1e-9), strict=True)
        ]
    )


def _tree(bins: Whole, off: Array, asked: Whole) -> tuple[Array, Array]:
    """Return what a tree that is grown level by level says of its rows and of those asked for."""
    leaf, where = np.zeros(len(bins), np.int64), np.zeros(len(asked), np.int64)
    for level in range(_DEPTH):
        leaves, columns = 2**level, bins.shape[1]
        place = ((leaf[:, None] * columns + np.arange(columns)) * _BINS + bins).ravel()
        shape = (leaves, columns, _BINS)
        count = np.bincount(place, minlength=leaves * columns * _BINS).reshape(shape).cumsum(2)
        total = np.bincount(place, np.repeat(off, columns), leaves * columns * _BINS).reshape(shape).cumsum(2)
        right_n, right = count[..., -1:] - count, total[..., -1:] - total
        gain = total**2 / np.maximum(count, 1) + right**2 / np.maximum(right_n, 1)
        gain = np.where((count >= _LEAF) & (right_n >= _LEAF), gain, -1.0).reshape(leaves, -1)
        best = gain.argmax(1)
        feature, cut = np.divmod(best, _BINS)
        cut = np.where(gain.max(1) < 0, _BINS, cut)  # a leaf that cannot be cut keeps all on one side
        leaf, where = (
            2 * at + (of[np.arange(len(of)), feature[at]] > cut[at]) for at, of in ((leaf, bins), (where, asked))
        )
    size = 2**_DEPTH
    mean = np.bincount(leaf, off, size) / np.maximum(np.bincount(leaf, minlength=size), 1)
    return mean[leaf], mean[where]


OURS = "terms and offsets"
METHODS: dict[str, Callable[[Sequence[Observation], Sequence[Point], Quantity], Held]] = {
    "plain roofline": plain,
    "nearest, scaled": nearest,
    "low-rank": low_rank,
    "boosted trees": boosted,
    OURS: ours,
}
