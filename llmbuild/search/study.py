"""Which point to try next. The catalog is the one memory: a study is rebuilt from its trials each time."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from llmbuild.search.front import value_of
from llmbuild.spec.slo import METRICS
from llmbuild.spec.space import Point, Space, Value
from llmbuild.spec.trial import Trial

if TYPE_CHECKING:
    import optuna

REPEATS = 25
"""Asks in a row that name a known point, after which an unknown one is drawn at random instead."""

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
    {"opt_level": "O3"},
    _OWN,
    {**_OWN, **_SYNC},
    {**_OWN, "weight_format": "f16"},
    {**_OWN, "weight_format": "f16", **_SYNC},
    {"opt_level": "O2", "data_tiling": "dispatch"},
    {"weight_format": "f16", "layout": "packed", "opt_level": "O2", **_SYNC},
    _OWN_INT4,
    {**_OWN_INT4, **_SYNC},
)
"""Points that did well on other models and hosts, asked about right after point 0.

Neighbours that share an import follow each other, for an import costs the most.
"""

DISPENSABLE = ("scaling",)
"""Knobs whose value a point of experience goes without where the space lacks it."""


class Study:
    """Ask for points that are not known yet; tell what came of them."""

    def __init__(self, space: Space, objectives: Sequence[str], seed: int, known: Sequence[Trial]) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.space, self.objectives = space, tuple(objectives)
        self._optuna = optuna
        self._random = random.Random(seed)
        with warnings.catch_warnings():  # `group` is marked experimental; it is what makes conditional knobs joint
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, n_startup_trials=8)
        self._study = optuna.create_study(directions=["minimize"] * len(self.objectives), sampler=sampler)
        self._known: set[Point] = set()
        self._results: dict[Point, tuple[list[float], float]] = {}
        for trial in known:
            self.tell(trial)
        self._first = iter(openers(space))

    def ask(self) -> Point | None:
        """Return a point never tried: point 0 first, then experience, then the sampler's; None when all are known."""
        for point in self._first:
            if point not in self._known:
                self._known.add(point)
                return point
        for _ in range(REPEATS):
            trial = self._study.ask()
            point = self._suggest(trial)
            if point not in self._known:
                self._known.add(point)
                self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)  # told anew, canonical, by `tell`
                return point
            self._answer(trial, point)
        return self._anything_left()

    def tell(self, trial: Trial) -> None:
        """Take in what came of a point; a failure is a broken constraint, never a bad number."""
        self._known.add(trial.point)
        values, violation = self._outcome(trial)
        self._results[trial.point] = (values, violation)
        distributions: dict[str, Any] = {
            k.name: self._optuna.distributions.CategoricalDistribution(k.domain)
            for k in self._asked(trial.point)
            if trial.point[k.name] in k.domain
        }
        frozen = self._optuna.trial.create_trial(
            params={name: trial.point[name] for name in distributions},
            distributions=distributions,
            values=values,
        )
        self._constrain(frozen, violation)
        self._study.add_trial(frozen)

    def _asked(self, point: Point) -> list[Any]:
        values = point.as_dict()
        return [k for k in self.space.knobs if self.space.active(k, values)]

    def _suggest(self, trial: optuna.Trial) -> Point:
        chosen: dict[str, Value] = {}
        for knob in self.space.knobs:
            if self.space.active(knob, chosen):
                chosen[knob.name] = cast(Value, trial.suggest_categorical(knob.name, knob.domain))
            else:
                chosen[knob.name] = knob.default
        return self.space.complete(chosen)

    def _answer(self, trial: optuna.Trial, point: Point) -> None:
        """Answer a repeated ask from what is known; a point still under way counts as failed for the sampler."""
        if point not in self._results:
            self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
            return
        values, violation = self._results[point]
        self._constrain(trial, violation)
        self._study.tell(trial, values)

    @staticmethod
    def _constrain(trial: Any, violation: float) -> None:
        trial.set_constraint("feasible", violation)

    def _outcome(self, trial: Trial) -> tuple[list[float], float]:
        """Return the objectives, minimized and on a log scale where positive, and the violation (<= 0: none)."""
        worst = [20.0] * len(self.objectives)
        if trial.failure is not None or not trial.measurements:
            return worst, 1.0
        values = []
        for name in self.objectives:
            found = value_of(trial, trial.measurements[0], name)
            if found is None:
                values.append(0.0)
                continue
            sign = 1.0 if METRICS[name].direction == "min" else -1.0
            values.append(sign * math.log(max(found, 1e-9)))
        return values, -1.0

    def _anything_left(self) -> Point | None:
        left = [p for p in self.space.points() if p not in self._known]
        if not left:
            return None
        point = self._random.choice(left)
        self._known.add(point)
        return point


def openers(space: Space) -> list[Point]:
    """Return what is tried before a sampler knows anything: point 0, then experience as far as the space allows it."""
    default = space.default()
    domains = {k.name: k.domain for k in space.knobs}
    settled = {name: default[name] if default[name] in domain else domain[0] for name, domain in domains.items()}
    points = [default]
    for values in ({}, *EXPERIENCE):
        wanted = {k: v for k, v in values.items() if k not in DISPENSABLE or v in domains[k]}
        point = space.complete({**settled, **wanted})
        if all(point[name] in domain or point[name] == default[name] for name, domain in domains.items()):
            points.append(point)
    return list(dict.fromkeys(points))
