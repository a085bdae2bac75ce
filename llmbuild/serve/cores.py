"""How fast the cores of a server are: after a rest they are slow until they have worked for a while.

Clocks follow the load: a core that has slept, if only for some milliseconds, takes up to twice as long for the same
work until it has been busy for a tenth of a second or two. So a server with little load is slower than its load curve,
which is measured without rests.
"""

from __future__ import annotations

from llmbuild.spec.load_curve import OwnTime

REST_S = 0.002
"""Seconds without work after which a core is slow."""


class Cores:
    """The speed of a simulated server's cores."""

    def __init__(self, own: OwnTime) -> None:
        """Take by what cores are slow after a rest, and for how long; they have rested."""
        self._factor, self._cold_s = own.cold_factor, own.cold_s
        self._left_s = self._cold_s

    def rested(self, seconds: float) -> None:
        """Take that nothing was done for so many seconds."""
        if seconds >= REST_S:
            self._left_s = self._cold_s

    def wall_s(self, work_s: float) -> float:
        """Return in which time work is done that takes so many seconds at full speed, if it begins now."""
        slow_s = work_s * self._factor
        return slow_s if slow_s <= self._left_s else work_s + self._left_s * (1 - 1 / self._factor)

    def work_s(self, wall_s: float) -> float:
        """Return how much work, in seconds at full speed, is done in a time that begins now."""
        if wall_s <= self._left_s:
            return wall_s / self._factor
        return wall_s - self._left_s * (1 - 1 / self._factor)

    def worked(self, wall_s: float) -> None:
        """Take that they worked for so many seconds."""
        self._left_s = max(0.0, self._left_s - wall_s)
