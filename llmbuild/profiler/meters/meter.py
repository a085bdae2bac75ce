"""Energy meters with one interface: open a window, do the work, close it, get joules or why there are none.

A missing counter gives `Absent`, never 0. A meter belongs to the device that runs the code: the CPU's packages (never
the DRAM) for IREE's CPU drivers, the board for a GPU's, so that an idle GPU does not count for a CPU's work.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from time import monotonic, sleep
from typing import Literal, Protocol

Source = Literal["nvml_counter", "nvml_polled", "rapl", "rapl_vm", "model"]
Boundary = Literal["gpu", "package"]

KEEP_S = 30.0
"""Maximum interval between reads of a counter in a window, so that it cannot wrap twice unnoticed."""

SCREEN_STEPS, RANK_STEPS = 30, 100
"""Least updates of a counter in a window: the error is one update, so about 3 % and 1 %."""

LEAST_WINDOW_S, MOST_WINDOW_S = 0.3, 60.0

Clock = Callable[[], float]


@dataclass(frozen=True)
class Energy:
    """The result of a window."""

    joules: float
    seconds: float

    @property
    def watts(self) -> float:
        """Mean power of the window."""
        return self.joules / self.seconds


@dataclass(frozen=True)
class Absent:
    """Why a source gives no reading."""

    source: Source
    reason: str


class Window(Protocol):
    """A span under measurement."""

    def keep(self) -> None:
        """Update the window; called between pieces of work, as often as convenient."""

    def close(self) -> Energy | Absent:
        """End the window."""


class Meter(Protocol):
    """One source of energy readings. `step_s` is the time between two of its updates."""

    @property
    def source(self) -> Source:
        """The source of the joules; comparisons never mix sources."""

    @property
    def boundary(self) -> Boundary:
        """The components whose energy is measured."""

    @property
    def step_s(self) -> float:
        """Seconds between two updates."""

    def window(self) -> Window:
        """Begin a window."""

    def conditions(self) -> dict[str, float | str]:
        """Return present clocks, temperature and limits, as far as known; `throttled` while throttled."""


def window_s(meter: Meter, steps: int) -> float:
    """Return how long a window must be for an error of one in `steps`."""
    return min(max(LEAST_WINDOW_S, steps * meter.step_s), MOST_WINDOW_S)


@dataclass(frozen=True)
class Counter:
    """Monotonic counters: `read` returns them in units of `unit_j`, each wraps at its `range`.

    A range of 0 never wraps: a decrease means a reset, and the window is lost.
    """

    source: Source
    boundary: Boundary
    step_s: float
    unit_j: float
    ranges: tuple[int, ...]
    read: Callable[[], tuple[int, ...] | Absent]
    clock: Clock = monotonic
    tell: Callable[[], dict[str, float | str]] = dict

    def window(self) -> Window:
        """Begin a window at the counters' present values."""
        return _CounterWindow(self)

    def conditions(self) -> dict[str, float | str]:
        """Return the source's conditions."""
        return self.tell()


class _CounterWindow:
    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._units = 0
        self._last = counter.read()
        self._begin = self._kept = counter.clock()

    def keep(self) -> None:
        if self._counter.clock() - self._kept >= KEEP_S:
            self._add()

    def close(self) -> Energy | Absent:
        self._add()
        seconds = self._kept - self._begin
        return self._last if isinstance(self._last, Absent) else Energy(self._units * self._counter.unit_j, seconds)

    def _add(self) -> None:
        before, counter = self._last, self._counter
        if isinstance(before, Absent):
            return
        self._last, self._kept = counter.read(), counter.clock()
        if isinstance(self._last, Absent):
            return
        for begin, end, span in zip(before, self._last, counter.ranges, strict=True):
            if end < begin and not span:
                self._last = Absent(counter.source, "the counter was reset within the window")
                return
            self._units += end - begin if end >= begin else end - begin + span


def with_measured_step(counter: Counter, wait: Callable[[float], None] = sleep, seconds: float = 1.0) -> Counter:
    """Return the counter with its measured update interval; unchanged where too few updates are seen.

    Polls a thousand times a second for at most `seconds`.
    """
    seen: list[float] = []
    begin, last = counter.clock(), counter.read()
    while counter.clock() - begin < seconds and len(seen) < 12:
        wait(0.001)
        now = counter.read()
        if isinstance(now, Absent):
            return counter
        if now != last:
            seen.append(counter.clock())
            last = now
    gaps = [b - a for a, b in pairwise(seen)]
    return replace(counter, step_s=statistics.median(gaps)) if len(gaps) >= 3 else counter
