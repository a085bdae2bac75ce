"""Which of two variants is better in a metric, from samples of the same rounds.

The compared value is the log-ratio within a round. Its interval is that of the signed-rank test (Hodges and Lehmann):
swapping two equal variants only swaps signs, so the interval is valid for any noise, including outliers. A race tests
several times, and each test may err: the error rate of a result is 1 % per race, shared by all its tests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from statistics import NormalDist, fmean, stdev
from typing import Literal

Order = Literal["less", "greater", "tied", "undecided"]

TIE = 0.01
"""Relative difference below which two readings are practically equal."""

RISK = 0.01
"""Probability per race that equal variants are declared different in one metric."""

LOOKS = 7
"""Maximum number of tests per race."""

RANKED = 12
"""Least rounds for the signed-rank interval: with fewer it cannot reach the risk, and Student's is used."""

LEAST = 5
"""Least rounds for a decision."""

_STUDENT = (7.841, 6.352, 5.563, 5.082, 4.759, 4.529, 4.357)
"""Quantiles of Student's distribution for a risk of RISK / LOOKS, two-sided, with 4 to 10 degrees of freedom."""


def order(mine: Sequence[float], theirs: Sequence[float]) -> Order:
    """Return the order of `mine` relative to `theirs`, round by round; rounds that only one has are dropped."""
    rounds = list(zip(mine, theirs, strict=False))
    if len(rounds) < LEAST:
        return "undecided"
    if any(a <= 0 or b <= 0 for a, b in rounds):  # such as the time per later token of a one-token answer
        return "tied" if all(a == b for a, b in rounds) else "undecided"
    return place(*interval([math.log(a / b) for a, b in rounds]))


def needed(mine: Sequence[float], theirs: Sequence[float]) -> float:
    """Return about how many rounds an undecided pair needs; infinite where unknown.

    Intervals shrink with the root of the rounds. The centre is assumed a third of the interval's reach further out
    than measured, which is one standard error: this prefers a superfluous round to an early stop.
    """
    rounds = list(zip(mine, theirs, strict=False))
    if len(rounds) < LEAST or any(a <= 0 or b <= 0 for a, b in rounds):
        return math.inf
    low, high = interval([math.log(a / b) for a, b in rounds])
    centre, reach, tie = abs(low + high) / 2, (high - low) / 2, math.log1p(TIE)
    margin = max(centre + reach / 3 - tie, tie - centre)
    return len(rounds) * max(1.0, reach / margin) ** 2 if margin > 0 else math.inf


def place(low: float, high: float) -> Order:
    """Return what an interval of a log-ratio shows: beyond a tie, within one, or neither."""
    tie = math.log1p(TIE)
    if high < -tie:
        return "less"
    if low > tie:
        return "greater"
    return "tied" if -tie <= low and high <= tie else "undecided"


def interval(logs: Sequence[float]) -> tuple[float, float]:
    """Return the interval of the centre of at least `LEAST` log-ratios that misses it with probability RISK / LOOKS."""
    count = len(logs)
    if count < RANKED:
        reach = _STUDENT[count - LEAST] * stdev(logs) / math.sqrt(count)
        return fmean(logs) - reach, fmean(logs) + reach
    import numpy as np  # processes without comparisons start without this import

    values, out = np.asarray(logs), _left_out(count)
    averages = ((values[:, None] + values) / 2)[np.triu_indices(count)]
    ends = np.partition(averages, (out, averages.size - 1 - out))
    return float(ends[out]), float(ends[averages.size - 1 - out])


@cache
def _left_out(count: int) -> int:
    """Return how many pairwise averages lie outside the interval on each side.

    It is the largest k with P(W <= k) <= RISK / LOOKS / 2 for the signed-rank statistic W of `count` samples, counted
    exactly up to 40 samples and by its normal approximation from there on.
    """
    risk = RISK / LOOKS / 2
    if count > 40:
        mean, spread = count * (count + 1) / 4, math.sqrt(count * (count + 1) * (2 * count + 1) / 24)
        return math.floor(mean - 0.5 + NormalDist().inv_cdf(risk) * spread)
    ways = [1] + [0] * (count * (count + 1) // 2)
    for rank in range(1, count + 1):
        for total in range(len(ways) - 1, rank - 1, -1):
            ways[total] += ways[total - rank]
    seen, k = ways[0], 0
    while (seen + ways[k + 1]) / 2**count <= risk:
        k += 1
        seen += ways[k]
    return k
