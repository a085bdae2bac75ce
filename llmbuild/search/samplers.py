"""Ways to choose the next point, all behind one interface, so that a replay can compare them.

A sampler is told the losses of a point, logarithms where the metric is positive, lower is better; `None` says that it
could not be made or breaks a bound. It never asks for a point that it was told of or that it asked for before.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np

from llmbuild.search import surrogate
from llmbuild.search.candidates import Candidates
from llmbuild.search.hypervolume import expected_gain, nondominated
from llmbuild.spec.space import Point, Space, Value

Losses = tuple[float, ...]


@dataclass(frozen=True)
class Reach:
    """How large a loss may be to be of interest: so far beyond that of point 0, or a value of its own."""

    beyond: float = 0.0
    value: float | None = None

    def of(self, zero: float) -> float:
        """Return the largest loss of interest, given that of point 0."""
        return zero + self.beyond if self.value is None else self.value


Interest = tuple[Reach, ...]
Prior = Callable[[Sequence[Point]], Any]

FAILED = 20.0
"""What a sampler that knows no constraints is told of a failure: worse than any logarithm of seconds or bytes."""

REPEATS = 25
"""Asks in a row that name a known point, after which an unknown one is drawn at random instead."""


class Sampler(Protocol):
    """Asks and is told."""

    def ask(self) -> Point | None:
        """Return a point never tried, None when every one was."""
        ...

    def tell(self, point: Point, losses: Losses | None) -> None:
        """Take in what came of a point."""
        ...


class Random:
    """Every unknown point is as likely."""

    def __init__(self, space: Space, seed: int) -> None:
        self._candidates = Candidates(space, random.Random(seed))
        self._known: set[Point] = set()

    def ask(self) -> Point | None:
        """Return an unknown point."""
        point = self._candidates.any(self._known)
        if point is not None:
            self._known.add(point)
        return point

    def tell(self, point: Point, losses: Losses | None) -> None:
        """Remember that a point is known."""
        self._known.add(point)


class Model:
    """The point that is expected to add most to the front's volume, by a Gaussian process over choices.

    Independent processes predict the losses, and one more whether a point will be feasible. Points under way count as
    if they had come out as expected. With a `prior`, which predicts losses f64[P,D] relative to point 0's from other
    studies, the processes are about what it gets wrong.
    """

    MARGIN = 0.1
    """How far beyond the worst loss of the front the volume reaches, in logarithms."""

    LEAST = 2
    """Feasible points below which one is drawn at random: a process through fewer says nothing."""

    def __init__(self, space: Space, interest: Interest, seed: int, prior: Prior | None = None) -> None:
        self.space, self.interest, self.objectives, self.prior = space, interest, len(interest), prior
        self._random = random.Random(seed)
        self._candidates = Candidates(space, self._random)
        self._told: dict[Point, Losses | None] = {}
        self._under_way: dict[Point, None] = {}
        values = {k.name: dict.fromkeys((*k.domain, k.default)) for k in space.knobs}
        self._codes = {name: {v: i for i, v in enumerate(of)} for name, of in values.items() if len(of) > 1}
        self._parameters: dict[int, Any] = {}

    def tell(self, point: Point, losses: Losses | None) -> None:
        """Take in what came of a point."""
        self._under_way.pop(point, None)
        self._told[point] = losses

    def ask(self) -> Point | None:
        """Return the most promising unknown point."""
        good = {p: losses for p, losses in self._told.items() if losses is not None}
        least = 1 if self.prior else self.LEAST
        point = self._best(good) if len(good) >= least else self._candidates.any(self._known())
        if point is not None:
            self._under_way[point] = None
        return point

    def _known(self) -> set[Point]:
        return {*self._told, *self._under_way}

    def _best(self, good: dict[Point, Losses]) -> Point | None:
        losses = np.array(list(good.values()))
        front = nondominated(losses)
        rows = {tuple(row) for row in front}
        unknown = self._candidates.unknown(self._known(), [p for p, y in good.items() if y in rows])
        if not unknown:
            return self._candidates.any(self._known())
        waiting = list(self._under_way)
        mean, spread = self._predict(list(good), losses, [*unknown, *waiting])
        reference = self._reference(front, good.get(self.space.default()))
        reached = thinned(np.vstack([front, mean[len(unknown) :]]))
        gain = expected_gain(mean[: len(unknown)], spread[: len(unknown)], reached, reference)
        gain = gain * self._feasible(self._coded(unknown))
        best = np.flatnonzero(gain >= gain.max() * (1 - 1e-9))
        return unknown[self._random.choice(best.tolist())]

    def _predict(self, known: Sequence[Point], losses: Any, asked: Sequence[Point]) -> tuple[Any, Any]:
        means, spreads = [], []
        every = [*known, *asked]
        expected = self.prior(every) if self.prior else np.zeros((len(every), self.objectives))
        codes, rows = self._coded(asked), self._coded(known)
        for d in range(self.objectives):
            wrong = losses[:, d] - expected[: len(known), d]
            process, self._parameters[d] = surrogate.fit(rows, wrong, self._parameters.get(d))
            mean, spread = process.predict(codes)
            means.append(mean + expected[len(known) :, d])
            spreads.append(spread)
        return np.stack(means, -1), np.stack(spreads, -1)

    def _reference(self, front: Any, zero: Losses | None) -> Any:
        """Return where the volume ends, f64[D]: at what is of interest; without a point 0, a bit beyond the front."""
        if zero is None:
            return front.max(0) + self.MARGIN
        return np.array([reach.of(z) for reach, z in zip(self.interest, zero, strict=True)])

    def _feasible(self, asked: Any) -> Any:
        """Return the probability f64[P] that a point can be made and breaks no bound."""
        labels = np.array([1.0 if losses is not None else 0.0 for losses in self._told.values()])
        if labels.all():
            return np.ones(len(asked))
        process, self._parameters[-1] = surrogate.fit(self._coded(list(self._told)), labels, self._parameters.get(-1))
        return np.clip(process.predict(asked)[0], 0.01, 1.0)

    def _coded(self, points: Sequence[Point]) -> Any:
        """Return i64[P,K]: a number for each value of each knob that has several; one from elsewhere gets its own."""
        rows = []
        for point in points:
            values = point.as_dict()
            rows.append([code.setdefault(values[name], len(code)) for name, code in self._codes.items()])
        return np.array(rows, dtype=np.int64).reshape(len(points), len(self._codes))


CELLS = 6000
"""Boxes that the room beside a front is cut into, at most."""


def thinned(front: Any) -> Any:
    """Return a front f64[N,D] with so few rows that the room beside it can be cut up: its ends, and evenly between."""
    most = max(2, int(CELLS ** (1 / max(1, front.shape[1] - 1))))
    if len(front) <= most:
        return front
    ordered = front[np.argsort(front[:, 0])]
    return ordered[np.unique(np.linspace(0, len(front) - 1, most).round().astype(int))]


class Optuna:
    """One of Optuna's samplers, by its name here; what it asks twice is answered from memory and costs nothing."""

    def __init__(self, space: Space, objectives: int, seed: int, name: str = "tpe-multivariate") -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._optuna, self.space, self.objectives = optuna, space, objectives
        self._study = optuna.create_study(directions=["minimize"] * objectives, sampler=self._sampler(name, seed))
        self._candidates = Candidates(space, random.Random(seed))
        self._told: dict[Point, Losses | None] = {}
        self._under_way: set[Point] = set()

    def _sampler(self, name: str, seed: int) -> Any:
        made: Any = self._optuna.samplers
        with warnings.catch_warnings():  # `group` is marked experimental; it is what makes conditional knobs joint
            warnings.simplefilter("ignore", self._optuna.exceptions.ExperimentalWarning)
            if name == "default":
                return made.TPESampler(seed=seed)
            if name == "nsga2":
                return made.NSGAIISampler(seed=seed)
            if name == "gp":
                return made.GPSampler(seed=seed)
            return made.TPESampler(seed=seed, multivariate=True, group=True, n_startup_trials=8)

    def ask(self) -> Point | None:
        """Return the sampler's next new point."""
        for _ in range(REPEATS):
            trial = self._study.ask()
            point = self._suggest(trial)
            if point not in self._told and point not in self._under_way:
                self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)  # told anew, canonical, by `tell`
                self._under_way.add(point)
                return point
            self._answer(trial, point)
        found = self._candidates.any({*self._told, *self._under_way})
        if found is not None:
            self._under_way.add(found)
        return found

    def tell(self, point: Point, losses: Losses | None) -> None:
        """Take in what came of a point; a failure is a broken constraint, never a bad number."""
        self._under_way.discard(point)
        self._told[point] = losses
        values = point.as_dict()
        active = [k for k in self.space.knobs if len(k.domain) > 1 and self.space.active(k, values)]
        asked = [k for k in active if values[k.name] in k.domain]
        distributions: dict[str, Any] = {
            k.name: self._optuna.distributions.CategoricalDistribution(k.domain) for k in asked
        }
        frozen = self._optuna.trial.create_trial(
            params={name: values[name] for name in distributions},
            distributions=distributions,
            values=self._values(losses),
        )
        self._constrain(frozen, losses)
        self._study.add_trial(frozen)

    def _suggest(self, trial: Any) -> Point:
        chosen: dict[str, Value] = {}
        for knob in self.space.knobs:
            if len(knob.domain) == 1 or not self.space.active(knob, chosen):
                chosen[knob.name] = knob.domain[0] if self.space.active(knob, chosen) else knob.default
            else:
                chosen[knob.name] = cast(Value, trial.suggest_categorical(knob.name, knob.domain))
        return self.space.complete(chosen)

    def _answer(self, trial: Any, point: Point) -> None:
        """Answer a repeated ask from what is known; a point still under way counts as failed for the sampler."""
        if point not in self._told:
            self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
            return
        self._constrain(trial, self._told[point])
        self._study.tell(trial, self._values(self._told[point]))

    def _values(self, losses: Losses | None) -> list[float]:
        return [FAILED] * self.objectives if losses is None else list(losses)

    @staticmethod
    def _constrain(trial: Any, losses: Losses | None) -> None:
        trial.set_constraint("feasible", 1.0 if losses is None else -1.0)
