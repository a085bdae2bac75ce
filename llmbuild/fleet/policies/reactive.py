"""Baselines as they run today: a horizontal autoscaler per model, and the lowest clock that meets the SLO."""

from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import replace

from llmbuild.fleet.capacity import OperatingPoint, capacity
from llmbuild.fleet.plan.layouts import Room
from llmbuild.fleet.plan.plan import cheapest, plan
from llmbuild.fleet.policy import WINDOW_S, Given, Observation, Target, target_of
from llmbuild.spec.fleet import UNSET

TARGET = 0.7
"""Share of what a replica takes that the autoscaler aims at."""
TOLERANCE = 0.1
DOWN_S = 300.0
"""Scale-down stabilisation, as Kubernetes' HorizontalPodAutoscaler has it."""
UP_PODS, UP_S = 4, 60.0
"""At most four replicas, or twice as many, in a minute: its default too."""
SEEN_S = 30.0
"""Seconds over which rates are taken."""
MARGIN = 1.2
"""Room above the rate that the lowest clock must have."""


class _Rates:
    """Rates of the last `SEEN_S` seconds by service and class."""

    def __init__(self, given: Given) -> None:
        self._first = given.most(0.0, WINDOW_S)
        self._seen: deque[tuple[float, dict[tuple[int, int], float]]] = deque()

    def observe(self, seen: Observation) -> None:
        """Take a period."""
        if seen.now_s > 0:
            self._seen.append((seen.period_s, {(one.service, one.kind): one.arrivals for one in seen.seen}))
        while len(self._seen) > 1 and sum(s for s, _ in self._seen) - self._seen[0][0] >= SEEN_S:
            self._seen.popleft()

    def rate(self, service: int, kind: int) -> float:
        """Return requests a second; those of the first minute before anything came."""
        seconds = sum(s for s, _ in self._seen)
        if not seconds:
            return self._first.get((service, kind), 0.0)
        return sum(counts.get((service, kind), 0) for _, counts in self._seen) / seconds


class Reactive:
    """Replicas of each service in proportion to its rate over what they take; it knows the trace's lengths."""

    def __init__(self, given: Given) -> None:
        self._given, self._rates = given, _Rates(given)
        self._load = given.load({})
        self._points = [self._order(s) for s in range(len(given.fleet.services))]
        self._wanted: list[deque[tuple[float, int]]] = [deque() for _ in given.fleet.services]
        self._grown: list[deque[tuple[float, int]]] = [deque() for _ in given.fleet.services]
        self._target: dict[tuple[int, OperatingPoint], int] = {}
        self._seen: Observation | None = None

    def _order(self, s: int) -> list[OperatingPoint]:
        """Return one point of each class of nodes for a service, the cheapest by request first; clocks are not set."""
        fleet = self._given.fleet
        points = cheapest(fleet.without_clocks(), self._given.profiles, self._load, s)
        nodes = {node.name: node for node in fleet.nodes}
        return [replace(point, node=nodes[point.node.name]) for point in points]

    def observe(self, seen: Observation) -> None:
        """Take what came."""
        self._seen = seen
        self._rates.observe(seen)

    def decide(self) -> Target:
        """Return the replicas of each service."""
        assert self._seen is not None
        target: dict[tuple[int, OperatingPoint], int] = {}
        room = Room(self._given.fleet.with_counts(self._left(self._seen)))
        for s in range(len(self._given.fleet.services)):
            present = {point: n for (of, point), n in self._target.items() if of == s}
            count = self._count(s, present)
            for point in self._points[s]:
                placed = room.take(point.node.name, point.part, count)
                if placed > 0:
                    target[s, point] = placed
                    count -= placed
        self._target = target
        return target

    def _left(self, seen: Observation) -> dict[str, int]:
        return {node.name: node.count - seen.failed.get(node.name, 0) for node in self._given.fleet.nodes}

    def _count(self, s: int, present: dict[OperatingPoint, int]) -> int:
        """Return how many replicas a service is to have, by the autoscaler's rule."""
        assert self._seen is not None
        now, have = self._seen.now_s, sum(present.values())
        used = self._used(s, present or dict.fromkeys(self._points[s][:1], 1))
        raw = used * max(have, 1) / TARGET
        if have and abs(used / TARGET - 1) <= TOLERANCE:
            raw = float(have)
        wanted = max(1, math.ceil(raw - 1e-9)) if self._points[s] else 0
        if now <= 0:
            return wanted
        recent = self._wanted[s]
        recent.append((now, wanted))
        while recent[0][0] < now - DOWN_S:
            recent.popleft()
        grown = self._grown[s]
        grown.append((now, have))
        while grown[0][0] < now - UP_S:
            grown.popleft()
        least = min(count for _, count in grown)
        most = max(2 * least, least + UP_PODS)
        return min(max(count for _, count in recent), most) if wanted < have else min(wanted, most)

    def _used(self, s: int, present: dict[OperatingPoint, int]) -> float:
        """Return the mean share of their capacity that a service's replicas use."""
        service = self._given.fleet.services[s]
        kinds = [d.kind for d in self._load.demands if d.service == service.name]
        used = 0.0
        for c, kind in enumerate(kinds):
            takes = sum(n * capacity(p, kind, service.attainment).rate for p, n in present.items())
            rate = self._rates.rate(s, c)
            used += rate / takes if takes > 0 else float(rate > 0)
        return used

    def explain(self) -> str:
        """Return the rule."""
        return f"replicas so that each uses {TARGET:.0%}, down after {DOWN_S:g} s; lengths of the trace are known"


class LowestClock:
    """As many replicas as the peak needs at full clock, each at the lowest clock that takes its share of the rate."""

    def __init__(self, given: Given) -> None:
        self._given, self._rates = given, _Rates(given)
        fleet = given.fleet
        made = plan(fleet.without_clocks(), given.profiles, given.load(given.most(0.0, float("inf"))))
        nodes = {node.name: node for node in fleet.nodes}
        self._full = {(s, replace(point, node=nodes[point.node.name])): n for (s, point), n in target_of(made).items()}
        self._load = given.load({})

    def observe(self, seen: Observation) -> None:
        """Take what came."""
        self._rates.observe(seen)

    def decide(self) -> Target:
        """Return the replicas at their clocks."""
        target: Counter[tuple[int, OperatingPoint]] = Counter()
        for (s, point), count in self._full.items():
            target[s, self._lowest(s, point)] += count
        return target

    def _lowest(self, s: int, point: OperatingPoint) -> OperatingPoint:
        """Return the point at the lowest clock at which the service's replicas, all slowed alike, take its rate."""
        mine = {p: n for (of, p), n in self._full.items() if of == s}
        for i, clock in enumerate((*point.node.clocks, UNSET)):
            slowed = {self._at(p, i): n for p, n in mine.items()}
            if self._used(s, slowed) * MARGIN <= 1:
                return replace(point, clock=clock)
        return point

    @staticmethod
    def _at(point: OperatingPoint, i: int) -> OperatingPoint:
        clocks = point.node.clocks
        return replace(point, clock=clocks[i] if i < len(clocks) else UNSET)

    def _used(self, s: int, present: dict[OperatingPoint, int]) -> float:
        service = self._given.fleet.services[s]
        kinds = [d.kind for d in self._load.demands if d.service == service.name]
        used = 0.0
        for c, kind in enumerate(kinds):
            takes = sum(n * capacity(p, kind, service.attainment).rate for p, n in present.items())
            rate = self._rates.rate(s, c)
            used += rate / takes if takes > 0 else (2.0 if rate > 0 else 0.0)
        return used

    def explain(self) -> str:
        """Return the rule."""
        return f"replicas for the peak of the trace; clocks with {MARGIN:g} times the rate of the last {SEEN_S:g} s"


def reactive(given: Given) -> Reactive:
    """Return the autoscaler."""
    return Reactive(given)


def lowest_clock(given: Given) -> LowestClock:
    """Return the policy of clocks alone."""
    return LowestClock(given)
