"""Medians, bootstrap intervals and paired ratios; the seeds are fixed so that equal samples give equal intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmbuild.spec.measurement import Reading

RESAMPLES = 2000
CONFIDENCE = 0.95


def median_of(samples: Sequence[float]) -> Reading:
    """Return the median with its bootstrap interval. One sample has an interval of no width.

    Raises:
        ValueError: no samples.
    """
    values = np.asarray(samples, np.float64)
    if values.size == 0:
        raise ValueError("no samples")
    low, high = _interval(values)
    return Reading(float(np.median(values)), low, high, tuple(float(v) for v in values))


def exact(value: float) -> Reading:
    """Return a reading that has no noise, such as a size."""
    return Reading(value, value, value, ())


def paired_ratio(mine: Sequence[float], theirs: Sequence[float]) -> Reading:
    """Return the median of mine over theirs, round by round, with its bootstrap interval in the log domain.

    Raises:
        ValueError: the two are not of equal, positive length.
    """
    if len(mine) != len(theirs) or not mine:
        raise ValueError("paired samples are of equal, positive length")
    logs = np.log(np.asarray(mine, np.float64)) - np.log(np.asarray(theirs, np.float64))
    low, high = _interval(logs)
    return Reading(
        float(np.exp(np.median(logs))), float(np.exp(low)), float(np.exp(high)), tuple(float(x) for x in np.exp(logs))
    )


def _interval(values: np.ndarray) -> tuple[float, float]:
    if values.size == 1:
        return float(values[0]), float(values[0])
    draws = np.random.default_rng(0).integers(0, values.size, (RESAMPLES, values.size))
    medians = np.median(values[draws], axis=1)
    tail = (1 - CONFIDENCE) / 2
    return float(np.quantile(medians, tail)), float(np.quantile(medians, 1 - tail))
