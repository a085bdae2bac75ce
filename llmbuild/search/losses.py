"""What a search minimizes: metrics as losses on a log scale, and how far they are of interest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llmbuild.search.front import FLOORS, missed, value_of
from llmbuild.spec.measurement import SCREENED
from llmbuild.spec.slo import METRICS, Bound
from llmbuild.spec.trial import Trial

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

WORSE = 1.5
"""How many times a metric of point 0 is still of interest; what is worse is no trade anyone asked for."""

POOR = {"quality_kl": 0.5, "quality_top1": 0.5}
"""Where quality ends to be of interest when no bound says so."""


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
