"""Fits a predictor of lengths: the median of log lengths by ridge regression, where long answers were cut.

Medians by iterated weights; of an answer that was cut only what lies below the cut counts (Powell, "Least absolute
deviations estimation for the censored regression model", 1984). How far answers lie from what is predicted is taken
from prompts that the fit did not see, as Kaplan and Meier take it where some are cut.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmbuild.errors import InputError
from llmbuild.serve.predict.features import BUCKETS, buckets
from llmbuild.serve.predict.model import LengthModel, Spread

LEAST, MOST = 40, 4096
"""Answers from which on a fit says something, and those that one takes at most, drawn at random."""
RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0)
FOLDS = 5
QUANTILES = 64
_ROUNDS, _SMALLEST, _NO_WEIGHT = 25, 0.05, 1e4
"""Rounds of weights, the distance below which a weight grows no more, and one at which it is next to none."""


@dataclass(frozen=True)
class Answered:
    """A prompt and the length of its answer; `cut` where it ended at the most tokens that it might have."""

    prompt: tuple[int, ...]
    tokens: int
    cut: bool = False
    group: str = ""
    """Prompts of one group are alike, such as those of one template."""
    tenant: str = ""


def fit(answers: Sequence[Answered], seed: int = 0, least: int = LEAST) -> LengthModel:
    """Return a model of answers.

    Raises:
        InputError: there are too few.
    """
    if len(answers) < least:
        raise InputError(f"there are {len(answers)} answers: a predictor of lengths takes at least {least}")
    chosen = random.Random(seed).sample(list(answers), min(MOST, len(answers)))
    ridge, beside = _ridge(chosen, seed)
    made = _Seen(chosen).model(ridge)
    return LengthModel(made.middle, made.weights, made.rarity, spread_of(beside, [one.cut for one in chosen]))


def folds(names: Sequence[str], count: int, seed: int) -> list[int]:
    """Return a fold for each item; items of one name are in one fold, and folds have about as many items."""
    draw, sizes, of = random.Random(seed), [0] * count, dict[str, int]()
    distinct = list(dict.fromkeys(names))
    draw.shuffle(distinct)
    for name in distinct:
        of[name] = sizes.index(min(sizes))
        sizes[of[name]] += names.count(name)
    return [of[name] for name in names]


def spread_of(beside: Any, cut: Sequence[bool]) -> Spread:
    """Return quantiles of distances f64[N], of which those that were cut are lower bounds.

    What lies above the largest is taken to lie there.
    """
    order = np.lexsort((np.asarray(cut), beside))
    ordered, ended = np.asarray(beside)[order], ~np.asarray(cut, bool)[order]
    at_risk = len(ordered) - np.arange(len(ordered))
    reached = 1 - np.cumprod(1 - ended / at_risk)
    places = np.searchsorted(reached, (np.arange(QUANTILES) + 0.5) / QUANTILES)
    return Spread(tuple(ordered[np.minimum(places, len(ordered) - 1)].tolist()))


def _ridge(answers: Sequence[Answered], seed: int) -> tuple[float, Any]:
    """Return the ridge that predicts unseen prompts best, and how far their answers are from it, f64[N]."""
    parts = folds([str(one.prompt) for one in answers], FOLDS, seed)
    beside = {ridge: np.empty(len(answers)) for ridge in RIDGES}
    for part in range(FOLDS):
        seen = _Seen([one for one, p in zip(answers, parts, strict=True) if p != part])
        for ridge, distances in beside.items():
            model = seen.model(ridge)
            for i in (i for i, p in enumerate(parts) if p == part):
                distances[i] = np.log1p(answers[i].tokens) - model.location(answers[i].prompt)
    cut = np.array([one.cut for one in answers])
    # Of an answer that was cut below what is predicted of it nothing is known to be wrong.
    losses = {ridge: float(np.abs(np.where(cut, np.maximum(one, 0), one)).mean()) for ridge, one in beside.items()}
    best = min(losses, key=losses.__getitem__)
    return best, beside[best]


class _Seen:
    """Answers that a fit sees, as arrays: features f64[N,BUCKETS], their products f64[N,N], and z f64[N]."""

    def __init__(self, answers: Sequence[Answered]) -> None:
        found = [buckets(one.prompt) for one in answers]
        counts = np.zeros(BUCKETS)
        for each in found:
            counts[np.unique(each)] += 1
        self.rarity = _rarity(counts, len(answers))
        self.features = np.zeros((len(answers), BUCKETS))
        for row, each in zip(self.features, found, strict=True):
            np.add.at(row, each, self.rarity[each])
            row /= max(1e-9, math.sqrt(float((self.rarity[each] ** 2).sum())))
        self.kernel = self.features @ self.features.T
        self.z, self.cut = np.log1p([one.tokens for one in answers]), np.array([one.cut for one in answers])

    def model(self, ridge: float) -> LengthModel:
        """Return a model whose spread is still unknown: its z is nearest in absolute distances."""
        middle, duals = float(np.median(self.z)), np.zeros(len(self.z))
        for _ in range(_ROUNDS):
            beside = self.z - middle - self.kernel @ duals
            # An answer that was cut below what is predicted is right as it is: it has next to no weight in this round.
            slack = np.where(self.cut & (beside < 0), _NO_WEIGHT, np.maximum(np.abs(beside), _SMALLEST))
            both = np.linalg.solve(
                self.kernel + np.diag(ridge * slack), np.stack([self.z, np.ones(len(self.z))], axis=1)
            )
            middle = float(both[:, 0].sum() / both[:, 1].sum())
            duals = both[:, 0] - middle * both[:, 1]
        return LengthModel(middle, self.features.T @ duals, self.rarity, Spread((0.0,)))


def _rarity(counts: Any, answers: int) -> Any:
    """Return how much each feature counts, f64[BUCKETS], by the prompts that have it."""
    return np.log((1 + answers) / (1 + counts))
