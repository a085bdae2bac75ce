"""A learned cost model: what other models' studies say about points of this one, before they are compiled.

Losses are told relative to those of point 0, so that models of different size speak of the same thing: how much a
choice wins. The model is the process of `surrogate` over the knobs, on the points of all other studies together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmbuild.search import surrogate
from llmbuild.search.surrogate import Array, Process
from llmbuild.spec.space import Point, Value

Losses = tuple[float, ...]

MOST = 250
"""Points of other studies that are learned from at most: fitting takes the cube of their number."""


@dataclass(frozen=True)
class Learned:
    """One process for each loss, and the numbers of the values it has seen."""

    processes: tuple[Process, ...]
    codes: tuple[tuple[str, Mapping[Value, int]], ...]

    def predict(self, points: Sequence[Point]) -> Array:
        """Return f64[P,D]: losses relative to those of point 0."""
        rows = _coded([p.as_dict() for p in points], self.codes)
        return np.stack([process.predict(rows)[0] for process in self.processes], -1)


def learn(studies: Sequence[Mapping[Point, Losses | None]], zeros: Sequence[Point]) -> Learned | None:
    """Return what studies have in common; None where none has a feasible point 0 and some more points.

    `zeros` are the points 0 of the studies, each one a key of its study.
    """
    points: list[dict[str, Value]] = []
    rows: list[Any] = []
    for study, zero in zip(studies, zeros, strict=True):
        base = study.get(zero)
        if base is not None:
            feasible = [(p, y) for p, y in study.items() if y is not None]
            points += [p.as_dict() for p, _ in feasible]
            rows += [np.subtract(y, base) for _, y in feasible]
    if len(points) < 8:
        return None
    if len(points) > MOST:
        kept = np.random.default_rng(0).choice(len(points), MOST, replace=False)
        points, rows = [points[i] for i in kept], [rows[i] for i in kept]
    seen: dict[str, dict[Value, int]] = {}
    for point in points:
        for name, value in point.items():
            of = seen.setdefault(name, {})
            of.setdefault(value, len(of))
    codes = tuple((name, of) for name, of in sorted(seen.items()) if len(of) > 1)
    coded, losses = _coded(points, codes), np.array(rows)
    return Learned(tuple(surrogate.fit(coded, losses[:, d])[0] for d in range(losses.shape[1])), codes)


def _coded(points: Sequence[Mapping[str, Value]], codes: Sequence[tuple[str, Mapping[Value, int]]]) -> Any:
    """Return i64[P,K]; a value that was never seen, or a knob that is absent, differs from all that were."""
    rows = [[of.get(point[name], -1) if name in point else -1 for name, of in codes] for point in points]
    return np.array(rows, dtype=np.int64).reshape(len(points), len(codes))


# --- how good a prediction is ------------------------------------------------------------------------------------


def kendall(predicted: Array, actual: Array) -> float:
    """Return Kendall's tau-b of two rankings f64[N]: 1 where they agree, 0 where they have nothing in common."""
    a = np.sign(predicted[:, None] - predicted[None, :])
    b = np.sign(actual[:, None] - actual[None, :])
    scale = np.sqrt(float((a * a).sum()) * float((b * b).sum()))
    return float((a * b).sum() / scale) if scale else 0.0


def regret(predicted: Array, actual: Array, k: int) -> float:
    """Return how far the best of the k points predicted best is from the best of all; losses are logarithms.

    0.1 means: about a tenth slower than if everything had been measured.
    """
    chosen = np.argsort(predicted, kind="stable")[:k]
    return float(np.exp(actual[chosen].min() - actual.min()) - 1)
