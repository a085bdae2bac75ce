"""Recorded exhaustive studies, and searches replayed on them: they evaluate a change of the search without a device.

A study is a file of JSON lines, gzipped, written by `scripts/bench/record.py`: a header, then one line for each point
of a grid with its readings, raw samples, failure and the seconds it took to import, compile and measure.
"""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from llmbuild.search.hypervolume import hypervolume, nondominated
from llmbuild.search.losses import Interest, Losses, interest, loss
from llmbuild.search.study import Study
from llmbuild.search.surrogate import Array
from llmbuild.search.transfer import Lesson
from llmbuild.spec.slo import parse_bound
from llmbuild.spec.space import Condition, Knob, Point, Space
from llmbuild.system.strict_json import JsonObject

RUN_TIME = ("driver", "workers")


@dataclass(frozen=True)
class Recorded:
    """One point: losses in the order of the study's objectives (absent where infeasible), and its costs.

    `program`, `build` and `run` name the import, the compile and the executable with its settings: a search pays once
    for each that points share.
    """

    point: Point
    losses: Losses | None
    samples: Mapping[str, tuple[float, ...]]
    features: Mapping[str, float]
    program: str
    build: str
    run: str
    import_s: float
    compile_s: float
    measure_s: float


@dataclass(frozen=True, eq=False)
class RecordedStudy:
    """Every point of a grid on one machine. `space` has the knobs that vary; point 0 may lie outside their domains."""

    name: str
    machine: str
    objectives: tuple[str, ...]
    interest: Interest
    space: Space
    rows: Mapping[Point, Recorded]
    repeats: tuple[Mapping[str, tuple[float, ...]], ...]

    @property
    def reference(self) -> Array:
        """The reference point of the volume, f64[D]: 1.5 times point 0's losses, for quality its bound."""
        zero = self.rows[self.space.default()].losses
        assert zero is not None
        return np.array([reach.of(z) for reach, z in zip(self.interest, zero, strict=True)])

    @property
    def distinct(self) -> int:
        """The number of evaluations of all points: those with equal executables and settings count once."""
        return len({row.run for row in self.rows.values()})

    @property
    def whole(self) -> float:
        """The volume of the front of all points."""
        return volume([r.losses for r in self.rows.values()], self.reference)

    @property
    def lesson(self) -> Lesson:
        """The lesson that other studies can learn from it."""
        return Lesson(self.objectives, self.space.default(), {p: row.losses for p, row in self.rows.items()})

    def front(self) -> list[Point]:
        """Return the points of the front, in the order of the file."""
        feasible = {p: r.losses for p, r in self.rows.items() if r.losses is not None}
        best = {tuple(row) for row in nondominated(np.array(list(feasible.values())))}
        return [p for p, losses in feasible.items() if losses in best]


def volume(losses: Sequence[Losses | None], reference: Array) -> float:
    """Return the volume of the front of the feasible points."""
    rows = np.array([y for y in losses if y is not None], dtype=np.float64).reshape(-1, len(reference))
    return hypervolume(rows, reference)


def read(path: Path) -> RecordedStudy:
    """Return the study of a file.

    Raises:
        ValueError: not a study, or without point 0.
    """
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    head, bodies = json.loads(lines[0]), [json.loads(line) for line in lines[1:]]
    space = Space(_knobs(head["knobs"]))
    objectives, bounds = tuple(head["objectives"]), [parse_bound(text) for text in head["bounds"]]
    runs: dict[str, list[JsonObject]] = defaultdict(list)
    for body in bodies:
        runs[_run(body)].append(body)
    rows = {}
    for run, equal in runs.items():
        pooled = _pooled(equal)
        infeasible = any(body["failure"] for body in equal) or any(not b.holds(pooled.get(b.metric)) for b in bounds)
        losses = None if infeasible else tuple(loss(name, pooled[name]) for name in objectives)
        rows.update({Point.of(body["point"]): _recorded(run, losses, body) for body in equal})
    if space.default() not in rows:
        raise ValueError(f"{path}: the study misses point 0")
    repeats = tuple(_samples(r) for r in head["baseline_repeats"])
    return RecordedStudy(head["study"], head["machine"], objectives, interest(objectives, bounds), space, rows, repeats)


def _run(body: JsonObject) -> str:
    """Return the measured unit: an artifact with its settings; a point without an artifact is its own unit."""
    made = [body["artifact"], body["import"]] if body["artifact"] else [body["point"]]
    return json.dumps([*made, *(body["point"].get(k) for k in RUN_TIME)], sort_keys=True)


def _pooled(equal: Sequence[JsonObject]) -> JsonObject:
    """Return the readings of points with equal executables and settings: medians over the samples of all of them."""
    samples: dict[str, list[float]] = defaultdict(list)
    for body in equal:
        for name, values in body["samples"].items():
            samples[name] += values
    return {**equal[0], **{name: median(values) for name, values in samples.items()}}


def _recorded(run: str, losses: Losses | None, body: JsonObject) -> Recorded:
    sizes = {k: float(body[k] or 0) for k in ("artifact_bytes", "parameter_bytes")}
    return Recorded(
        point=Point.of(body["point"]),
        losses=losses,
        samples=_samples(body["samples"]),
        features={**(body["features"] or {}), **sizes},
        program=body["import"],
        build=json.dumps({k: v for k, v in body["point"].items() if k not in RUN_TIME}, sort_keys=True),
        run=run,
        import_s=body["import_s"],
        compile_s=body["compile_s"],
        measure_s=body["measure_s"],
    )


def _samples(body: Mapping[str, Sequence[float]]) -> dict[str, tuple[float, ...]]:
    return {name: tuple(values) for name, values in body.items()}


def _knobs(bodies: Sequence[JsonObject]) -> tuple[Knob, ...]:
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
    """One replayed search: after each unique evaluation, the share of the whole volume and the elapsed seconds."""

    shares: tuple[float, ...]
    seconds: tuple[float, ...]

    def evaluations_to(self, share: float) -> int | None:
        """Return the number of evaluations that reached a share; None if the share was not reached."""
        return next((n for n, s in enumerate(self.shares, 1) if s >= share), None)

    def seconds_to(self, share: float) -> float | None:
        """Return the seconds after which a share was reached."""
        reached = self.evaluations_to(share)
        return None if reached is None else self.seconds[reached - 1]


def replay(study: RecordedStudy, search: Study, budget: int, until: float = 2.0, known: bool = True) -> Run:
    """Let a search run on a recorded study for at most `budget` evaluations, or until a share is reached.

    Results come from the recording; the first point that needs an import or a compile pays for it. A point whose
    executable was measured under the same settings gets that reading and is not an evaluation, as in a build; unless
    equal executables are not `known` as such.
    """
    reference, whole = study.reference, study.whole
    front = np.empty((0, len(reference)))
    paid: set[str] = set()
    measured: dict[str, Losses | None] = {}
    shares: list[float] = []
    seconds: list[float] = []
    spent, reached = 0.0, 0.0
    while len(shares) < budget and reached < until:
        point = search.ask()
        if point is None:
            break
        row = study.rows.get(point)
        if row is None:  # a point of the grid that was not recorded
            search.tell(point, None)
            continue
        spent += 0.0 if row.program in paid else row.import_s
        spent += 0.0 if row.build in paid else row.compile_s
        paid |= {row.program, row.build}
        if known and row.run in measured:
            search.tell(point, measured[row.run])
            continue
        measured[row.run] = row.losses
        spent += row.measure_s
        if row.losses is not None and not (front <= np.array(row.losses)).all(-1).any():
            front = nondominated(np.vstack([front, row.losses]))
            reached = hypervolume(front, reference) / whole
        search.tell(point, row.losses)
        shares.append(reached)
        seconds.append(spent)
    return Run(tuple(shares), tuple(seconds))
