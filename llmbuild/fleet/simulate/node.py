"""Nodes of a simulated fleet, their slots, and which layouts they lack."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

from llmbuild.fleet.capacity import OperatingPoint
from llmbuild.fleet.plan.layouts import lacked
from llmbuild.fleet.policy import Target, wanted_of
from llmbuild.fleet.simulate.replica import Replica
from llmbuild.spec.fleet import Fleet, NodeClass
from llmbuild.spec.partitions import Layout, Slice

Key = tuple[int, OperatingPoint]


class Slot:
    """A device of a node, or a slice of one: empty, loading, or with a replica."""

    __slots__ = ("key", "node", "part", "replica", "since_s", "until_s")

    def __init__(self, node: Node, part: Slice | None = None) -> None:
        self.node, self.part = node, part
        self.key: Key | None = None
        self.replica: Replica | None = None
        self.since_s = self.until_s = 0.0

    @property
    def bare_w(self) -> float:
        """Return its watts while it is empty: of a slice, its share of the board's."""
        return self.node.kind.bare_w * (1.0 if self.part is None else self.part.memory_share)

    @property
    def load_w(self) -> float:
        """Return its watts while a replica loads."""
        if self.key is None:
            return self.bare_w
        point = self.key[1]
        return max(point.parked_w, point.power.rows_w(1.0)) if point.power else point.parked_w


class Node:
    """A machine: off, booting, on, changing its layout, or failed."""

    def __init__(self, kind: NodeClass, name: str) -> None:
        self.kind, self.name = kind, name
        self.state: Literal["off", "boot", "on", "change", "failed"] = "off"
        self.since_s = 0.0
        self.empty_s = 0.0
        self.epoch = 0
        """Counts failures and shutdowns: what was due for an earlier one is void."""
        self.next: Layout | None = None
        """What it is drained for."""
        self.divide(kind.partitions.now if kind.partitions else None)

    def divide(self, layout: Layout | None) -> None:
        """Take other slots; the node holds nothing."""
        self.layout = layout
        parts: Sequence[Slice | None] = layout.slices if layout else (None,)
        self.slots = [Slot(self, part) for _ in range(self.kind.slots) for part in parts]

    @property
    def empty(self) -> bool:
        """Return whether nothing runs, loads or waits on it."""
        return all(slot.key is None for slot in self.slots)

    @property
    def on_w(self) -> float:
        """Return the watts of a node that is on, besides its slots: of its host, and of what no slice has."""
        unused = 1 - self.layout.memory_share if self.layout else 0.0
        return self.kind.host_w + self.kind.slots * self.kind.bare_w * unused


def lacking(
    fleet: Fleet, kind: NodeClass, nodes: Iterable[Node], target: Target
) -> tuple[Counter[Layout], Counter[Layout]]:
    """Return the layouts that a class of nodes lacks for a target, and those of which it has too many."""
    there = (node.next or node.layout for node in nodes if node.kind is kind and node.state in ("on", "boot", "change"))
    return lacked(fleet, kind, (layout for layout in there if layout), wanted_of(target, kind.name))


def layout_with(fleet: Fleet, kind: NodeClass, part: Slice) -> Layout | None:
    """Return the layout that has most slots of one kind; None where no layout that is allowed has one."""
    some = [layout for layout in fleet.layouts(kind) if part in layout.slices]
    return max(some, key=lambda layout: layout.slices.count(part), default=None)


def denied(fleet: Fleet, target: Target) -> int:
    """Return how many replicas of a target need a layout that the nodes have not and must not take."""
    return sum(
        count
        for (_, point), count in target.items()
        if point.part is not None and layout_with(fleet, fleet.node_class(point.node.name), point.part) is None
    )
