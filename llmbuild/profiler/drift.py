"""The speed of a machine that drifts while kinds of work are timed in turn: found from all of them, and taken out."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Kind = TypeVar("Kind", bound=Hashable)
_TURNS = 12
"""Turns of the fit, each with weights from the errors of the one before."""
_OUTLIER = 2.0
"""Median errors beyond which a visit counts less."""


def levelled(
    stretches: Sequence[Sequence[tuple[Kind, float]]],
) -> tuple[dict[Kind, list[float]], tuple[float, ...]]:
    """Return the seconds of each kind as at the machine's middle speed, and how slow each stretch of time was.

    A stretch has visits that were timed one after another, each with its kind and its seconds. Seconds are fitted as
    those of the kind times those of the stretch: least squares of logarithms, in which outliers count less (Huber's
    weights). Ratios between kinds are then those of one machine, whichever of them met its slow minutes. The middle
    stretch is 1, so seconds stay those of the middle of the measurement.
    """
    visits = [(kind, number, seconds) for number, one in enumerate(stretches) for kind, seconds in one]
    places = {kind: place for place, kind in enumerate(dict.fromkeys(kind for kind, _, _ in visits))}
    design = np.zeros((len(visits), len(places) + len(stretches)))
    for row, (kind, number, _) in enumerate(visits):
        design[row, places[kind]] = design[row, len(places) + number] = 1
    logs = np.log([seconds for _, _, seconds in visits])
    weights: NDArray[np.floating] = np.ones(len(visits))
    fit = np.zeros(design.shape[1])
    for _ in range(_TURNS):
        fit = np.linalg.lstsq(design * weights[:, None], logs * weights, rcond=None)[0]
        errors = np.abs(logs - design @ fit)
        most = max(_OUTLIER * float(np.median(errors)), 1e-9)
        weights = np.sqrt(most / np.maximum(errors, most))
    slow = np.exp(fit[len(places) :] - np.median(fit[len(places) :]))
    found: dict[Kind, list[float]] = {}
    for kind, number, seconds in visits:
        found.setdefault(kind, []).append(seconds / float(slow[number]))
    return found, tuple(map(float, slow))
