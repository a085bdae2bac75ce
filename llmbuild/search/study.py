"""Which point to try next. The catalog is the one memory: a study is rebuilt from its trials each time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from llmbuild.search.front import FLOORS, missed, value_of
from llmbuild.search.gpu_knobs import FIRST, GPU_DRIVERS
from llmbuild.search.samplers import Interest, Losses, Model, Reach, Sampler
from llmbuild.search.transfer import Lesson, prior
from llmbuild.spec.measurement import SCREENED
from llmbuild.spec.slo import METRICS, Bound
from llmbuild.spec.space import Point, Space, Value
from llmbuild.spec.trial import Trial

_OWN: dict[str, Value] = {
    "weight_format": "int8",
    "scaling": "activation",
    "layout": "packed",
    "kernel": "own",
    "opt_level": "O2",
}

_OWN_INT4: dict[str, Value] = {**_OWN, "weight_format": "int4_g128", "head_format": "int8", "quantization": "gptq"}
_SYNC: dict[str, Value] = {"driver": "local-sync"}

EXPERIENCE: tuple[dict[str, Value], ...] = (
    _OWN,
    {**_OWN, **_SYNC},
    {**_OWN, "weight_format": "f16", **_SYNC},
    {**_OWN, "weight_format": "f16"},
    _OWN_INT4,
    {**_OWN_INT4, **_SYNC},
)
"""Points that did well on other models and hosts, asked about right after point 0.

Neighbours that share an import follow each other, for an import costs the most.
"""

WITHOUT_OWN: tuple[dict[str, Value], ...] = (
    {},
    {"weight_format": "f16", "layout": "packed", "opt_level": "O2", **_SYNC},
    {"opt_level": "O2", "data_tiling": "dispatch"},
)
"""The same where there is no kernel of ours."""

DISPENSABLE = ("scaling",)
"""Knobs whose value a point of experience goes without where the space lacks it."""

STORED = ("weight_format", "head_format", "quantization", "kv_dtype")
"""Knobs that are pinned for what is to be stored: a point of experience takes a pin of them in place of its own."""


class Opened:
    """A sampler behind points that are asked about first."""

    def __init__(self, openers: Iterable[Point], sampler: Sampler) -> None:
        self._first, self._sampler = iter(openers), sampler
        self._known: set[Point] = set()

    def ask(self) -> Point | None:
        """Return the next opener that is not known, then what the sampler asks about."""
        for point in self._first:
            if point not in self._known:
                self._known.add(point)
                return point
        while (asked := self._sampler.ask()) is not None:
            if asked not in self._known:
                self._known.add(asked)
                return asked
        return None

    def tell(self, point: Point, losses: Losses | None) -> None:
        """Take in what came of a point."""
        self._known.add(point)
        self._sampler.tell(point, losses)


class Study:
    """Ask for points that are not known yet; tell what came of them.

    `bounds` are what a variant must meet: one that breaks a bound is as infeasible as one that failed. `related` are
    points of the fronts of other models and targets, asked about right after point 0; `lessons` are what was measured
    there, which the model of this one's points starts from.
    """

    def __init__(
        self,
        space: Space,
        objectives: Sequence[str],
        seed: int,
        known: Sequence[Trial],
        bounds: Sequence[Bound] = (),
        related: Sequence[Point] = (),
        lessons: Sequence[Lesson] = (),
    ) -> None:
        self.space, self.objectives, self.bounds = space, tuple(objectives), tuple(bounds)
        reach = interest(self.objectives, self.bounds)
        self._sampler = best(space, self.objectives, reach, seed, lessons, [p.as_dict() for p in related])
        for trial in known:
            self.tell(trial)

    def ask(self) -> Point | None:
        """Return a point never tried: point 0, what did well elsewhere, then the sampler's; None when all are known."""
        return self._sampler.ask()

    def tell(self, trial: Trial) -> None:
        """Take in what came of a point; a failure or a broken bound is a constraint, never a bad number."""
        self._sampler.tell(trial.point, losses_of(trial, self.objectives, self.bounds))

    def refuse(self, point: Point) -> None:
        """Take in that a point cannot meet the bounds, which its sizes alone told."""
        self._sampler.tell(point, None)


def best(
    space: Space,
    objectives: Sequence[str],
    reach: Interest,
    seed: int,
    lessons: Sequence[Lesson] = (),
    related: Sequence[dict[str, Value]] = (),
) -> Sampler:
    """Return the search that did best on recorded studies (`scripts/bench/search.py`).

    After point 0 and what did well elsewhere, a model of the points so far asks; before it has seen any it expects what
    the lessons and the sizes of formats say.
    """
    return Opened(openers(space, related), Model(space, reach, seed, prior(lessons, objectives)))


def lesson(trials: Sequence[Trial], objectives: Sequence[str]) -> Lesson | None:
    """Return what trials of another model or target teach about these objectives; None without a point 0."""
    zero = next((t.point for t in trials if t.is_default), None)
    told = [t for t in trials if t.measurements]
    names = tuple(n for n in objectives if all(value_of(t, t.measurements[0], n) is not None for t in told))
    return None if zero is None or not names else Lesson(names, zero, {t.point: losses_of(t, names) for t in trials})


def interest(objectives: Sequence[str], bounds: Sequence[Bound] = ()) -> Interest:
    """Return how bad each objective may be to be of interest: up to its bound, else half as bad again as point 0.

    Quality without a bound may go as far as `POOR`, for point 0 has the best there is.
    """
    limits = {**POOR, **{bound.metric: bound.limit for bound in bounds}}
    return tuple(
        Reach(value=loss(name, limits[name])) if name in limits and name in POOR else Reach(beyond=math.log(WORSE))
        for name in objectives
    )


def loss(metric: str, value: float) -> float:
    """Return a metric as something to minimize, on a log scale; below its floor nothing can be told apart."""
    sign = 1.0 if METRICS[metric].direction == "min" else -1.0
    return sign * math.log(max(value, FLOORS.get(metric, 1e-9)))


def losses_of(trial: Trial, objectives: Sequence[str], bounds: Sequence[Bound] = ()) -> Losses | None:
    """Return the objectives, minimized and on a log scale where positive; None for what failed or breaks a bound.

    A metric that is absent counts the same everywhere, so that it decides nothing; where only the short screen left it
    out, the point is told as one that leads nowhere.
    """
    if trial.failure is not None or not trial.measurements or missed(trial, trial.measurements[0], bounds):
        return None
    unscored = "quality" in trial.measurements[0].notes and any(name.startswith("quality_") for name in objectives)
    if unscored and SCREENED in trial.measurements[0].notes:
        return None
    losses = []
    for name in objectives:
        found = value_of(trial, trial.measurements[0], name)
        losses.append(0.0 if found is None else loss(name, found))
    return tuple(losses)


WORSE = 1.5
"""How many times a metric of point 0 is still of interest; what is worse is no trade anyone asked for."""

POOR = {"quality_kl": 0.5, "quality_top1": 0.5}
"""Where quality ends to be of interest when no bound says so."""

RELATED = 6
"""Points of related fronts that are asked about first, at most."""


def _experience(domains: Mapping[str, Sequence[Value]]) -> Sequence[dict[str, Value]]:
    """Return the points to begin with where a space has these domains."""
    if set(domains.get("driver", ())) & set(GPU_DRIVERS):
        there = [{k: v for k, v in values.items() if v in domains.get(k, ())} for values in FIRST]
        return [values for values in there if "weight_format" in values]
    return EXPERIENCE if "own" in domains.get("kernel", ()) else WITHOUT_OWN


def openers(space: Space, related: Sequence[dict[str, Value]] = ()) -> list[Point]:
    """Return what is tried before a sampler knows anything: point 0, then what did well on related models and targets,
    then experience, as far as the space allows each, and what the space itself says where it is narrowed.

    All but point 0 have every pin of the space.
    """
    default = space.default()
    domains = {k.name: k.domain for k in space.knobs}
    settled = {name: default[name] if default[name] in domain else domain[0] for name, domain in domains.items()}
    pinned = {name: settled[name] for name in STORED if name in domains and default[name] not in domains[name]}
    points = [default]
    for values in (*related[:RELATED], *_experience(domains), {}):
        said = {k: v if v in domains.get(k, ()) else pinned.get(k, v) for k, v in values.items()}
        wanted = {k: v for k, v in said.items() if k in domains and (k not in DISPENSABLE or v in domains[k])}
        point = space.complete({**settled, **wanted})
        if all(point[name] in domain or point[name] == default[name] for name, domain in domains.items()):
            points.append(point)
    return list(dict.fromkeys(points))
