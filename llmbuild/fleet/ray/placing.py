"""Which node of a fleet is which node of Ray: pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llmbuild.errors import InputError
from llmbuild.fleet.actuators.interface import Slot
from llmbuild.fleet.ray.cluster import Host, Needs
from llmbuild.spec.fleet import Fleet, NodeClass

GPU = "GPU"
"""Ray's own name of GPUs."""


def resource_of(kind: str) -> str:
    """Return the resource that a node of Ray has as many of as a node of this class has slots."""
    return f"llmbuild_{kind}"


def checked(fleet: Fleet) -> None:
    """Refuse a fleet that Ray cannot run.

    Raises:
        InputError: a class of nodes is divided.
    """
    for kind in fleet.nodes:
        if kind.partitions is not None:
            told = f"class {kind.name} has partitions, which Ray does not know"
            raise InputError(f"{told}: leave them out, or use --on kubernetes")


def placed(fleet: Fleet, hosts: Sequence[Host], kept: Mapping[str, str]) -> dict[str, str]:
    """Return the host of each node of a fleet that has one.

    What is kept stays while its host lives and has the class's resource; other nodes take free hosts by their order.
    """
    by_name = {one.name: one for one in hosts}
    fits = {kind.name: [one.name for one in hosts if _fits(kind, one)] for kind in fleet.nodes}
    nodes = [(node, kind.name) for kind in fleet.nodes for node in kind.nodes]
    found = {node: kept[node] for node, kind in nodes if kept.get(node) in by_name and kept[node] in fits[kind]}
    taken = set(found.values())
    for node, kind in nodes:
        free = next((name for name in fits[kind] if name not in taken), None)
        if node not in found and free is not None:
            found[node] = free
            taken.add(free)
    return found


def _fits(kind: NodeClass, host: Host) -> bool:
    return host.resources.get(resource_of(kind.name), 0) >= kind.slots


def needs_of(kind: NodeClass, host: Host) -> Needs | str:
    """Return what a replica takes of its host; or why its slot is none there.

    With cores it takes and is pinned to them; else its share of the host's GPUs, which Ray shows it alone.
    """
    name, gpus = resource_of(kind.name), host.resources.get(GPU, 0)
    if kind.cores:
        return Needs(name, cpus=len(kind.cores[0]))
    if gpus:
        return Needs(name, gpus=gpus // kind.slots if gpus >= kind.slots else gpus / kind.slots)
    if kind.slots > 1:
        return f"class {kind.name} has {kind.slots} slots and no cores, and node {host.name[:8]} no GPUs to divide"
    return Needs(name)


def cores_of(fleet: Fleet, slot: Slot) -> tuple[int, ...]:
    """Return the CPUs of a slot; none where the file does not say."""
    kind = fleet.node_class(slot.kind)
    return kind.cores[kind.nodes.index(slot.node) * kind.slots + slot.index] if kind.cores else ()
