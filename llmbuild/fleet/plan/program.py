"""The program of a plan: operating points with what they take of each class, and the nodes they stand on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

from llmbuild.fleet.capacity import NONE, Capacity, OperatingPoint, capacity, floor
from llmbuild.fleet.plan.layouts import Columns, columns
from llmbuild.fleet.plan.load import Load
from llmbuild.fleet.profiles.divided import device_of
from llmbuild.spec.fleet import UNSET, Fleet, NodeClass, Profile, RequestClass, Service
from llmbuild.spec.partitions import Slice

LADDER = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
"""Batch limits that are tried."""


@dataclass(frozen=True)
class Option:
    """An operating point for one service, and what it takes of each of its classes."""

    service: int
    """Index of the service."""
    node: int
    """Index of the class of nodes."""
    point: OperatingPoint
    takes: tuple[Capacity, ...]
    """By class of the service; a rate of 0 where the class's SLO does not hold."""
    hold: float
    """Cost of a replica, besides its node and its requests."""
    costs: tuple[float, ...]
    """Cost of each request, by class."""
    start: float
    """Cost of starting a replica, in the unit of `hold` times seconds."""
    place: int = 0
    """Index of its place."""


@dataclass(frozen=True)
class Place:
    """A kind of slot of a class of nodes."""

    node: int
    """Index of the class."""
    part: int
    """Index of the kind of slot in the class's columns."""


@dataclass(frozen=True)
class Program:
    """What is asked: demands, options, nodes with their costs, and the most nodes that may be on."""

    fleet: Fleet
    demands: tuple[tuple[float, ...], ...]
    """Requests a second by service and class."""
    kinds: tuple[tuple[RequestClass, ...], ...]
    options: tuple[Option, ...]
    node_cost: tuple[float, ...]
    """Of a node that is on, by class of nodes."""
    boot_cost: tuple[float, ...]
    """Of turning a node on, in that unit times seconds."""
    columns: tuple[Columns, ...]
    """Layouts by class of nodes."""
    places: tuple[Place, ...]
    change_cost: tuple[float, ...]
    """Of another layout for a node, in the unit of `start`, by class of nodes."""
    max_nodes: int | None = None

    def of_service(self, service: int) -> tuple[int, ...]:
        """Return the indices of the options of a service."""
        return tuple(i for i, option in enumerate(self.options) if option.service == service)

    def alike(self) -> tuple[int, ...]:
        """Return a number for each option that those share which differ by their clock alone."""
        kinds: dict[object, int] = {}
        keys = [(o.service, o.node, o.point.part, o.point.profile, o.point.batch) for o in self.options]
        return tuple(kinds.setdefault(key, len(kinds)) for key in keys)

    @cached_property
    def _kinds(self) -> tuple[tuple[Columns, int, int], ...]:
        """The columns of each class of nodes, and its first place and the one after its last."""
        ends = tuple(accumulate((len(of.parts) for of in self.columns), initial=0))
        return tuple((of, ends[k], ends[k + 1]) for k, of in enumerate(self.columns))

    @property
    def slots(self) -> tuple[int, ...]:
        """Return how many slots each place has at most."""
        nodes = self.fleet.nodes
        return tuple(self.columns[p.node].most(p.part, nodes[p.node].count) for p in self.places)

    def wanted(self, node: int, used: Sequence[int]) -> tuple[int, ...]:
        """Return the slots of a class of nodes that are used, by kind; `used` is by place."""
        _, first, last = self._kinds[node]
        return tuple(used[first:last])

    def nodes(self, used: Sequence[int]) -> list[int]:
        """Return the fewest nodes that have these slots, by class of nodes."""
        return [of.nodes(tuple(used[first:last])) for of, first, last in self._kinds]

    def fits(self, used: Sequence[int]) -> bool:
        """Return whether there are nodes for these slots."""
        nodes = self.nodes(used)
        if any(count > node.count for count, node in zip(nodes, self.fleet.nodes, strict=True)):
            return False
        return self.max_nodes is None or sum(nodes) <= self.max_nodes

    def share(self, option: Option) -> float:
        """Return the share of a node that a replica of an option takes at least."""
        return self.columns[option.node].weights[self.places[option.place].part]


def program(fleet: Fleet, profiles: Sequence[Profile], load: Load, max_nodes: int | None = None) -> Program:
    """Return the program of a fleet under a load."""
    kinds = tuple(tuple(d.kind for d in load.demands if d.service == s.name) for s in fleet.services)
    demands = tuple(tuple(d.rate for d in load.demands if d.service == s.name) for s in fleet.services)
    found = [
        option
        for s, service in enumerate(fleet.services)
        for k, node in enumerate(fleet.nodes)
        for part in slots_of(fleet, node)
        for option in _options(fleet, s, k, part, kinds[s], serving(profiles, service, node, part))
    ]
    divided = tuple(columns(fleet, node, _useful(found, k)) for k, node in enumerate(fleet.nodes))
    places = tuple(Place(k, p) for k, of in enumerate(divided) for p in range(len(of.parts)))
    index = {(place.node, divided[place.node].parts[place.part]): i for i, place in enumerate(places)}
    options = tuple(replace(o, place=index[o.node, o.point.part]) for o in found if (o.node, o.point.part) in index)
    costs = tuple(_node_cost(fleet, node) for node in fleet.nodes)
    return Program(
        fleet=fleet,
        demands=demands,
        kinds=kinds,
        options=options,
        node_cost=costs,
        boot_cost=tuple(cost * node.boot_s for cost, node in zip(costs, fleet.nodes, strict=True)),
        columns=divided,
        places=places,
        change_cost=tuple(_change_cost(options, k, node, costs[k]) for k, node in enumerate(fleet.nodes)),
        max_nodes=max_nodes,
    )


def slots_of(fleet: Fleet, node: NodeClass) -> tuple[Slice | None, ...]:
    """Return the kinds of slots that a class of nodes may have."""
    return columns(fleet, node).parts


def _useful(options: Sequence[Option], node: int) -> set[Slice]:
    return {o.point.part for o in options if o.node == node and o.point.part is not None}


def _change_cost(options: Sequence[Option], k: int, node: NodeClass, cost: float) -> float:
    """Return the cost of a node's other layout: it is there for nobody while it changes and loads again."""
    if node.partitions is None:
        return 0.0
    load_s = max((o.point.profile.load_s for o in options if o.node == k), default=0.0)
    return cost * (node.partitions.change.seconds + load_s)


def serving(profiles: Iterable[Profile], service: Service, node: NodeClass, part: Slice | None = None) -> list[Profile]:
    """Return the profiles of a service's model on a class of nodes, or on a slice of them, that are good enough."""
    device = device_of(node, part)
    found = [p for p in profiles if p.device == device and p.model == service.model]
    if node.variants:
        found = [p for p in found if p.variant.startswith(node.variants)]
    return [p for p in found if all(_holds(bound.metric, bound.holds, p) for bound in service.quality)]


def _holds(metric: str, holds: object, profile: Profile) -> bool:
    return metric == "quality_kl" and callable(holds) and bool(holds(profile.quality_kl))


def points(
    service: Sequence[RequestClass], node: NodeClass, profile: Profile, part: Slice | None = None
) -> list[OperatingPoint]:
    """Return the operating points of a profile: for each class the largest batch that is fast enough, at each clock."""
    ladder = [b for b in LADDER if b < profile.max_rows] + [profile.max_rows]
    found = []
    for clock in (UNSET, *node.clocks):
        for kind in service:
            fast = [b for b in ladder if _fast(OperatingPoint(profile, node, b, clock, part), kind)]
            if fast:
                found.append(OperatingPoint(profile, node, fast[-1], clock, part))
    return list(dict.fromkeys(found))


def _fast(point: OperatingPoint, kind: RequestClass) -> bool:
    context = kind.prompt + kind.output * (1 + kind.spread**2) / 2
    return point.step.seconds(point.batch, point.batch * context, 0) <= kind.tpot_s


def _options(
    fleet: Fleet,
    s: int,
    k: int,
    part: Slice | None,
    kinds: tuple[RequestClass, ...],
    profiles: Sequence[Profile],
) -> Iterable[Option]:
    service, node = fleet.services[s], fleet.nodes[k]
    for point in (point for profile in profiles for point in points(kinds, node, profile, part)):
        takes = tuple(capacity(point, kind, service.attainment) for kind in kinds)
        if any(each is not NONE for each in takes):
            yield _priced(fleet, s, k, point, takes)


def _priced(fleet: Fleet, s: int, k: int, point: OperatingPoint, takes: tuple[Capacity, ...]) -> Option:
    """Return an option with costs in the unit of the objective: watts, price an hour, or nodes.

    With another objective than energy, watts count a millionth: they decide between what is else alike.
    """
    weight = 1.0 if fleet.objective == "energy" else 1e-6
    base = max(each.base_w for each in takes) - point.bare_w
    joules = tuple(each.joules for each in takes)
    load_j = point.profile.load_s * (point.parked_w if point.power is None else point.power.rows_w(1.0))
    return Option(s, k, point, takes, weight * base, tuple(weight * j for j in joules), weight * load_j)


def _node_cost(fleet: Fleet, node: NodeClass) -> float:
    watts = node.idle_w
    return {"energy": watts, "cost": node.price_per_h + 1e-6 * watts, "nodes": 1.0 + 1e-6 * watts}[fleet.objective]


@dataclass(frozen=True)
class Nearest:
    """How near a class comes to its SLO on an idle replica: why no operating point takes it."""

    service: str
    kind: RequestClass
    ttft_s: float
    tpot_s: float
    where: str


def nearest(fleet: Fleet, profiles: Sequence[Profile], service: Service, kind: RequestClass) -> Nearest | None:
    """Return the operating point that comes nearest to a class's SLO; None where no profile serves the model."""
    best: tuple[float, Nearest] | None = None
    for node in fleet.nodes:
        for part in slots_of(fleet, node):
            for profile in serving(profiles, service, node, part):
                point = OperatingPoint(profile, node, 1, part=part)
                ttft_s, tpot_s = floor(point, kind)
                over = max(ttft_s / kind.ttft_s, tpot_s / kind.tpot_s)
                if best is None or over < best[0]:
                    best = over, Nearest(service.name, kind, ttft_s, tpot_s, f"{profile.variant} on {point.place}")
    return best[1] if best else None
