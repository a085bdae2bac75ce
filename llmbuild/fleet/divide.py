"""Which node of a running fleet is to take another layout, and what must go before: a pure function.

A node is chosen by what the target wants of its class. What it holds is closed and drained, unless the fleet file does
not allow partitions: then nothing is drained for what will be denied. Only an empty node is divided.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from llmbuild.fleet.actuators.interface import Live, SetPartition
from llmbuild.fleet.plan.layouts import lacked
from llmbuild.fleet.policy import Target, wanted_of
from llmbuild.spec.fleet import Fleet, Guarded, NodeClass
from llmbuild.spec.partitions import Layout, placed

_PARTITION: Guarded = "set_partition"


@dataclass(frozen=True)
class Divided:
    """How nodes are divided, as far as is known."""

    layouts: Mapping[str, Layout] = field(default_factory=dict)
    """By node; others have that of the fleet file."""
    changing: Collection[str] = ()
    """Nodes that take another layout now: they hold nothing until they have it."""
    refused: Collection[str] = ()
    """Nodes whose layout could not be changed: it stays."""

    def of(self, kind: NodeClass, node: str) -> Layout:
        """Return the layout of a node."""
        assert kind.partitions is not None
        return self.layouts.get(node, kind.partitions.now)


@dataclass(frozen=True)
class Division:
    """A node that is to take another layout: the action where it holds nothing, else what is to be drained."""

    node: str
    action: SetPartition | None
    drained: tuple[Live, ...]
    why: str


def divisions(
    fleet: Fleet, target: Target, live: Sequence[Live], closed: Collection[str], by: Divided
) -> list[Division]:
    """Return the nodes that are to take other layouts now, one of each class at most."""
    found = (_division(fleet, kind, target, live, closed, by) for kind in fleet.nodes if kind.partitions is not None)
    return [one for one in found if one is not None]


def _division(
    fleet: Fleet, kind: NodeClass, target: Target, live: Sequence[Live], closed: Collection[str], by: Divided
) -> Division | None:
    if any(node in by.changing for node in kind.nodes):
        return None
    free = [node for node in kind.nodes if node not in by.refused]
    asked = replace(fleet, actuators=(*fleet.actuators, _PARTITION))  # whether it is allowed is said where it is done
    more, less = lacked(asked, kind, (by.of(kind, node) for node in kind.nodes), wanted_of(target, kind.name))
    there = [node for node in free if by.of(kind, node) in less]
    if not more or not there:
        return None
    holds = {node: [one for one in live if one.slot.node == node] for node in there}

    def left(node: str) -> tuple[int, int]:
        serving = sum(one.name not in closed and one.state in ("starting", "ready") for one in holds[node])
        return serving, len(holds[node])

    node = min(there, key=left)
    layout = next(iter(more))
    why = f"{layout.name} in place of {by.of(kind, node).name} for what is wanted"
    if holds[node] and _PARTITION in fleet.actuators:
        return Division(node, None, tuple(holds[node]), why)
    assert kind.partitions is not None
    names = tuple(f"{each.name}@{start}" for each, start in placed(kind.partitions.gpu, layout))
    return Division(node, SetPartition(node, names, why), (), why)
