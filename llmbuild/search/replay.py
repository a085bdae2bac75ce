"""Recorded exhaustive studies, and searches replayed on them: a change of the search is judged without a device.

A study is a file of JSON lines, gzipped, written by `scripts/bench/record.py`: a header, then one line for each point
of a grid with its readings, raw samples, failure and the seconds it took to import, compile and measure.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmbuild.search.hypervolume import hypervolume, nondominated
from llmbuild.search.samplers import Losses, Sampler
from llmbuild.spec.slo import METRICS, parse_bound
from llmbuild.spec.space import Condition, Knob, Point, Space

REFERENCE = math.log(1.5)
"""The volume reaches to losses half as much again as those of the compiler's defaults."""


@dataclass(frozen=True)
class Recorded:
    """One point: losses in the order of the study's objectives (absent where infeasible), and what it took.

    `build` and `program` name what it shares with others: a search pays for each of them once.
    """

    point: Point
    losses: Losses | None
    samples: Mapping[str, tuple[float, ...]]
    features: Mapping[str, float]
    program: str
    build: str
    import_s: float
    compile_s: float
    measure_s: float


@dataclass(frozen=True, eq=False)
class RecordedStudy:
    """Every point of a grid on one machine. `space` has the knobs that vary; point 0 may lie outside their domains."""

    name: str
    machine: str
    objectives: tuple[str, ...]
    space: Space
    rows: Mapping[Point, Recorded]
    repeats: tuple[Mapping[str, tuple[float, ...]], ...]

    @property
    def reference(self) -> Any:
        """Where the volume ends, f64[D]."""
        zero = self.rows[self.space.default()].losses
        assert zero is not None
        return np.array(zero) + REFERENCE

    @property
    def whole(self) -> float:
        """The volume of the front of all points."""
        return volume([r.losses for r in self.rows.values()], self.reference)

    def front(self) -> list[Point]:
        """Return the points of the front, in the order of the file."""
        feasible = {p: r.losses for p, r in self.rows.items() if r.losses is not None}
        best = {tuple(row) for row in nondominated(np.array(list(feasible.values())))}
        return [p for p, losses in feasible.items() if losses in best]


def volume(losses: Sequence[Losses | None], reference: Any) -> float:
    """Return the volume of the front of what is feasible."""
    rows = np.array([y for y in losses if y is not None], dtype=np.float64).reshape(-1, len(reference))
    return hypervolume(rows, reference)


def read(path: Path) -> RecordedStudy:
    """Return the study of a file.

    Raises:
        ValueError: it is no study, or misses point 0.
    """
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    head, bodies = json.loads(lines[0]), [json.loads(line) for line in lines[1:]]
    space = Space(_knobs(head["knobs"]))
    objectives, bounds = tuple(head["objectives"]), [parse_bound(text) for text in head["bounds"]]
    rows = {}
    for body in bodies:
        infeasible = body["failure"] or any(not b.holds(body.get(b.metric)) for b in bounds)
        losses = None if infeasible else tuple(_loss(name, body[name]) for name in objectives)
        point = Point.of(body["point"])
        rows[point] = _recorded(point, losses, body)
    if space.default() not in rows:
        raise ValueError(f"{path}: the study misses point 0")
    repeats = tuple(_samples(r) for r in head["baseline_repeats"])
    return RecordedStudy(head["study"], head["machine"], objectives, space, rows, repeats)


def _recorded(point: Point, losses: Losses | None, body: dict[str, Any]) -> Recorded:
    build = json.dumps({k: v for k, v in body["point"].items() if k not in ("driver", "workers")}, sort_keys=True)
    sizes = {k: float(body[k] or 0) for k in ("artifact_bytes", "parameter_bytes")}
    return Recorded(
        point=point,
        losses=losses,
        samples=_samples(body["samples"]),
        features={**(body["features"] or {}), **sizes},
        program=body["import"],
        build=build,
        import_s=body["import_s"],
        compile_s=body["compile_s"],
        measure_s=body["measure_s"],
    )


def _samples(body: Mapping[str, Sequence[float]]) -> dict[str, tuple[float, ...]]:
    return {name: tuple(values) for name, values in body.items()}


def _loss(metric: str, value: float) -> float:
    sign = 1.0 if METRICS[metric].direction == "min" else -1.0
    return sign * math.log(max(value, 1e-9))


def _knobs(bodies: Sequence[dict[str, Any]]) -> tuple[Knob, ...]:
    """Return the knobs of a header; a condition on a knob that does not vary always holds and is left out."""
    names = {body["name"] for body in bodies}
    return tuple(
        Knob(
            name=body["name"],
            level=body["level"],
            domain=tuple(body["domain"]),
            default=body["default"],
            meaning=body["meaning"],
            when=tuple(Condition(c["knob"], tuple(c["values"])) for c in body["when"] if c["knob"] in names),
        )
        for body in bodies
    )


# --- replay ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One replayed search: after each unique evaluation, the share of the whole volume and the seconds so far."""

    shares: tuple[float, ...]
    seconds: tuple[float, ...]

    def evaluations_to(self, share: float) -> int | None:
        """Return how many evaluations reached a share; None if none did."""
        return next((n for n, s in enumerate(self.shares, 1) if s >= share), None)

    def seconds_to(self, share: float) -> float | None:
        """Return the seconds after which a share was reached."""
        reached = self.evaluations_to(share)
        return None if reached is None else self.seconds[reached - 1]


def replay(study: RecordedStudy, sampler: Sampler, budget: int, until: float = 2.0) -> Run:
    """Let a sampler search a recorded study for at most `budget` evaluations, or until a share is reached.

    What was recorded answers; each import and each compile is paid for by the first point that needs it.
    """
    reference, whole = study.reference, study.whole
    front: list[Losses] = []
    paid: set[str] = set()
    shares: list[float] = []
    seconds: list[float] = []
    spent, reached = 0.0, 0.0
    while len(shares) < budget and reached < until:
        point = sampler.ask()
        if point is None:
            break
        row = study.rows.get(point)
        if row is None:  # a point of the grid that the recording never came to
            sampler.tell(point, None)
            continue
        spent += row.measure_s
        spent += 0.0 if row.program in paid else row.import_s
        spent += 0.0 if row.build in paid else row.compile_s
        paid |= {row.program, row.build}
        if row.losses is not None:
            front.append(row.losses)
            reached = volume(front, reference) / whole
        sampler.tell(point, row.losses)
        shares.append(reached)
        seconds.append(spent)
    return Run(tuple(shares), tuple(seconds))
