"""How far steps are off their profile: the time between tokens as it is, over that of the profile at the same load.

A load curve has no HTTP in it, and what shares a machine slows down what was measured alone. A policy plans with
profiles, so what is seen here makes the load larger, or smaller, that it is told of.
"""

from __future__ import annotations

import math

from llmbuild.fleet.capacity import OperatingPoint

LEAST, MOST = 0.5, 4.0
"""Bounds of the factor: beyond them the profile is of something else."""
ENOUGH = 20
"""Answers without which nothing is corrected."""
_TOKENS = 4
"""Answers with fewer tokens say little of the time between them."""
_LEARN = 0.03
"""Weight of an answer."""


class Correction:
    """The factor of one service."""

    def __init__(self) -> None:
        self._log, self._count = 0.0, 0

    def seen(self, point: OperatingPoint, rows: float, positions: float, tokens: int, tpot_s: float) -> None:
        """Learn from an answer: its tokens and their mean distance, beside so many rows that see so many positions."""
        if tokens < _TOKENS or tpot_s <= 0:
            return
        rows = min(max(rows, 1.0), float(point.batch))
        expected_s = point.step.seconds(rows, rows * positions, 0)
        if expected_s > 0:
            self._count += 1
            weight = max(_LEARN, 1 / self._count)
            self._log += weight * (math.log(tpot_s / expected_s) - self._log)

    @property
    def factor(self) -> float:
        """Return how many times the load counts."""
        return min(MOST, max(LEAST, math.exp(self._log))) if self._count >= ENOUGH else 1.0
