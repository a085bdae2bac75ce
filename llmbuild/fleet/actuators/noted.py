"""What every backend notes of a replica so that a later orchestrator knows it, and how its server is started."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypedDict

from llmbuild.fleet.actuators.interface import Slot, Start, slots_of
from llmbuild.fleet.capacity import OperatingPoint
from llmbuild.fleet.plan.program import serving
from llmbuild.spec.fleet import UNSET, Fleet, Profile


class Fields(TypedDict):
    """A replica by the names of its fleet file, and by the digest of the API keys that it takes."""

    service: str
    variant: str
    batch: int
    clock_mhz: int
    node: str
    slot: int
    keys: str


class Told(Protocol):
    """What has these fields."""

    @property
    def service(self) -> str: ...
    @property
    def variant(self) -> str: ...
    @property
    def batch(self) -> int: ...
    @property
    def clock_mhz(self) -> int: ...
    @property
    def node(self) -> str: ...
    @property
    def slot(self) -> int: ...
    @property
    def keys(self) -> str: ...


def fields_of(fleet: Fleet, start: Start, keys: str) -> Fields:
    """Return what is noted of a replica that is started with keys of a digest."""
    return Fields(
        service=fleet.services[start.service].name,
        variant=start.point.profile.variant,
        batch=start.point.batch,
        clock_mhz=start.point.clock.mhz,
        node=start.slot.node,
        slot=start.slot.index,
        keys=keys,
    )


def known_of(
    told: Told, fleet: Fleet, profiles: Sequence[Profile], keys: str
) -> tuple[int, OperatingPoint, Slot] | None:
    """Return the service, point and slot of a replica; None where this fleet has no such one, or other keys."""
    slot = next((s for s in slots_of(fleet) if (s.node, s.index) == (told.node, told.slot)), None)
    service = next((i for i, s in enumerate(fleet.services) if s.name == told.service), None)
    if slot is None or service is None or told.keys != keys:
        return None
    kind = fleet.node_class(slot.kind)
    clock = next((c for c in (UNSET, *kind.clocks) if c.mhz == told.clock_mhz), None)
    for each in serving(profiles, fleet.services[service], kind):
        if each.variant == told.variant and clock is not None:
            return service, OperatingPoint(each, kind, told.batch, clock), slot
    return None


def serve_words(fleet: Fleet, start: Start, catalog: str, place: tuple[str, int], drain_s: float) -> list[str]:
    """Return the arguments of `llmbuild` that serve a replica at a host and port."""
    point, (host, port) = start.point, place
    memory = max(1, int(point.node.memory_bytes / 1e6))
    return [
        *("serve", fleet.services[start.service].model, "-C", catalog),
        *("--variant", point.profile.variant, "--max-sequences", str(point.batch), "--memory", f"{memory}MB"),
        *("--host", host, "--port", str(port), "--shutdown-timeout", f"{drain_s:g}"),
    ]
