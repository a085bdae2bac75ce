"""What a policy sees, what it decides, and what it is given before it begins."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import ceil, inf
from typing import Protocol

from llmbuild.fleet.capacity import OperatingPoint
from llmbuild.fleet.plan.load import Demand, Load
from llmbuild.fleet.plan.plan import Plan
from llmbuild.spec.fleet import Fleet, Profile
from llmbuild.spec.partitions import Slice

BIN_S = 10.0
"""Seconds of the bins in which a trace is counted."""
WINDOW_S = 60.0
"""Seconds over which a rate is taken that is called a peak."""
Target = Mapping[tuple[int, OperatingPoint], int]
"""Replicas by service and operating point."""


@dataclass(frozen=True)
class Seen:
    """What came to one class of one service in the last period, and how long prompts and answers were so far."""

    service: int
    kind: int
    arrivals: float
    """Live they are corrected by how far steps are off their profile."""
    prompt: float
    """Mean of the prompts of the last minutes; the fleet file's where none came."""
    output: float
    """Mean of the answers that ended in the last minutes; the fleet file's where none did."""


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
    """How many requests come in a bin of a trace, by service and class."""

    begin_s: float
    arrivals: Mapping[tuple[int, int], float]


@dataclass(frozen=True)
class Given:
    """What a policy may know before it begins; the future is for those that say so."""

    fleet: Fleet
    profiles: tuple[Profile, ...]
    lengths: Mapping[tuple[int, int], tuple[float, float]]
    """Mean prompt and mean answer by service and class, of the whole trace."""
    bins: tuple[Counted, ...]
    """Arrivals of the whole trace in bins of `BIN_S`."""

    def load(self, rates: Mapping[tuple[int, int], float]) -> Load:
        """Return a load with the lengths of the trace."""
        return Load(
            tuple(
                Demand(
                    service.name,
                    replace(kind, prompt=lengths[0], output=max(1.0, lengths[1])),
                    rates.get((s, c), 0.0),
                )
                for s, service in enumerate(self.fleet.services)
                for c, kind in enumerate(service.classes)
                for lengths in [self.lengths[s, c]]
            )
        )

    def most(self, begin_s: float, end_s: float, over_s: float = WINDOW_S) -> dict[tuple[int, int], float]:
        """Return the largest mean rate over so many seconds within a time, by service and class."""
        first, last = int(begin_s // BIN_S), min(len(self.bins), ceil(end_s / BIN_S)) if end_s < inf else len(self.bins)
        bins, width = self.bins[first:last], max(1, round(over_s / BIN_S))
        found: dict[tuple[int, int], float] = {}
        for key in self.lengths:
            counts = [one.arrivals.get(key, 0) for one in bins]
            running = [sum(counts[i : i + width]) for i in range(max(1, len(counts) - width + 1))]
            found[key] = max(running, default=0) / (BIN_S * max(1, min(width, len(counts))))
        return found

    def mean(self) -> dict[tuple[int, int], float]:
        """Return the mean rates of the trace."""
        seconds = BIN_S * len(self.bins)
        return {key: sum(one.arrivals.get(key, 0) for one in self.bins) / seconds for key in self.lengths}


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


def wanted_of(target: Target, kind: str) -> Counter[Slice]:
    """Return how many slices of each sort a target takes of a class of nodes."""
    found: Counter[Slice] = Counter()
    for (_, point), count in target.items():
        if point.part is not None and point.node.name == kind:
            found[point.part] += count
    return found
