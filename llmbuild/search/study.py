"""The search as an Optuna study, run by ask and tell; a study is rebuilt from the catalog and keeps no other state."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from llmbuild.search.candidates import Candidates
from llmbuild.search.losses import Interest, Losses, interest, losses_of
from llmbuild.search.sampler import FEASIBLE, POINT, FrontSampler
from llmbuild.search.transfer import Lesson, prior
from llmbuild.search.warm_start import initial_points
from llmbuild.spec.recipe import AUTO
from llmbuild.spec.slo import Bound
from llmbuild.spec.space import Knob, Point, Space, Value
from llmbuild.spec.trial import Trial

FAILED = 20.0
"""The value of a failure besides its constraint, for samplers that rank values alone: worse than any logarithm."""

REPEATS = 25
"""Number of successive asks for known points after which an unknown one is drawn at random."""

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Study:
    """Points of a space by an Optuna sampler; a repeated ask is answered from memory at no cost.

    `initial` points are tried first. The study's values are losses, minimized.
    """

    def __init__(
        self, space: Space, objectives: Sequence[str], sampler: BaseSampler, seed: int, initial: Sequence[Point] = ()
    ) -> None:
        self.space, self.objectives = space, tuple(objectives)
        self.study = optuna.create_study(directions=["minimize"] * len(self.objectives), sampler=sampler)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self.study.set_metric_names(list(self.objectives))
        self._candidates = Candidates(space, random.Random(seed))
        self._results: dict[Point, Losses | None] = {}
        self._under_way: dict[Point, optuna.Trial] = {}
        for point in initial:
            self.study.enqueue_trial(params_of(space, point), {POINT: point.as_dict()})

    def ask(self) -> Point | None:
        """Return an untried point: an initial point, then the sampler's; None when every one is known."""
        asked = 0
        while asked < REPEATS:
            trial = self.study.ask()
            initial = POINT in trial.user_attrs
            point = self._suggested(trial)
            if point not in self._results and point not in self._under_way:
                return self._started(point, trial)
            if initial:
                self.study.tell(trial, state=optuna.trial.TrialState.FAIL)  # its result is known already
            else:
                self._answer(trial, point)
                asked += 1
        found = self._candidates.any({*self._results, *self._under_way})
        if found is None:
            return None
        self.study.enqueue_trial(params_of(self.space, found), {POINT: found.as_dict()})
        trial = self.study.ask()
        return self._started(self._suggested(trial), trial)

    def tell(self, point: Point, losses: Losses | None) -> None:
        """Add the result of a point; None, a failure or a broken bound, is a constraint, never a bad value."""
        self._results[point] = losses
        values = [FAILED] * len(self.objectives) if losses is None else list(losses)
        trial = self._under_way.pop(point, None)
        if trial is None:
            self.study.add_trial(_known(self.space, point, values, losses is not None))
            return
        trial.set_constraint(FEASIBLE, _constraint(losses))
        self.study.tell(trial, values)

    def _started(self, point: Point, trial: optuna.Trial) -> Point:
        trial.set_user_attr(POINT, point.as_dict())
        self._under_way[point] = trial
        return point

    def _suggested(self, trial: optuna.Trial) -> Point:
        """Return the point of a trial, each active knob that varies suggested by the sampler."""
        fixed = trial.user_attrs.get(POINT)
        chosen: dict[str, Value] = {}
        for knob in self.space.knobs:
            active = self.space.active(knob, fixed or chosen)
            if fixed and fixed[knob.name] not in knob.domain:
                chosen[knob.name] = fixed[knob.name]  # point 0 may lie outside the pinned space
            elif len(knob.domain) == 1 or not active:
                chosen[knob.name] = knob.domain[0] if active else knob.default
            else:
                chosen[knob.name] = cast(Value, trial.suggest_categorical(knob.name, knob.domain))
        return Point.of(fixed) if fixed else self.space.complete(chosen)

    def _answer(self, trial: optuna.Trial, point: Point) -> None:
        """Answer a repeated ask from the known results; a point in progress counts as failed for the sampler."""
        if point not in self._results:
            self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
            return
        losses = self._results[point]
        trial.set_user_attr(POINT, point.as_dict())
        trial.set_constraint(FEASIBLE, _constraint(losses))
        self.study.tell(trial, [FAILED] * len(self.objectives) if losses is None else list(losses))


def _constraint(losses: Losses | None) -> float:
    return 1.0 if losses is None else -1.0


def params_of(space: Space, point: Point) -> dict[str, Value]:
    """Return the values of a point that are its trial's parameters: those of active knobs that vary."""
    values = point.as_dict()
    return {k.name: values[k.name] for k in _varying(space, values)}


def _varying(space: Space, values: Mapping[str, Value]) -> list[Knob]:
    varying = [k for k in space.knobs if len(k.domain) > 1 and space.active(k, values)]
    return [k for k in varying if values[k.name] in k.domain]


def _known(space: Space, point: Point, values: Sequence[float], feasible: bool) -> FrozenTrial:
    names: dict[str, BaseDistribution] = {
        k.name: CategoricalDistribution(k.domain) for k in _varying(space, point.as_dict())
    }
    return optuna.trial.create_trial(
        params=params_of(space, point),
        distributions=names,
        values=values,
        user_attrs={POINT: point.as_dict()},
        constraints={FEASIBLE: -1.0 if feasible else 1.0},
    )


def sampler_of(
    name: str, space: Space, objectives: Sequence[str], reach: Interest, seed: int, lessons: Sequence[Lesson] = ()
) -> BaseSampler:
    """Return a sampler by its name in recipes and `--sampler`.

    `gp` is llmbuild's, a Gaussian process over choices; the others are Optuna's. `auto` is `AUTO`, which needs the
    fewest evaluations on recorded studies (`scripts/bench/search.py`): before its first point it uses the lessons and
    the sizes of formats as its prior.
    """
    made: dict[str, Callable[[], BaseSampler]] = {
        "gp": lambda: FrontSampler(space, reach, seed, prior(lessons, objectives)),
        "tpe": lambda: _tpe(seed),
        "nsga2": lambda: optuna.samplers.NSGAIISampler(seed=seed),
        "random": lambda: optuna.samplers.RandomSampler(seed=seed),
    }
    return made[AUTO if name == "auto" else name]()


def _tpe(seed: int) -> BaseSampler:
    with warnings.catch_warnings():  # `group` is marked experimental; it makes conditional knobs joint
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, n_startup_trials=8)


class TrialStudy:
    """The study of a job: ask for unknown points; tell their results.

    `bounds` apply to each variant: one that breaks a bound is as infeasible as a failed one. `related` are points of
    the fronts of other models and targets, tried right after point 0; `lessons` are their measurements, which the
    sampler starts from.
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
        sampler: str = "auto",
    ) -> None:
        self.space, self.objectives, self.bounds = space, tuple(objectives), tuple(bounds)
        reach = interest(self.objectives, self.bounds)
        chosen = sampler_of(sampler, space, self.objectives, reach, seed, lessons)
        initial = initial_points(space, [p.as_dict() for p in related])
        self.points = Study(space, self.objectives, chosen, seed, initial)
        for trial in known:
            self.tell(trial)

    def ask(self) -> Point | None:
        """Return an untried point: point 0, the related points, then the sampler's; None when all are known."""
        return self.points.ask()

    def tell(self, trial: Trial) -> None:
        """Add the result of a point."""
        self.points.tell(trial.point, losses_of(trial, self.objectives, self.bounds))

    def refuse(self, point: Point) -> None:
        """Add that a point cannot meet the bounds, known from its sizes alone."""
        self.points.tell(point, None)
