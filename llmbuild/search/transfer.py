"""A learned cost model: predictions from other models' studies for points of this one, before they are compiled.

A build learns from the other models and targets in its catalog, and from studies that ship with the package
(`warm_start.json.gz`, written by `scripts/bench/record.py teach`). Losses are relative to those of point 0, so that
models of different size share a scale: the gain of a choice. The model is the process of `surrogate` over the knobs,
on the points of all other studies together.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np

from llmbuild.search import surrogate
from llmbuild.search.front import FLOORS, value_of
from llmbuild.search.losses import Losses, losses_of
from llmbuild.search.surrogate import Array, Codes, Process
from llmbuild.spec.formats import bits, in_panels
from llmbuild.spec.space import Point, Value
from llmbuild.spec.trial import Trial
from llmbuild.system.strict_json import JsonObject

SHIPPED = "warm_start.json.gz"

LEAST = 8
"""Feasible points below which no model is learned."""

MOST = 250
"""Maximum number of points of other studies: fitting takes the cube of their number."""


@dataclass(frozen=True)
class Lesson:
    """A study to learn from: its objectives, its point 0, and the losses of each point in the objectives' order."""

    objectives: tuple[str, ...]
    zero: Point
    losses: Mapping[Point, Losses | None]


def lesson(trials: Sequence[Trial], objectives: Sequence[str]) -> Lesson | None:
    """Return the lesson of another model's or target's trials for these objectives; None without a point 0."""
    zero = next((t.point for t in trials if t.is_default), None)
    told = [t for t in trials if t.measurements]
    names = tuple(n for n in objectives if all(value_of(t, t.measurements[0], n) is not None for t in told))
    return None if zero is None or not names else Lesson(names, zero, {t.point: losses_of(t, names) for t in trials})


@dataclass(frozen=True)
class Learned:
    """One process for each objective, and the numbers of the values in its data."""

    processes: Mapping[str, Process]
    codes: tuple[tuple[str, Mapping[Value, int]], ...]

    def saw(self, knob: str, value: Value) -> bool:
        """Return whether some study had this choice."""
        return value in dict(self.codes).get(knob, {})

    def predict(self, points: Sequence[Point], objectives: Sequence[str]) -> Array:
        """Return f64[P,D]: losses relative to those of point 0; 0 for an objective that no study had."""
        rows = _coded([p.as_dict() for p in points], self.codes)
        unknown = np.zeros(len(points))
        told = [self.processes[n].predict(rows)[0] if n in self.processes else unknown for n in objectives]
        return np.stack(told, -1)


def learn(lessons: Sequence[Lesson]) -> Learned | None:
    """Return the model of the studies' common effects; None where none has a feasible point 0 and some more points."""
    rows = [row for lesson in lessons for row in _relative(lesson)]
    if len(rows) < LEAST:
        return None
    if len(rows) > MOST:
        rows = [rows[i] for i in np.random.default_rng(0).choice(len(rows), MOST, replace=False)]
    seen: dict[str, dict[Value, int]] = {}
    for values, _ in rows:
        for name, value in values.items():
            of = seen.setdefault(name, {})
            of.setdefault(value, len(of))
    codes = tuple((name, of) for name, of in sorted(seen.items()) if len(of) > 1)
    processes = {}
    for name in dict.fromkeys(name for _, losses in rows for name in losses):
        known = [(values, losses[name]) for values, losses in rows if name in losses]
        coded = _coded([values for values, _ in known], codes)
        processes[name] = surrogate.fit(coded, np.array([loss for _, loss in known]))[0]
    return Learned(processes, codes)


def shipped(backend: str) -> list[Lesson]:
    """Return the lessons that ship with the package, all measured on CPUs."""
    if backend != "llvm-cpu":
        return []
    data = files("llmbuild.search").joinpath(SHIPPED).read_bytes()
    return [unpacked(body) for body in json.loads(gzip.decompress(data))]


def packed(name: str, lesson: Lesson) -> dict[str, object]:
    """Return a lesson as JSON: choices as rows over the names of the knobs, losses in five digits."""
    names = sorted({name for point in lesson.losses for name in point.as_dict()})
    points = [
        [[p[n] for n in names], None if y is None else [float(f"{v:.5g}") for v in y]] for p, y in lesson.losses.items()
    ]
    zero = [lesson.zero[n] for n in names]
    return {"study": name, "objectives": lesson.objectives, "knobs": names, "zero": zero, "points": points}


def unpacked(body: JsonObject) -> Lesson:
    """Return the lesson that `packed` made."""

    def point(values: Sequence[Value]) -> Point:
        return Point.of(dict(zip(body["knobs"], values, strict=True)))

    losses = {point(values): None if y is None else tuple(y) for values, y in body["points"]}
    return Lesson(tuple(body["objectives"]), point(body["zero"]), losses)


def prior(lessons: Sequence[Lesson], objectives: Sequence[str]) -> Callable[[Sequence[Point]], Array]:
    """Return the prior of unmeasured points: losses f64[P,D] relative to those of point 0.

    The lessons' predictions come first; sizes and quality of a weight format without a lesson follow from its bits.
    They are learned when a point is first asked for: a build that tries its first points alone, or only races, does
    not take that second.
    """
    known = cache(lambda: learn(lessons))

    def told(points: Sequence[Point]) -> Array:
        learned = known()
        expected = learned.predict(points, objectives) if learned else np.zeros((len(points), len(objectives)))
        for d, name in enumerate(objectives):
            for row, point in zip(expected, points, strict=True):
                choices = point.as_dict()
                form = str(choices.get(FORMAT, "f32"))
                if name in ARITHMETIC and not (learned and name in learned.processes and learned.saw(FORMAT, form)):
                    row[d] = ARITHMETIC[name](form, in_panels(choices))
        return expected

    return told


def _size(form: str, panels: bool) -> float:
    return float(np.log(bits(form, panels) / 32))


def _divergence(form: str, _: bool) -> float:
    known = sorted(KL_AT)
    return float(np.interp(bits(form), known, [np.log(KL_AT[n] / FLOORS["quality_kl"]) for n in known]))


FORMAT = "weight_format"
KL_AT = {2.25: 0.36, 4.0: 2e-2, 8.0: 1e-3, 12.0: FLOORS["quality_kl"]}
"""KL divergence by bits of a weight, from `scripts/bench/quality.py`; values between are interpolated. With codes of 2
bits it is 18 times that with 4 (SmolLM2-135M-Instruct, rounded to the nearest).
"""

ARITHMETIC: dict[str, Callable[[str, bool], float]] = {"parameter_bytes": _size, "quality_kl": _divergence}


def _relative(lesson: Lesson) -> list[tuple[dict[str, Value], dict[str, float]]]:
    """Return the choices of each feasible point, and its losses relative to point 0 by objective."""
    base = lesson.losses.get(lesson.zero)
    if base is None:
        return []
    feasible = [(p, y) for p, y in lesson.losses.items() if y is not None]
    return [
        (p.as_dict(), dict(zip(lesson.objectives, np.subtract(y, base).tolist(), strict=True))) for p, y in feasible
    ]


def _coded(points: Sequence[Mapping[str, Value]], codes: Sequence[tuple[str, Mapping[Value, int]]]) -> Codes:
    """Return i64[P,K]; an unseen value, or an absent knob, differs from all seen values."""
    rows = [[of.get(point[name], -1) if name in point else -1 for name, of in codes] for point in points]
    return np.array(rows, dtype=np.int64).reshape(len(points), len(codes))


# --- how good a prediction is ------------------------------------------------------------------------------------


def regret(predicted: Array, actual: Array, k: int) -> float:
    """Return the distance from the best of the k best predictions to the best of all; losses are logarithms.

    0.1 means: about a tenth slower than the best of all points.
    """
    chosen = np.argsort(predicted, kind="stable")[:k]
    return float(np.exp(actual[chosen].min() - actual.min()) - 1)
