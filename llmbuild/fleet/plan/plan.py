"""Make a plan: relax, round, search; exactly where the program is small. Shortage comes first, then the objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, inf
from time import monotonic

from llmbuild.fleet.capacity import OperatingPoint, steady
from llmbuild.fleet.plan.layouts import Columns, Nodes
from llmbuild.fleet.plan.load import Load
from llmbuild.fleet.plan.program import Nearest, Option, Program, nearest, program
from llmbuild.fleet.plan.relax import Relaxed, exact, relaxed
from llmbuild.fleet.plan.rounding import Rounding
from llmbuild.spec.fleet import Basis, Fleet, Profile, RequestClass, weakest
from llmbuild.spec.partitions import Layout

SMALL = 60
"""Whole numbers of a program up to which it is solved exactly, as far as `BRANCHES` go."""
BRANCHES = 3000
"""Nodes of the search tree of an exact program: some 2 s at most on one core."""
MOVES = 12_000
"""Moves of the local search that are looked at, over all its beginnings. A count, not a time: equal loads have equal
plans on every machine."""


@dataclass(frozen=True)
class Served:
    """A class of requests on an assignment: how many, and how it is expected to fare."""

    kind: RequestClass
    rate: float
    miss: float
    """Expected share of requests that miss their SLO, at most."""


@dataclass(frozen=True)
class Assignment:
    """Replicas of one operating point for one service, and why they are these."""

    service: str
    point: OperatingPoint
    replicas: int
    served: tuple[Served, ...]
    used: float
    """Share of the capacity that is used."""
    watts: float
    """Of all its replicas, without hosts and empty slots."""
    why: str


@dataclass(frozen=True)
class Shortage:
    """Requests of a class that find no place, and what would give them one."""

    service: str
    kind: RequestClass
    rate: float
    of: float
    told: str


@dataclass(frozen=True)
class Plan:
    """Which operating points run where, how many, for a load; with a bound of what any plan costs."""

    fleet: Fleet
    load: Load
    assignments: tuple[Assignment, ...]
    nodes: tuple[int, ...]
    """Nodes that are on, by class of nodes."""
    layouts: tuple[tuple[tuple[Layout, int], ...], ...]
    """Nodes by layout, by class of nodes; nothing for a class without partitions."""
    shortages: tuple[Shortage, ...]
    watts: float
    """Of the whole fleet, with hosts and empty slots; nodes that are off draw nothing."""
    price_per_h: float
    cost: float
    """In the unit of the objective, of the program."""
    bound: float
    """No plan for this load costs less, by the program."""
    shortage: float
    """Requests a second without a place, by priority."""
    least_shortage: float
    """No plan has less, by the program."""
    method: str
    seconds: float

    @property
    def gap(self) -> float:
        """Return how far the cost may be from the best one, as a share of the cost."""
        return max(0.0, (self.cost - self.bound) / self.cost) if self.cost > 0 else 0.0

    @property
    def basis(self) -> Basis:
        """Return the weakest basis of what the plan stands on."""
        watts = {a.point.node.watts_basis for a in self.assignments}
        clocks = {a.point.clock.basis for a in self.assignments}
        return weakest(["measured", *(a.point.profile.basis for a in self.assignments), *watts, *clocks])

    @property
    def feasible(self) -> bool:
        """Return whether every request finds a place."""
        return not self.shortages


@dataclass(frozen=True)
class Held:
    """What runs now: replicas by service and operating point, and for how long a change must pay."""

    replicas: tuple[tuple[str, OperatingPoint, int], ...]
    horizon_s: float
    layouts: tuple[tuple[tuple[Layout, int], ...], ...] | None = None
    """Nodes that are on by layout, by class of nodes; the fewest for the replicas where they are not given."""


def plan(
    fleet: Fleet,
    profiles: Sequence[Profile],
    load: Load,
    max_nodes: int | None = None,
    held: Held | None = None,
    small: int = SMALL,
    moves: int = MOVES,
    keep: bool = False,
) -> Plan:
    """Return a plan for a load; with `held` one that pays for starting what does not run yet.

    With `keep` all that is held stays, but for its clock, and only what is missing is added. A fleet's share of
    requests that find no place is least by priority, whatever it costs; then the objective is least.
    """
    began = monotonic()
    asked = program(fleet, profiles, load, max_nodes)
    least = relaxed(asked)
    if keep and held is not None:
        current = _current(asked, held)
        kept = _searched(asked, current, current, held, moves, keep)
        replicas, bound, method = kept.replicas, least.bound, "what is held, and what is missing"
    else:
        replicas, bound, method = _whole(asked, least, held, small, moves)
    found = _Found(replicas, bound, least.shortage, method, held)
    return _made(asked, profiles, load, found, monotonic() - began)


@dataclass(frozen=True)
class Worth:
    """What replicas come to under a load: requests without a place by priority, cost, and the cost of their starts."""

    shortage: float
    cost: float
    starts: float


def worth(fleet: Fleet, profiles: Sequence[Profile], load: Load, held: Held, made: Plan | None = None) -> Worth:
    """Return what is held comes to under a load; or what a plan does, with the starts from what is held."""
    asked = program(fleet, profiles, load)
    current = _current(asked, held)
    replicas = current
    if made is not None:
        replicas = _current(asked, Held(tuple((a.service, a.point, a.replicas) for a in made.assignments), inf))
    rounding = Rounding(asked, current, layouts=_layouts(asked, held))
    rounding.place(replicas)
    shortage, cost = rounding.value()
    return Worth(shortage, cost, rounding.starts())


def cheapest(fleet: Fleet, profiles: Sequence[Profile], load: Load, service: int) -> list[OperatingPoint]:
    """Return the best operating point of a service on each class of nodes, the least cost for each request first."""
    asked = program(fleet, profiles, load)
    mine = sorted((o for o in asked.options if o.service == service), key=lambda o: _whole_cost(asked, o))
    found: dict[int, OperatingPoint] = {}
    for option in mine:
        if all(take.rate > 0 for take in option.takes):
            found.setdefault(option.node, option.point)
    return list(found.values())


def _whole(asked: Program, least: Relaxed, held: Held | None, small: int, moves: int) -> tuple[list[int], float, str]:
    """Return whole replicas, a bound of the cost, and how they were found."""
    current = None if held is None else _current(asked, held)
    found = [_searched(asked, start, current, held, moves) for start in _starts(least, current)]
    best = min(found, key=lambda each: each.value())
    whole = len(asked.options) + sum(len(of.layouts) for of in asked.columns)
    if held is None and whole <= small and least.shortage <= 0:
        solved = exact(asked, tuple((0.0,) * len(rates) for rates in asked.demands), BRANCHES)
        if solved is not None:
            bound = max(least.bound, solved.bound)
            better = Rounding(asked)
            better.place(solved.replicas)
            if better.value() < best.value():
                best = better
            return best.replicas, bound, "exact" if solved.proven else "exact, cut short"
    return best.replicas, least.bound, "relaxed, rounded and searched"


def _starts(least: Relaxed, current: list[int] | None) -> list[list[int]]:
    """Return where the search begins: from the relaxation, rounded down or up, and from what runs."""
    down = [floor(x + 1e-6) for x in least.replicas]
    near = [round(x) for x in least.replicas]
    up = [ceil(x - 1e-6) for x in least.replicas]
    return [down, near, up] if current is None else [down, near, current]


def _searched(
    asked: Program, start: Sequence[int], current: list[int] | None, held: Held | None, moves: int, keep: bool = False
) -> Rounding:
    rounding = Rounding(asked, current, held.horizon_s, _layouts(asked, held), keep) if held else Rounding(asked)
    rounding.place(_allowed(asked, start))
    rounding.fill()
    rounding.improve(moves // 3)
    return rounding


def _allowed(asked: Program, start: Sequence[int]) -> list[int]:
    """Return replicas cut to the slots and nodes that there are."""
    used, kept = [0] * len(asked.places), []
    for option, count in zip(asked.options, start, strict=True):
        used[option.place] += count
        taken = count
        while taken and not asked.fits(used):
            taken -= 1
            used[option.place] -= 1
        kept.append(taken)
    return kept


def _layouts(asked: Program, held: Held) -> list[Nodes | None]:
    """Return the nodes that are on by layout, in the order of the program's columns; None where they are not known."""
    found: list[Nodes | None] = []
    for of, have in zip(asked.columns, held.layouts or ((),) * len(asked.columns), strict=True):
        if held.layouts is None or of.layouts == (None,):
            found.append(None)
            continue
        nodes = [0] * len(of.layouts)
        for layout, count in have:  # alike are layouts whose slots are alike, as far as anything can use them
            slots = _slots(layout, of)
            alike = (i for i, one in enumerate(of.layouts) if one and _slots(one, of) == slots)
            at = next(alike, None)
            if at is not None:
                nodes[at] += count
        found.append(tuple(nodes))
    return found


def _slots(layout: Layout, of: Columns) -> tuple[int, ...]:
    return tuple(layout.slices.count(part) for part in of.parts if part)


def _current(asked: Program, held: Held) -> list[int]:
    running = {(service, point): count for service, point, count in held.replicas}
    names = [service.name for service in asked.fleet.services]
    return [running.get((names[option.service], option.point), 0) for option in asked.options]


@dataclass(frozen=True)
class _Found:
    """Whole replicas, the bounds of their cost and shortage, and how they were found."""

    replicas: Sequence[int]
    bound: float
    least_shortage: float
    method: str
    held: Held | None = None


def _made(asked: Program, profiles: Sequence[Profile], load: Load, found: _Found, seconds: float) -> Plan:
    """Return the plan of whole replicas."""
    replicas = found.replicas
    rounding = Rounding(asked)
    rounding.place(replicas)
    fits = [rounding.fit(s, rounding.counts(s)) for s in range(len(asked.demands))]
    flows = {key: flow for fit in fits for key, flow in fit.flows.items()}
    assignments = tuple(_assignment(asked, o, count, flows) for o, count in enumerate(replicas) if count)
    layouts = _settled(asked, found)
    nodes = tuple(sum(each) for each in layouts)
    watts = sum(a.watts - a.replicas * a.point.bare_w for a in assignments)  # a node's own count all its slots as bare
    watts += sum(count * node.idle_w for count, node in zip(nodes, asked.fleet.nodes, strict=True))
    return Plan(
        fleet=asked.fleet,
        load=load,
        assignments=assignments,
        nodes=nodes,
        layouts=tuple(
            tuple((layout, n) for layout, n in zip(of.layouts, each, strict=True) if layout and n)
            for of, each in zip(asked.columns, layouts, strict=True)
        ),
        shortages=tuple(_shortages(asked, profiles, [fit.missing for fit in fits])),
        watts=watts,
        price_per_h=sum(count * node.price_per_h for count, node in zip(nodes, asked.fleet.nodes, strict=True)),
        cost=rounding.value()[1],
        bound=found.bound,
        shortage=rounding.value()[0],
        least_shortage=found.least_shortage,
        method=found.method,
        seconds=seconds,
    )


def _settled(asked: Program, found: _Found) -> tuple[Nodes, ...]:
    """Return the nodes that are on by layout, near to those that are held."""
    held = found.held
    rounding = Rounding(asked)
    if held is not None:
        rounding = Rounding(asked, _current(asked, held), layouts=_layouts(asked, held))
    rounding.place(found.replicas)
    return rounding.layouts()


def _assignment(asked: Program, o: int, count: int, flows: dict[tuple[int, int], float]) -> Assignment:
    option = asked.options[o]
    kinds = asked.kinds[option.service]
    rates = [flows.get((o, c), 0.0) for c in range(len(kinds))]
    used = sum(rate / option.takes[c].rate for c, rate in enumerate(rates) if rate) / count
    served, watts = [], 0.0
    for c, (kind, rate) in enumerate(zip(kinds, rates, strict=True)):
        if rate:
            state = steady(option.point, kind, used * option.takes[c].rate)
            served.append(Served(kind, rate, state.miss))
            watts += count * state.watts * rate / option.takes[c].rate / (used * count)
    if not served:
        watts = count * option.point.parked_w
    service = asked.fleet.services[option.service].name
    return Assignment(service, option.point, count, tuple(served), used, watts, _why(asked, option))


def _why(asked: Program, chosen: Option) -> str:
    """Return the reason for an option: what a request costs on it, and on the next best one elsewhere."""
    mine = _whole_cost(asked, chosen)
    others = [o for o in asked.options if o.service == chosen.service and o.point != chosen.point]
    told = f"{mine:.3g} {_UNIT[asked.fleet.objective]} for each request at full use{_estimate(chosen)}"
    if not others:
        return f"{told}; no other point meets the SLO"
    best = min(others, key=lambda o: _whole_cost(asked, o))
    theirs = _whole_cost(asked, best)
    if theirs >= mine:
        return f"{told}, the least; next: {best.point.name}, {theirs:.3g}"
    return f"{told}; {best.point.name} has {theirs:.3g}, but its slots are taken or one more replica of it costs more"


def _estimate(chosen: Option) -> str:
    """Return how far an estimated profile may be off."""
    profile = chosen.point.profile
    if not profile.estimate:
        return ""
    return f" by an estimate: nine of ten are within a factor of {1 + profile.error:.2g}"


_UNIT = {"energy": "J", "cost": "price units", "nodes": "nodes x s"}


def _whole_cost(asked: Program, option: Option) -> float:
    """Return what a request costs on a full replica, its share of the node included."""
    replica = option.hold + asked.node_cost[option.node] * asked.share(option)
    kinds = [(c, take) for c, take in enumerate(option.takes) if take.rate > 0]
    return min(replica / take.rate + option.costs[c] for c, take in kinds)


def _shortages(asked: Program, profiles: Sequence[Profile], missing: Sequence[tuple[float, ...]]) -> list[Shortage]:
    """Return what finds no place, and what would give it one."""
    found = []
    for s, service in enumerate(asked.fleet.services):
        for c, (kind, rate) in enumerate(zip(asked.kinds[s], missing[s], strict=True)):
            if rate > 0:
                told = _remedy(asked, s, c, rate, nearest(asked.fleet, profiles, service, kind))
                found.append(Shortage(service.name, kind, rate, asked.demands[s][c], told))
    return found


def _remedy(asked: Program, s: int, c: int, rate: float, near: Nearest | None) -> str:
    """Return what is missing: nodes, or an operating point that meets the SLO at all."""
    takers = [o for o in asked.options if o.service == s and o.takes[c].rate > 0]
    if takers:
        best = max(takers, key=lambda o: o.takes[c].rate / asked.share(o))
        node = asked.fleet.nodes[best.node]
        count = ceil(rate / best.takes[c].rate * asked.share(best) - 1e-9)
        limit = "" if asked.max_nodes is None else f" and a limit above {asked.max_nodes} nodes"
        return f"{count} more of {node.name}{limit} would take it ({best.takes[c].rate:.3g}/s on each slot)"
    service = asked.fleet.services[s]
    if near is None:
        devices = ", ".join(sorted({node.device for node in asked.fleet.nodes}))
        return f"no profile of {service.model} for {devices} that meets the quality: give one in `profiles`"
    parts = [
        f"{name} {value:.3g} s on an idle replica, {limit:g} s asked"
        for name, value, limit in (("ttft_s", near.ttft_s, near.kind.ttft_s), ("tpot_s", near.tpot_s, near.kind.tpot_s))
        if value > limit
    ]
    if not parts:
        parts = [f"a mean request meets it idle, but not {service.attainment:.4g} of requests of these lengths"]
    return f"no point meets its SLO; nearest {near.where}: {'; '.join(parts)}"
