"""llmbuild's Optuna sampler: it picks the point with the largest expected gain in the front's volume.

It reads the trials of a study: their point (`POINT` of the user attributes), values and constraints. Values are
losses, logarithms where the metric is positive; lower is better.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from llmbuild.search import surrogate
from llmbuild.search.candidates import Candidates
from llmbuild.search.hypervolume import expected_gain, nondominated
from llmbuild.search.losses import Interest, Losses
from llmbuild.search.surrogate import Array, Codes
from llmbuild.spec.space import Point, Space, Value

Prior = Callable[[Sequence[Point]], Array]

POINT = "point"
"""The user attribute of a trial with every knob of its point, including those without a distribution."""

FEASIBLE = "feasible"
"""The constraint of a trial: above 0 where its point failed or breaks a bound."""


class FrontSampler(BaseSampler):
    """Picks the point with the largest expected gain in the front's volume, by a Gaussian process over choices.

    Independent processes predict the losses, and one more the feasibility of a point. Points in progress count with
    their expected losses. With a `prior`, which predicts losses f64[P,D] relative to point 0's from other studies, the
    processes model the prior's residuals.
    """

    MARGIN = 0.1
    """How far the reference lies beyond the worst loss of the front, in logarithms."""

    LEAST = 2
    """Feasible points below which a point is drawn at random: a process on fewer predicts nothing."""

    def __init__(self, space: Space, interest: Interest, seed: int, prior: Prior | None = None) -> None:
        self.space, self.interest, self.objectives, self.prior = space, interest, len(interest), prior
        self._random = random.Random(seed)
        self._candidates = Candidates(space, self._random)
        values = {k.name: dict.fromkeys((*k.domain, k.default)) for k in space.knobs}
        self._codes = {name: {v: i for i, v in enumerate(of)} for name, of in values.items() if len(of) > 1}
        self._parameters: dict[int, Array] = {}

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return the knobs that vary: all of them are sampled together."""
        return {k.name: CategoricalDistribution(k.domain) for k in self.space.knobs if len(k.domain) > 1}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Value]:
        """Return the most promising point that no trial of the study has; empty where all were tried."""
        if POINT in trial.user_attrs:  # an initial point: its values are fixed
            return {}
        told, under_way = _trials_of(study)
        point = self.choose(told, under_way)
        return {} if point is None else {name: value for name, value in point.values if name in search_space}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> object:
        """Return a random value: called only where no candidate is left."""
        assert isinstance(param_distribution, CategoricalDistribution)
        return self._random.choice(param_distribution.choices)

    def choose(self, told: Mapping[Point, Losses | None], under_way: Sequence[Point]) -> Point | None:
        """Return the most promising unevaluated point, from the losses of the evaluated ones, None for infeasible."""
        good = {p: losses for p, losses in told.items() if losses is not None}
        least = 1 if self.prior else self.LEAST
        if len(good) < least:
            return self._candidates.any({*told, *under_way})
        return self._best(good, told, under_way)

    def _best(
        self, good: Mapping[Point, Losses], told: Mapping[Point, Losses | None], under_way: Sequence[Point]
    ) -> Point | None:
        known = {*told, *under_way}
        losses = np.array(list(good.values()))
        front = nondominated(losses)
        rows = {tuple(row) for row in front}
        unknown = self._candidates.unknown(known, [p for p, y in good.items() if y in rows])
        if not unknown:
            return self._candidates.any(known)
        mean, spread = self._predict(list(good), losses, [*unknown, *under_way])
        reference = self._reference(front, good.get(self.space.default()))
        reached = thinned(np.vstack([front, mean[len(unknown) :]]))
        gain = expected_gain(mean[: len(unknown)], spread[: len(unknown)], reached, reference)
        gain = gain * self._feasible(told, self._coded(unknown))
        best = np.flatnonzero(gain >= gain.max() * (1 - 1e-9))
        return unknown[self._random.choice(best.tolist())]

    def _predict(self, known: Sequence[Point], losses: Array, asked: Sequence[Point]) -> tuple[Array, Array]:
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

    def _reference(self, front: Array, zero: Losses | None) -> Array:
        """Return the volume's reference f64[D]: the limits of interest; without point 0, just beyond the front."""
        if zero is None:
            return np.asarray(front.max(0) + self.MARGIN)
        return np.array([reach.of(z) for reach, z in zip(self.interest, zero, strict=True)])

    def _feasible(self, told: Mapping[Point, Losses | None], asked: Codes) -> Array:
        """Return the probability f64[P] that a point compiles, runs and breaks no bound."""
        labels = np.array([1.0 if losses is not None else 0.0 for losses in told.values()])
        if labels.all():
            return np.ones(len(asked))
        process, self._parameters[-1] = surrogate.fit(self._coded(list(told)), labels, self._parameters.get(-1))
        return np.clip(process.predict(asked)[0], 0.01, 1.0)

    def _coded(self, points: Sequence[Point]) -> Codes:
        """Return i64[P,K]: an index for each value of each knob with several values; a foreign value gets its own."""
        rows = []
        for point in points:
            values = point.as_dict()
            rows.append([code.setdefault(values[name], len(code)) for name, code in self._codes.items()])
        return np.array(rows, dtype=np.int64).reshape(len(points), len(self._codes))


def _trials_of(study: Study) -> tuple[dict[Point, Losses | None], list[Point]]:
    """Return the losses of the evaluated points, None for infeasible ones, and the points in progress."""
    told: dict[Point, Losses | None] = {}
    under_way = []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.RUNNING)):
        if POINT not in trial.user_attrs:
            continue  # the trial of the present ask
        point = Point.of(trial.user_attrs[POINT])
        if trial.state == TrialState.RUNNING:
            under_way.append(point)
        elif trial.constraints.get(FEASIBLE, 0.0) > 0:
            told[point] = None
        else:
            told[point] = tuple(trial.values)
    return told, under_way


CELLS = 6000
"""Maximum number of boxes that the volume beside a front is split into."""


def thinned(front: Array) -> Array:
    """Return a front f64[N,D] thinned so that the volume beside it can be split: its ends, and evenly between."""
    most = max(2, int(CELLS ** (1 / max(1, front.shape[1] - 1))))
    if len(front) <= most:
        return front
    ordered = front[np.argsort(front[:, 0])]
    return np.asarray(ordered[np.unique(np.linspace(0, len(front) - 1, most).round().astype(int))])
