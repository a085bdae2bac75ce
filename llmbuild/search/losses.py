"""The objectives of a search: metrics as losses on a log scale, and their upper limits of interest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llmbuild.search.front import FLOORS, missed, value_of
from llmbuild.spec.measurement import SCREENED
from llmbuild.spec.slo import METRICS, Bound, is_quality
from llmbuild.spec.trial import Trial

Losses = tuple[float, ...]


@dataclass(frozen=True)
class Reach:
    """The largest loss of interest: relative to point 0, or absolute."""

    beyond: float = 0.0
    value: float | None = None

    def of(self, zero: float) -> float:
        """Return the largest loss of interest, given that of point 0."""
        return zero + self.beyond if self.value is None else self.value


Interest = tuple[Reach, ...]

WORSE = 1.5
"""Factor of point 0's metric up to which a loss is of interest; beyond it the trade-off is useless."""

POOR = {"quality_kl": 0.5, "quality_top1": 0.5}
"""Limit of interest of a quality metric without a bound."""


def interest(objectives: Sequence[str], bounds: Sequence[Bound] = ()) -> Interest:
    """Return the limit of each objective's range of interest: 1.5 times point 0, for quality its bound.

    Quality without a bound is limited by `POOR`, since point 0 has the best possible quality.
    """
    limits = {**POOR, **{bound.metric: bound.limit for bound in bounds}}
    return tuple(
        Reach(value=loss(name, limits[name])) if name in limits and name in POOR else Reach(beyond=math.log(WORSE))
        for name in objectives
    )


def loss(metric: str, value: float) -> float:
    """Return a metric as a loss on a log scale; values below its floor are equal."""
    sign = 1.0 if METRICS[metric].direction == "min" else -1.0
    return sign * math.log(max(value, FLOORS.get(metric, 1e-9)))


def losses_of(trial: Trial, objectives: Sequence[str], bounds: Sequence[Bound] = ()) -> Losses | None:
    """Return the objectives as losses, on a log scale where positive; None for a failure or a broken bound.

    A metric that is absent counts the same everywhere, so that it decides nothing; a point without it because of the
    short screen is reported as infeasible.
    """
    if trial.failure is not None or not trial.measurements or missed(trial, trial.measurements[0], bounds):
        return None
    unscored = "quality" in trial.measurements[0].notes and any(map(is_quality, objectives))
    if unscored and SCREENED in trial.measurements[0].notes:
        return None
    losses = []
    for name in objectives:
        found = value_of(trial, trial.measurements[0], name)
        losses.append(0.0 if found is None else loss(name, found))
    return tuple(losses)
