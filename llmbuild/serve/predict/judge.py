"""Judges predictors of lengths on prompts that they have not seen: by the order that they give, and by how far off."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmbuild.serve.predict.fit import FOLDS, Answered, fit, folds
from llmbuild.serve.predict.learned import Learned
from llmbuild.serve.predict.model import Spread
from llmbuild.serve.request import Request, SamplingParams
from llmbuild.system.ranks import kendall

LATER = (50, 100, 200)
"""Tokens after which answers that are longer are judged again."""
_FEWEST = 20
_RESAMPLES = 200


@dataclass(frozen=True)
class Score:
    """How a predictor does on `answers` of which `tokens` are known."""

    predictor: str
    tokens: int
    answers: int
    kendall_tau: float
    kendall_tau_half: float
    """Half of its bootstrap 95 % interval."""
    log_error: float
    """Median of |log((1 + predicted) / (1 + true))|; e to it is a factor."""


def held_out(answers: Sequence[Answered], names: Sequence[str], seed: int = 0) -> list[float]:
    """Return z f64[N] of each prompt by a model fitted without all those of its name; f64[N] is in their order."""
    parts, found = folds(names, FOLDS, seed), [0.0] * len(answers)
    for part in range(FOLDS):
        model = fit([one for one, p in zip(answers, parts, strict=True) if p != part], seed, least=1)
        for i, p in enumerate(parts):
            if p == part:
                found[i] = model.location(answers[i].prompt)
    return found


def online(answers: Sequence[Answered], lengths: Any, otherwise: float) -> list[float]:
    """Return what a `Lengths` expects of each answer when it knows those before it; `otherwise` where it is silent."""
    most, found = max(one.tokens for one in answers), []
    for i, one in enumerate(answers):
        expected = lengths.predict(request_of(i, one.tenant, most), 0)
        found.append(otherwise if expected is None else expected)
        lengths.learn(request_of(i, one.tenant, one.tokens if one.cut else None), one.tokens)
    return found


def request_of(number: int, tenant: str, most: int | None = None) -> Request:
    """Return a request whose prompt is its number."""
    return Request(str(number), (number,), SamplingParams(max_tokens=most), 0, tenant=tenant)


def scores(answers: Sequence[Answered], spread: Spread, unseen: Mapping[str, Sequence[float]]) -> list[Score]:
    """Return how constants, the prompt's length, earlier answers, and z f64[N] of held-out prompts do.

    `unseen` are such z by what was held out.
    """
    from llmbuild.serve.lengths import History

    true = np.array([one.tokens for one in answers], float)
    middle, most = float(np.median(true)), float(true.max())
    sizes = np.log([len(one.prompt) for one in answers])
    slope = np.polyfit(sizes, np.log1p(true), 1)
    alone = [Answered(one.prompt, one.tokens, one.cut) for one in answers]
    early: dict[str, Sequence[float]] = {
        "constant": [middle] * len(true),
        "prompt's length": list(np.expm1(np.polyval(slope, sizes))),
        "history, one tenant": online(alone, History(), middle),
        "history, a tenant for each kind": online(answers, History(), middle),
    }
    late: dict[str, Callable[[int, int], float]] = {}
    for name, z in unseen.items():
        late[name] = lambda i, tokens, z=z: spread.expected(z[i], tokens)  # type: ignore[misc]
        early[name] = [late[name](i, 0) for i in range(len(true))]
        early[f"{name}, with tenants"] = online(answers, Learned(lambda ids, z=z: z[ids[0]], spread), middle)  # type: ignore[misc]
    found = [_score(name, 0, np.minimum(each, most), true) for name, each in early.items()]
    for tokens in LATER:
        longer = np.flatnonzero(true > tokens)
        if len(longer) >= _FEWEST:
            for name, of in late.items():
                again = np.minimum([of(int(i), tokens) for i in longer], most)
                found.append(_score(name, tokens, again, true[longer]))
    return found


def _score(name: str, tokens: int, predicted: Any, true: Any) -> Score:
    draw, count = np.random.default_rng(0), len(true)
    taus = []
    for _ in range(_RESAMPLES):
        taken = draw.integers(0, count, count)
        taus.append(kendall(predicted[taken], true[taken]))
    low, high = np.quantile(taus, (0.025, 0.975))
    error = float(np.median(np.abs(np.log1p(predicted) - np.log1p(true))))
    return Score(name, tokens, count, kendall(predicted, true), float(high - low) / 2, error)
