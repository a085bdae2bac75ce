"""Plans of one service by whole models and by operators: the fewest devices whose cells take its load, then the watts.

Both are made of cells, judged by one model of queues over one profile. They differ in the cells that they may choose:
a plan by operators may choose every cell, whole models too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from llmbuild.fleet.capacity import Capacity, capacity
from llmbuild.fleet.operators.cell import Cell, Link, Phase, asked
from llmbuild.fleet.operators.placement import Level, placements, whole
from llmbuild.fleet.operators.profile import OperatorProfile
from llmbuild.spec.fleet import Basis, NodeClass, RequestClass, weakest

REPLICAS: tuple[Level, ...] = ("replica",)
"""Whole models, each on one device."""
APART: tuple[Level, ...] = ("replica", "operators")
"""The same, and operators apart."""
MODELS: tuple[Level, ...] = ("replica", "tensor")
"""Whole models, each on one device or divided over several."""
LAYERS: tuple[Level, ...] = ("replica", "tensor", "pipeline")
"""Whole models, and whole layers over several devices."""
OPERATORS: tuple[Level, ...] = ("replica", "tensor", "pipeline", "operators")
"""Everything: operators apart, and all of the above."""
MOST = 6
"""Devices of a cell, at most."""
_PHASES: tuple[Phase, ...] = ("prompt", "decode")

Mix = tuple[tuple[RequestClass, float], ...]
"""Classes of requests with their shares of the rate."""


@dataclass(frozen=True)
class Choice:
    """A cell for one phase, and what it takes of a mix of classes."""

    cell: Cell
    phase: Phase
    takes: Capacity

    @property
    def devices(self) -> int:
        """Return its devices."""
        return self.cell.devices

    @property
    def level(self) -> Level:
        """Return how its model is placed."""
        return self.cell.placement.level

    @property
    def name(self) -> str:
        """Return it in words."""
        of = {"both": "", "prompt": " for prompts", "decode": " for answers"}[self.phase]
        return f"{self.cell.placement.name}{of}"


@dataclass(frozen=True)
class CellPlan:
    """Cells for a rate, with devices and watts. Not `feasible`: no cell takes the mix, or there are too few devices."""

    rate: float
    cells: tuple[tuple[Choice, int], ...]
    devices: int
    host_w: float
    """The host's share of each device."""
    feasible: bool

    @property
    def watts(self) -> float:
        """Return the watts at the rate that it was made for, with hosts."""
        return self.watts_at(self.rate)

    def watts_at(self, rate: float) -> float:
        """Return the watts at another rate that it takes."""
        cells = [choice for choice, count in self.cells for _ in range(count)]
        phases = {choice.phase for choice in cells}
        drawn = sum(_watts(rate, [choice for choice in cells if choice.phase == phase]) for phase in phases)
        return self.devices * self.host_w + drawn

    @property
    def basis(self) -> Basis:
        """Return the weakest basis of what it stands on."""
        return weakest(["measured", *(choice.cell.profile.whole for choice, _ in self.cells)])

    @property
    def told(self) -> str:
        """Return the cells in words."""
        return "; ".join(f"{count} of {choice.name}" for choice, count in self.cells)


@dataclass(frozen=True)
class Table:
    """The choices for one mix of classes on one kind of device."""

    node: NodeClass
    choices: tuple[Choice, ...]

    def plan(self, rate: float, levels: Iterable[Level] = OPERATORS) -> CellPlan:
        """Return the plan of the fewest devices for a rate, phases together or apart."""
        sets = {frozenset(levels) & frozenset(each) for each in (REPLICAS, MODELS, LAYERS, OPERATORS)}
        found = []
        for allowed, phases in product(sorted(sets, key=len), (("both",), _PHASES)):  # what is in few may draw less
            parts = [self._covered(rate, phase, allowed) for phase in phases]
            cells = Counter[Choice]()
            for part in parts:
                cells.update(part or ())
            feasible = all(part is not None for part in parts)
            devices = sum(choice.devices for choice in cells.elements()) if feasible else 0
            if feasible and devices <= self.node.count:
                found.append(CellPlan(rate, tuple(cells.items()), devices, self.node.host_w, True))
        return min(found, key=lambda p: (p.devices, p.watts), default=CellPlan(rate, (), 0, 0.0, False))

    def _covered(self, rate: float, phase: Phase, levels: frozenset[Level]) -> list[Choice] | None:
        """Return the fewest devices' cells that take a rate of one phase; None where there are too few."""
        if rate <= 0:
            return []
        mine = [c for c in self.choices if c.phase == phase and c.level in levels and c.takes.rate > 0]
        best: dict[int, Choice] = {}
        for choice in mine:
            there = best.get(choice.devices)
            if there is None or choice.takes.rate > there.takes.rate:
                best[choice.devices] = choice
        takes: list[float] = [0.0]
        last: list[Choice | None] = [None]
        while takes[-1] < rate and len(takes) <= self.node.count:
            count = len(takes)
            ways = [(takes[count - n] + c.takes.rate, -n, c) for n, c in best.items() if n <= count]
            most = max(ways, key=lambda way: way[:2], default=(0.0, 0, None))
            takes.append(max(most[0], takes[-1]))
            last.append(most[2] if most[0] > takes[-2] else None)
        if takes[-1] < rate:
            return None
        found, left = [], len(takes) - 1
        while left > 0:
            chosen = last[left]
            left -= chosen.devices if chosen else 1
            found += [chosen] if chosen else []
        return _thriftier(rate, found, mine)


def _watts(rate: float, cells: Sequence[Choice]) -> float:
    """Return the watts of cells that share a rate by what they take, without hosts."""
    total = sum(c.takes.rate for c in cells)
    return sum(c.takes.base_w + c.takes.joules * rate * c.takes.rate / total for c in cells) if cells else 0.0


def _thriftier(rate: float, cells: list[Choice], others: Sequence[Choice]) -> list[Choice]:
    """Return cells of as many devices that draw less and still take the rate."""
    found, watts = cells, _watts(rate, cells)
    for i in range(len(found)):
        for other in others:
            if other.devices == found[i].devices:
                tried = [*found[:i], other, *found[i + 1 :]]
                drawn = _watts(rate, tried)
                if drawn < watts and sum(c.takes.rate for c in tried) >= rate:
                    found, watts = tried, drawn
    return found


@lru_cache(1 << 8)
def table(
    profiles: tuple[OperatorProfile, ...],
    node: NodeClass,
    link: Link,
    mix: Mix,
    attainment: float = 0.99,
    most: int = MOST,
) -> Table:
    """Return the choices for a mix: of a model's profiles, whole and divided, on devices that a link joins.

    `node` is one device, and `node.count` how many there are; `most` bounds the devices of a cell.
    """
    found = []
    for profile in profiles:
        places = [whole(profile.shape)]
        for count in range(2, most // profile.shape.devices + 1):
            places += placements(profile.shape, count)
        for place in places:
            cell = Cell(profile, place, link)
            for phase in ("both", *_PHASES):
                share = attainment if phase == "both" else 1 - (1 - attainment) / 2  # each phase may miss half
                takes = _mixed([(_takes(cell, node, kind, phase, share), part) for kind, part in mix])
                found.append(Choice(cell, phase, takes))
    return Table(node, tuple(found))


def _takes(cell: Cell, node: NodeClass, kind: RequestClass, phase: Phase, attainment: float) -> Capacity:
    of = asked(cell, node, kind, phase)
    return capacity(of.point, of.kind, attainment)


def _mixed(parts: Sequence[tuple[Capacity, float]]) -> Capacity:
    """Return what a cell takes of a mix: classes share it by time."""
    if any(each.rate <= 0 for each, share in parts if share > 0):
        return Capacity(0.0, 0.0, 0.0)
    rate = 1 / sum(share / each.rate for each, share in parts if share > 0)
    times = [(each, share, share * rate / each.rate) for each, share in parts if share > 0]
    base = sum(each.base_w * time for each, _, time in times)
    return Capacity(rate, base, sum(each.joules * share for each, share, _ in times))
