"""What a policy sees, what it decides, and what it is given before it begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from llmbuild.fleet.capacity import OperatingPoint
from llmbuild.fleet.plan.load import Demand, Load
from llmbuild.fleet.plan.plan import Plan
from llmbuild.spec.fleet import Fleet, Profile

Target = Mapping[tuple[int, OperatingPoint], int]
"""Replicas by service and operating point."""


@dataclass(frozen=True)
class Seen:
    """What came to one class of one service in the last period, and how long prompts and answers were so far."""

    service: int
    kind: int
    arrivals: int
    prompt: float
    """Mean of the prompts of the last minutes; the fleet file's where none came."""
    output: float
    """Mean of the answers that ended in the last minutes; the fleet file's where none did."""
    spread: float
    """Larger coefficient of variation of the two."""


@dataclass(frozen=True)
class Observation:
    """The fleet at one moment."""

    now_s: float
    period_s: float
    seen: tuple[Seen, ...]
    running: Target
    """Replicas that serve or start, by service and point."""
    free_slots: Mapping[str, int]
    """By class of nodes, of nodes that have not failed."""
    failed: Mapping[str, int]
    """Nodes that have failed, by class."""
    queued: Mapping[int, int]
    """Requests that wait, by service."""


@dataclass(frozen=True)
class Counted:
    """How much comes in a window of a trace: requests and mean lengths by service and class."""

    begin_s: float
    arrivals: Mapping[tuple[int, int], int]


@dataclass(frozen=True)
class Given:
    """What a policy may know before it begins; the future is for those that say so."""

    fleet: Fleet
    profiles: tuple[Profile, ...]
    lengths: Mapping[tuple[int, int], tuple[float, float, float]]
    """Mean prompt, mean answer and spread by service and class, of the whole trace."""
    windows: tuple[Counted, ...]
    """Arrivals of the whole trace in windows of `WINDOW_S`."""

    def load(self, rates: Mapping[tuple[int, int], float]) -> Load:
        """Return a load with the lengths of the trace."""
        return Load(
            tuple(
                Demand(
                    service.name,
                    replace(kind, prompt=lengths[0], output=lengths[1], spread=lengths[2]),
                    rates.get((s, c), 0.0),
                )
                for s, service in enumerate(self.fleet.services)
                for c, kind in enumerate(service.classes)
                for lengths in [self.lengths[s, c]]
            )
        )

    def most(self, begin_s: float, end_s: float) -> dict[tuple[int, int], float]:
        """Return the largest rates of windows that overlap a time, by service and class."""
        found: dict[tuple[int, int], float] = {}
        for window in self.windows:
            if window.begin_s < end_s and window.begin_s + WINDOW_S > begin_s:
                for key, count in window.arrivals.items():
                    found[key] = max(found.get(key, 0.0), count / WINDOW_S)
        return found

    def mean(self) -> dict[tuple[int, int], float]:
        """Return the mean rates of the trace."""
        seconds = WINDOW_S * len(self.windows)
        keys = {key for window in self.windows for key in window.arrivals}
        return {key: sum(w.arrivals.get(key, 0) for w in self.windows) / seconds for key in sorted(keys)}


WINDOW_S = 60.0
"""Seconds of the windows whose largest rate is called a peak."""


class Policy(Protocol):
    """Decides what runs; equal observations give equal decisions."""

    def observe(self, seen: Observation) -> None:
        """Take what was seen since the last time."""

    def decide(self) -> Target:
        """Return the replicas that are to run."""

    def explain(self) -> str:
        """Return the reason of the last decision."""


Make = Callable[[Given], Policy]


def target_of(plan: Plan) -> dict[tuple[int, OperatingPoint], int]:
    """Return the replicas of a plan by index of the service."""
    index = {service.name: s for s, service in enumerate(plan.fleet.services)}
    return {(index[a.service], a.point): a.replicas for a in plan.assignments}
