"""Ours: a plan for what is forecast, changed where that pays or where capacity is short; and the clairvoyant one.

Both change a running plan by the same rules. Capacity that is short comes at once. A saving must, over the horizon, be
more than twice what its starts cost, and what was needed lately is not given away: it could not come back in time.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from math import ceil

from llmbuild.fleet.capacity import capacity
from llmbuild.fleet.plan.load import Load
from llmbuild.fleet.plan.plan import Held, Plan, plan, worth
from llmbuild.fleet.policies.forecast import BIN_S, Forecast, Z
from llmbuild.fleet.policy import WINDOW_S, Given, Observation, Target, target_of
from llmbuild.spec.fleet import Fleet

SLOW_S = 60.0
"""Seconds between two looks for a saving."""
HORIZON_S = 900.0
"""Seconds over which a change must pay."""
OVER_S = 30.0
"""Seconds over which the clairvoyant policy takes rates: bursts that are longer find a place."""
WORTH = 2.0
"""How many times its own cost a change must save."""


def lead_s(given: Given) -> float:
    """Return the seconds from a decision to a replica that serves, on a node that is off."""
    load_s = max((p.load_s for p in given.profiles), default=0.0)
    return max(node.boot_s for node in given.fleet.nodes) + load_s


@dataclass(frozen=True)
class Parts:
    """Which parts of the policy are in use: all of them, but where a study asks what each is worth."""

    headroom: bool = True
    """Plan for more than the level of the rate, by the errors of the forecast."""
    trend: bool = True
    """Take a rise of the rate to go on until a new replica serves."""
    hold: bool = True
    """Keep what was needed within twice the time that a start takes."""
    worth: bool = True
    """Change for a saving where it is `WORTH` times the cost of its starts; without, for any saving."""
    urgent: bool = True
    """Look for a shortage in each period, at the rate of the last window; without, once in `SLOW_S`."""
    clocks: bool = True
    """Set the clocks of nodes."""


ALL = Parts()


class Planned:
    """What runs, by the last plan; and the rules by which a new one takes its place."""

    def __init__(self, given: Given, load: Load, worth: float = WORTH) -> None:
        self._given = given
        self._worth = worth
        self._fleet = given.fleet
        self.target: Target = {}
        self.told = ""
        self._take(plan(given.fleet, given.profiles, load), "begins")

    def _take(self, made: Plan, why: str) -> None:
        self.target = target_of(made)
        self._layouts = made.layouts
        self.told = f"{why}: planned for {made.load.rate:.3g}/s, {sum(self.target.values())} replicas"

    def nodes_lost(self, failed: dict[str, int]) -> None:
        """Plan without nodes that have failed."""
        counts = {node.name: node.count - failed.get(node.name, 0) for node in self._given.fleet.nodes}
        self._fleet = self._given.fleet.with_counts(counts)

    def change(self, load: Load, urgent: bool) -> None:
        """Take a new plan where the present one is short, or where a new one saves enough."""
        fleet = self._fleet
        names = [service.name for service in fleet.services]
        nodes = {node.name: node for node in fleet.nodes}
        running = tuple(
            (names[s], replace(point, node=nodes[point.node.name]), count) for (s, point), count in self.target.items()
        )
        held = Held(running, HORIZON_S, self._layouts)
        now = worth(fleet, self._given.profiles, load, held)
        if urgent and now.shortage <= 0:
            return
        if now.shortage > 0:  # what runs goes on: what takes its place would come late
            more = plan(fleet, self._given.profiles, load, held=held, keep=True)
            if more.shortage <= more.least_shortage + 1e-9:
                self._take(self._whole(more), "capacity was short")
                return
        made = plan(fleet, self._given.profiles, load, held=held)
        then = worth(fleet, self._given.profiles, load, held, made)
        if then.shortage < now.shortage - 1e-9:
            self._take(self._whole(made), "capacity was short")
        elif then.shortage <= now.shortage + 1e-9 and (now.cost - then.cost) * HORIZON_S > self._worth * then.starts:
            self._take(self._whole(made), "saves")

    def _whole(self, made: Plan) -> Plan:
        """Return a plan whose points stand on the classes of nodes of the whole fleet."""
        nodes = {node.name: node for node in self._given.fleet.nodes}
        assignments = tuple(replace(a, point=replace(a.point, node=nodes[a.point.node.name])) for a in made.assignments)
        return replace(made, assignments=assignments)


class Adaptive:
    """Plans for a forecast that it makes of what it sees."""

    def __init__(self, given: Given, parts: Parts = ALL) -> None:
        self._parts = parts
        lead = lead_s(given)
        self._forecast = Forecast(given.fleet, Z if parts.headroom else 0.0, lead if parts.trend else 0.0)
        self._forecast.begin(given.most(0.0, WINDOW_S))
        windows = ceil(2 * lead / BIN_S) if parts.hold else 1
        self._kept = {key: deque([rate], windows) for key, rate in self._forecast.rates().items()}
        self._given = given if parts.clocks else replace(given, fleet=given.fleet.without_clocks())
        self._planned = Planned(self._given, self._load(), WORTH if parts.worth else 0.0)
        self._slow_s = 0.0
        self._seen: Observation | None = None

    def _load(self) -> Load:
        """Return the load that is planned for: the largest of what is kept."""
        return self._forecast.load({key: max(kept) for key, kept in self._kept.items()})

    def observe(self, seen: Observation) -> None:
        """Take what came, and which nodes have failed."""
        self._seen = seen
        if self._forecast.observe(seen):
            for key, rate in self._forecast.rates().items():
                self._kept[key].append(max(rate, self._forecast.last[key]))
        if self._parts.urgent:  # a burst is seen before its window ends
            for key, rate in self._forecast.now().items():
                self._kept[key][-1] = max(self._kept[key][-1], rate)
        self._planned.nodes_lost(dict(seen.failed))

    def decide(self) -> Target:
        """Return the present plan, or a new one."""
        assert self._seen is not None
        now = self._seen.now_s
        if now <= 0:
            return self._planned.target
        slow = now - self._slow_s >= SLOW_S - 1e-9
        if slow:
            self._slow_s = now
        load = self._load()
        if slow or (self._parts.urgent and short(self._given.fleet, load, self._planned.target)):
            self._planned.change(load, urgent=not slow)
        return self._planned.target

    def explain(self) -> str:
        """Return the reason of the last change, and how good the forecast was."""
        forecast = self._forecast
        share = forecast.covered / forecast.windows if forecast.windows else 1.0
        return f"{self._planned.told}; {share:.0%} of the windows were within the forecast"


class Oracle:
    """Plans for the rates that will come until a change could help; it knows the trace. No proof of optimality."""

    def __init__(self, given: Given) -> None:
        self._given = given
        self._lead_s = lead_s(given) + WINDOW_S
        self._planned = Planned(given, self._load(0.0))
        self._seen: Observation | None = None
        self._slow_s = 0.0

    def _load(self, now: float) -> Load:
        return self._given.load(self._given.most(now, now + self._lead_s, OVER_S))

    def observe(self, seen: Observation) -> None:
        """Take the time, and which nodes have failed."""
        self._seen = seen
        self._planned.nodes_lost(dict(seen.failed))

    def decide(self) -> Target:
        """Return the present plan, or a new one."""
        assert self._seen is not None
        now = self._seen.now_s
        if now > 0 and now - self._slow_s >= WINDOW_S / 2 - 1e-9:
            self._slow_s = now
            self._planned.change(self._load(now), urgent=False)
        return self._planned.target

    def explain(self) -> str:
        """Return the reason of the last change."""
        return self._planned.told


def short(fleet: Fleet, load: Load, target: Target) -> bool:
    """Return whether a target may be too small for a load, quickly: classes share replicas in proportion."""
    for s, service in enumerate(fleet.services):
        demands = [d for d in load.demands if d.service == service.name]
        places = [(point, count) for (of, point), count in target.items() if of == s]
        used = 0.0
        for demand in demands:
            takes = sum(n * capacity(p, demand.kind, service.attainment).rate for p, n in places)
            used += demand.rate / takes if takes > 0 else (2.0 if demand.rate > 0 else 0.0)
        if used > 1:
            return True
    return False


def adaptive(given: Given) -> Adaptive:
    """Return our policy."""
    return Adaptive(given)


def oracle(given: Given) -> Oracle:
    """Return the clairvoyant policy."""
    return Oracle(given)
