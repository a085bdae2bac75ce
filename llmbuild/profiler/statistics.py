"""Medians, bootstrap intervals and paired ratios; the seeds are fixed so that equal samples give equal intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from llmbuild.spec.measurement import Reading

RESAMPLES = 2000
CONFIDENCE = 0.95
_STUDENT = (12.706, 4.303, 3.182, 2.776)
"""Quantiles of Student's distribution for 95 %, two-sided, with 1 to 4 degrees of freedom."""
FEW = len(_STUDENT) + 1
"""Most samples that `few_of` takes."""
DRIFT_LEAST, DRIFT_Z, DRIFT_RATIO = 5, 2.576, 0.03


def median_of(samples: Sequence[float]) -> Reading:
    """Return the median with its bootstrap interval. One sample has an interval of zero width.

    Raises:
        ValueError: no samples.
    """
    values = np.asarray(samples, np.float64)
    if values.size == 0:
        raise ValueError("no samples")
    low, high = _interval(values)
    return Reading(float(np.median(values)), low, high, tuple(float(v) for v in values))


def few_of(samples: Sequence[float]) -> Reading:
    """Return the median of few positive samples with a wide interval: Student's of their logarithms, and all samples.

    Raises:
        ValueError: fewer than 2 samples, more than there are quantiles for, or one that is not positive.
    """
    count = len(samples)
    if not 2 <= count <= FEW or min(samples) <= 0:
        raise ValueError(f"2 to {FEW} positive samples are asked for")
    logs = np.log(np.asarray(samples, np.float64))
    reach = _STUDENT[count - 2] * float(np.std(logs, ddof=1)) / math.sqrt(count)
    low, high = math.exp(float(np.mean(logs)) - reach), math.exp(float(np.mean(logs)) + reach)
    return Reading(middle(samples), min(low, *samples), max(high, *samples), tuple(float(x) for x in samples))


def middle(values: Sequence[float]) -> float:
    """Return the median."""
    return float(np.median(values))


def percentile_of(samples: Sequence[float], share: float) -> Reading | None:
    """Return the percentile with its 95 % interval by order statistics; None where the samples cannot support one.

    They support it if the probability that all lie below the true percentile is at most 1 %: 459 samples for the 99th.
    The samples themselves are not kept.
    """
    count = len(samples)
    if count < least_samples(share):
        return None
    values = np.sort(np.asarray(samples, np.float64))
    spread = 1.96 * math.sqrt(count * share * (1 - share))
    low, middle, high = (min(max(math.ceil(count * share + d) - 1, 0), count - 1) for d in (-spread, 0.0, spread))
    return Reading(float(values[middle]), float(values[low]), float(values[high]), ())


def least_samples(share: float, risk: float = 0.01) -> int:
    """Return how many samples a percentile needs: the probability that all lie below it is then at most `risk`."""
    return math.ceil(math.log(risk) / math.log(share))


def drift(samples: Sequence[float]) -> float | None:
    """Return the median of the last half over that of the first, in order; None where they do not differ.

    They differ by ranks (Mann-Whitney, 1 % two-sided, normal approximation) and by at least 3 %.
    """
    values = np.asarray(samples, np.float64)
    half = values.size // 2
    if half < DRIFT_LEAST:
        return None
    first, last = values[:half], values[-half:]
    above = np.sum(first[:, None] < last) + 0.5 * np.sum(first[:, None] == last)
    spread = math.sqrt(half * half * (2 * half + 1) / 12)
    ratio = float(np.median(last) / np.median(first))
    apart = abs(above - half * half / 2) > DRIFT_Z * spread
    return ratio if apart and abs(math.log(ratio)) > DRIFT_RATIO else None


def exact(value: float) -> Reading:
    """Return a reading that has no noise, such as a size."""
    return Reading(value, value, value, ())


def paired_ratio(mine: Sequence[float], theirs: Sequence[float]) -> Reading:
    """Return the median of mine over theirs, round by round, with its bootstrap interval in the log domain.

    Raises:
        ValueError: the two do not have the same, positive length.
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
