"""The meter of a driver's device, the best first, and the agreement of two meters over the same work."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

from llmbuild.profiler.meters import estimate, nvml, rapl
from llmbuild.profiler.meters.meter import Absent, Counter, Energy, Meter, with_measured_step

CPU_DRIVERS = ("local-task", "local-sync")


@dataclass(frozen=True)
class Found:
    """The meter of a driver (None where there is none), and why every better one is not used."""

    meter: Meter | None
    absent: tuple[Absent, ...]

    @property
    def reason(self) -> str:
        """Why there is no better meter, as text."""
        return "; ".join(a.reason for a in self.absent) or "no meter reads what this runs on"


def find(driver: str, measure_step: bool = False, meters: Collection[str] | None = None) -> Found:
    """Return the meter of `driver`'s device, the best first; an estimate only where the user enabled one.

    `meters` are the sources for the target's own device; None tries all sources for boards.

    Raises:
        InputError: the user's power model cannot be read.
    """
    board: dict[str, Callable[[], Meter | Absent]] = {
        "nvml_counter": nvml.find_counter,
        "nvml_polled": nvml.find_polled,
    }
    kinds: list[Callable[[], Meter | Absent]] = (
        [rapl.find] if driver in CPU_DRIVERS else [f for name, f in board.items() if meters is None or name in meters]
    )
    if driver in CPU_DRIVERS and estimate.asked():
        kinds.append(estimate.find)
    absent: list[Absent] = []
    for kind in kinds:
        found = kind()
        if isinstance(found, Absent):
            absent.append(found)
            continue
        timed = with_measured_step(found) if measure_step and isinstance(found, Counter) else found
        return Found(timed, tuple(absent))
    return Found(None, tuple(absent))


@dataclass(frozen=True)
class Agreement:
    """Two meters over one window."""

    first: Energy
    second: Energy

    @property
    def ratio(self) -> float:
        """The second's joules over the first's."""
        return self.second.joules / self.first.joules if self.first.joules else math.inf


def compare(first: Meter, second: Meter, work: Callable[[Callable[[], None]], None]) -> Agreement | Absent:
    """Run `work` once under both meters; it must call its argument between pieces of work."""
    one, other = first.window(), second.window()

    def keep() -> None:
        one.keep()
        other.keep()

    work(keep)
    ended, also = other.close(), one.close()
    if isinstance(also, Absent):
        return also
    return ended if isinstance(ended, Absent) else Agreement(also, ended)
