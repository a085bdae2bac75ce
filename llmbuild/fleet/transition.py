"""From what runs to what is wanted, step by step: a pure function of both and of the load of the moment.

What starts is waited for until it is ready, then what is too much is closed, drained and ended: the replicas that take
requests are never fewer than the load of the moment needs. Where a start has no empty slot, one replica must go first.
It goes if the others take the load; else it goes all the same, and the action says what is missing meanwhile.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from llmbuild.fleet.actuators.interface import Action, Live, Route, Slot, Start, Stop, slots_of
from llmbuild.fleet.capacity import OperatingPoint, capacity
from llmbuild.fleet.divide import Divided, Division, divisions
from llmbuild.fleet.policy import Target
from llmbuild.spec.fleet import Fleet

Rates = Mapping[tuple[int, int], float]
"""Requests a second of the last moments, by service and class."""


@dataclass(frozen=True)
class Scene:
    """The fleet at one moment, as the loop sees it."""

    live: Sequence[Live]
    closed: Collection[str]
    """Replicas that get no more requests."""
    rates: Rates
    avoided: Collection[Slot] = ()
    """Slots where starts fail, until some time has passed."""
    divided: Divided = Divided()  # noqa: RUF009 - frozen
    out: Collection[str] = ()
    """Nodes that are out of service: nothing starts there, and what runs there is replaced and drained."""

    def serving(self, service: int) -> list[Live]:
        """Return the replicas that take requests."""
        return [one for one in self.live if one.service == service and self.serves(one)]

    def serves(self, one: Live) -> bool:
        """Return whether a replica takes requests."""
        return one.state == "ready" and one.name not in self.closed


@dataclass(frozen=True)
class _Leaving:
    """Replicas that are to leave their node, and why."""

    live: tuple[Live, ...]
    why: str


def used(fleet: Fleet, service: int, rates: Rates, points: Sequence[OperatingPoint]) -> float:
    """Return which share of the capacity of some replicas the load of a service takes; above 1 they are too few."""
    asked, share = fleet.services[service], 0.0
    for c, kind in enumerate(asked.classes):
        rate = rates.get((service, c), 0.0)
        takes = sum(capacity(point, kind, asked.attainment).rate for point in points)
        share += rate / takes if takes > 0 else (2.0 if rate > 0 else 0.0)
    return share


def steps(fleet: Fleet, target: Target, scene: Scene) -> list[Action]:
    """Return what is to be done now; call it again when something has changed."""
    staying = [one for one in scene.live if one.slot.node not in scene.out]
    have = Counter(one.key for one in staying if one.state in ("starting", "ready") and one.name not in scene.closed)
    taken = {one.slot for one in scene.live if one.state != "dead"}
    changes = divisions(fleet, target, scene.live, scene.closed, scene.divided)
    closed_nodes = {one.node for one in changes if one.action is None} | {*scene.divided.changing, *scene.out}
    free = [
        slot
        for slot in slots_of(fleet, scene.divided.layouts)
        if slot not in taken and slot not in scene.avoided and slot.node not in closed_nodes
    ]
    done: list[Action] = [one.action for one in changes if one.action is not None]
    lacking: list[tuple[int, OperatingPoint]] = []
    for (service, point), wanted in target.items():
        for _ in range(wanted - have[service, point]):
            slot = next((s for s in free if (s.kind, s.part) == (point.node.name, point.part)), None)
            if slot is None:
                lacking.append((service, point))
                continue
            free.remove(slot)
            done.append(Start(service, point, slot, f"{have[service, point]} of {wanted} of {point.name} run"))
            have[service, point] += 1
    done += _given_up(target, scene, have)
    begun = {one.service for one in done if isinstance(one, Start)}
    done += _ended(fleet, target, scene, have, lacking, begun)
    closed = {one.replica for one in done if isinstance(one, Route)}
    for leaving in _leaving(scene, changes):
        done += _drained(fleet, scene, leaving, closed, begun)
    return done


def _leaving(scene: Scene, changes: Sequence[Division]) -> list[_Leaving]:
    """Return what nodes hold that take another layout, or are out of service."""
    found = [_Leaving(change.drained, f"its node is divided: {change.why}") for change in changes]
    out = tuple(one for one in scene.live if one.slot.node in scene.out)
    return [*found, _Leaving(out, "its node is out of service")]


def _drained(
    fleet: Fleet, scene: Scene, leaving: _Leaving, closed: Collection[str], begun: Collection[int]
) -> list[Action]:
    """Return the closing of what is to leave its node, once nothing starts elsewhere in its place."""
    gone = {one.name for one in leaving.live} | set(closed)
    coming = {one.service for one in scene.live if one.state == "starting" and one.name not in gone} | set(begun)
    done: list[Action] = []
    for one in leaving.live:
        if one.state == "starting":
            done.append(Stop(one.name, leaving.why))
        if not scene.serves(one) or one.name in closed or one.service in coming:
            continue
        share = used(
            fleet, one.service, scene.rates, [o.point for o in scene.serving(one.service) if o.name not in gone]
        )
        left = f"the others take the load of the moment, {share:.0%} of theirs"
        if share > 1:
            left = f"what is left has {_missing(share)} of the load of the moment"
        done.append(Route(one.name, False, f"{leaving.why}; {left}"))
    return done


def _given_up(target: Target, scene: Scene, have: Counter[tuple[int, OperatingPoint]]) -> list[Action]:
    """Return the ends of replicas that start and are not wanted any more."""
    done: list[Action] = []
    for one in scene.live:
        if one.state == "starting" and have[one.key] > target.get(one.key, 0):
            have[one.key] -= 1
            done.append(Stop(one.name, "not wanted any more before it was ready"))
    return done


def _ended(
    fleet: Fleet,
    target: Target,
    scene: Scene,
    have: Counter[tuple[int, OperatingPoint]],
    lacking: Sequence[tuple[int, OperatingPoint]],
    begun: Collection[int],
) -> list[Action]:
    """Return the ends of replicas that are closed, and the closing of those that are too many."""
    done: list[Action] = [
        Stop(one.name, "it gets no more requests")
        for one in scene.live
        if one.state == "ready" and one.name in scene.closed
    ]
    coming = {one.service for one in scene.live if one.state == "starting"} | set(begun)
    short = {service for service, _ in lacking}
    leaving = {one.slot.kind for one in scene.live if one.state == "draining" or one.name in scene.closed}
    closed = set(scene.closed)
    for one in scene.live:
        if not scene.serves(one) or have[one.key] <= target.get(one.key, 0):
            continue
        rest = [o.point for o in scene.serving(one.service) if o.name != one.name and o.name not in closed]
        share = used(fleet, one.service, scene.rates, rest)
        room = any(_same(point, one.slot) for _, point in lacking) and one.slot.kind not in leaving
        waits = one.service in coming or one.service in short
        if share <= 1 and (not waits or room):
            why = "makes room" if waits else "more than wanted"
            done.append(Route(one.name, False, f"{why}; the others take the load of the moment, {share:.0%} of theirs"))
        elif room and one.service not in coming:
            told = f"no room to start {lacking[0][1].name} first"
            done.append(Route(one.name, False, f"{told}: what is left has {_missing(share)} of the load of the moment"))
        else:
            continue
        have[one.key] -= 1
        closed.add(one.name)
        leaving.add(one.slot.kind)
    return done


def _same(point: OperatingPoint, slot: Slot) -> bool:
    return (point.node.name, point.part) == (slot.kind, slot.part)


def _missing(share: float) -> str:
    return f"{1 / share:.0%}" if 0 < share < float("inf") else "nothing"
