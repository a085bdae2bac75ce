"""How much is kept for a class, and for how long, by what each choice would have missed within the last hour.

A choice is a head-room and a time: capacity is there for the largest forecast of that time. Capacity that is asked for
comes after the lead, and goes at once. Of the choices that would have missed the fewest requests, or more by no more
than the SLO allows, the one is taken that keeps the least: a class whose bursts come again keeps what they need, and a
calm one does not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from math import ceil

HEADROOMS = (0.5, 1.64, 3.0)
"""Standard deviations of the errors above the level."""
HOLDS_S = (300.0, 900.0, 3600.0)
"""Seconds, besides twice the lead."""
HOUR_S = 3600.0


@dataclass(frozen=True)
class Choice:
    """A head-room by its place in the forecasts, and windows for which the largest one is kept."""

    headroom: int
    windows: int


def choices(headrooms: int, shortest: int, window_s: float, calibrated: bool) -> tuple[Choice, ...]:
    """Return the choices; a single one where nothing is to be calibrated: the second head-room, for the shortest."""
    if not calibrated:
        return (Choice(min(1, headrooms - 1), shortest),)
    times = dict.fromkeys((shortest, *(max(shortest, ceil(s / window_s)) for s in HOLDS_S)))
    return tuple(Choice(z, windows) for z in range(headrooms) for windows in times)


class Hold:
    """What is kept for one class."""

    def __init__(self, some: Sequence[Choice], lead: int, allowed: float, window_s: float) -> None:
        """Begin with no forecast. `lead` counts windows; `allowed` is the share of requests that may miss."""
        self._choices, self._allowed = tuple(some), allowed
        hour = ceil(HOUR_S / window_s)
        longest = max(one.windows for one in some)
        self._forecasts: list[deque[float]] = [deque(maxlen=longest) for _ in range(1 + max(c.headroom for c in some))]
        self._asked: list[deque[float]] = [deque(maxlen=lead + 1) for _ in some]
        self._over: list[deque[float]] = [deque(maxlen=hour) for _ in some]
        self._kept: list[deque[float]] = [deque(maxlen=hour) for _ in some]
        self._came: deque[float] = deque(maxlen=hour)
        self.choice = self._choices[0]
        self.rate = 0.0
        """Requests a second for which capacity is kept."""

    def close(self, rate: float | None, forecasts: Sequence[float]) -> None:
        """Take the rate of a window that has ended, where one has, and the forecasts for the next one by head-room."""
        if rate is not None:
            self._came.append(rate)
            for over, kept, asked in zip(self._over, self._kept, self._asked, strict=True):
                there = min(asked)
                over.append(max(0.0, rate - there))
                kept.append(there)
        for known, one in zip(self._forecasts, forecasts, strict=False):
            known.append(one)
        for asked, choice in zip(self._asked, self._choices, strict=True):
            asked.append(self._largest(choice))
        self.choice = self._best()
        self.rate = self._largest(self.choice)

    def lift(self, rate: float) -> None:
        """Keep no less than a rate that is seen within a window."""
        for known in self._forecasts:
            known[-1] = max(known[-1], rate)
        self.rate = max(self.rate, rate)

    def _largest(self, choice: Choice) -> float:
        known = self._forecasts[choice.headroom]
        return max(islice(reversed(known), choice.windows))

    def _best(self) -> Choice:
        """Return the choice that keeps the least of those that missed no more than is allowed, besides what all did:
        nothing keeps capacity for a burst that was never seen before.
        """
        sums = [(sum(over), sum(kept)) for over, kept in zip(self._over, self._kept, strict=True)]
        most = min(over for over, _ in sums) + self._allowed * sum(self._came)
        good = (i for i, (over, _) in enumerate(sums) if over <= most)
        return self._choices[min(good, key=lambda i: sums[i][1])]
