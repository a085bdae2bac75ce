"""Nodes with their slots, replicas that start and stop on them, and what all of it draws."""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Literal

from llmbuild.fleet.capacity import OperatingPoint
from llmbuild.fleet.policy import Target
from llmbuild.fleet.simulate.meter import Meter
from llmbuild.fleet.simulate.replica import QUEUE, Job, Replica, Router
from llmbuild.serve.schedule.state import Scheduler
from llmbuild.spec.fleet import Fleet, NodeClass

Key = tuple[int, OperatingPoint]
Takes = Callable[[int, OperatingPoint], tuple[float, ...]]
"""Requests a second that a replica takes, by class of a service."""
OFF_AFTER_S = 60.0
"""Seconds after which a node without replicas is turned off, where its policy wants fewer nodes."""


class Slot:
    """A device of a node: empty, loading, or with a replica."""

    __slots__ = ("key", "node", "replica", "since_s", "until_s")

    def __init__(self, node: Node) -> None:
        self.node = node
        self.key: Key | None = None
        self.replica: Replica | None = None
        self.since_s = self.until_s = 0.0


class Node:
    """A machine: off, booting, on, or failed."""

    def __init__(self, kind: NodeClass, name: str) -> None:
        self.kind, self.name = kind, name
        self.state: Literal["off", "boot", "on", "failed"] = "off"
        self.since_s = 0.0
        self.empty_s = 0.0
        self.epoch = 0
        """Counts failures and shutdowns: what was due for an earlier one is void."""
        self.slots = [Slot(self) for _ in range(kind.slots)]


class World:
    """Applies targets and keeps the accounts. One class: nodes, slots, queues and events change together."""

    def __init__(
        self, fleet: Fleet, scheduler: Scheduler, router: Router, takes: Takes, stepwise: bool = False
    ) -> None:
        self.fleet, self.meter = fleet, Meter()
        self._scheduler, self._router, self._takes, self._stepwise = scheduler, router, takes, stepwise
        self.nodes = [Node(kind, name) for kind in fleet.nodes for name in kind.nodes]
        self.held: list[deque[Job]] = [deque() for _ in fleet.services]
        """Requests that no replica can take yet, by service."""
        self.ready: list[list[Replica]] = [[] for _ in fleet.services]
        self._slot_of: dict[Replica, Slot] = {}
        self.events: list[tuple[float, int, str, object, int]] = []
        self._numbers = 0
        self._target: dict[Key, int] = {}
        self.switches: Counter[str] = Counter()
        self.ended: list[Job] = []

    # --- events ------------------------------------------------------------------------------------------------------

    def push(self, at_s: float, what: str, whom: object, epoch: int = 0) -> None:
        """Add an event; events of one time come in the order in which they were added."""
        self._numbers += 1
        heapq.heappush(self.events, (at_s, self._numbers, what, whom, epoch))

    def pop(self) -> None:
        """Take the next event away."""
        heapq.heappop(self.events)

    def handle(self, at_s: float, what: str, whom: object, epoch: int) -> None:
        """Let an event happen, unless what it was meant for has changed."""
        if what == "step":
            assert isinstance(whom, Replica)
            if whom.end_s == at_s:
                self._stepped(whom, at_s)
        elif what == "booted":
            assert isinstance(whom, Node)
            if whom.state == "boot" and whom.epoch == epoch:
                self._booted(whom, at_s)
        elif what == "loaded":
            assert isinstance(whom, Slot)
            if whom.node.epoch == epoch and whom.key is not None and whom.replica is None and whom.until_s == at_s:
                self._loaded(whom, at_s)
        elif what == "fail":
            assert isinstance(whom, Node)
            self.fail(whom, at_s)
        elif what == "back":
            assert isinstance(whom, Node)
            if whom.state == "failed":
                whom.state = "off"
                self.reconcile(at_s)

    def _stepped(self, replica: Replica, now: float) -> None:
        self.ended += replica.finish()
        replica.start(now)
        if replica.end_s < float("inf"):
            self.push(replica.end_s, "step", replica)
        elif replica.draining:
            self._unload(replica, now)
            self.reconcile(now)

    # --- requests ----------------------------------------------------------------------------------------------------

    def arrive(self, job: Job, now: float) -> None:
        """Give a job to a replica, keep it while none is there, or reject it."""
        kind = job.ask.kind
        ready = [r for r in self.ready[job.ask.service] if len(r.waiting) < QUEUE and job.takes <= r.kv_tokens]
        ready = [r for r in ready if r.takes[kind] > 0] or ready
        if not ready:
            full = bool(self.ready[job.ask.service]) or len(self.held[job.ask.service]) >= QUEUE
            if full or not self._coming(job):
                self._reject(job)
            else:
                self.held[job.ask.service].append(job)
            return
        replica = self._router(ready, job, now)
        if replica is None:
            self._reject(job)
            return
        due = replica.end_s
        replica.take(job, now)
        replica.start(now)
        if replica.end_s != due:
            self.push(replica.end_s, "step", replica)

    def _reject(self, job: Job) -> None:
        job.ended = "rejected"
        self.ended.append(job)

    def _coming(self, job: Job) -> bool:
        """Return whether a replica that can take a job is wanted, at least."""
        return any(s == job.ask.service and n > 0 and job.takes <= p.kv_tokens for (s, p), n in self._target.items())

    # --- targets -----------------------------------------------------------------------------------------------------

    def begin(self, target: Target) -> None:
        """Take a target as what runs already when time begins."""
        self._target = dict(target)
        for key, count in target.items():
            for _ in range(count):
                slot = self._empty(key[1].node.name) or self._off(key[1].node.name)
                if slot is None:
                    break
                slot.node.state = "on"
                slot.key = key
                self._loaded(slot, 0.0)
        self.switches.clear()

    def apply(self, target: Target, now: float) -> None:
        """Want other replicas: what is missing starts, and what is too much stops as soon as it is not needed."""
        self._target = dict(target)
        self.reconcile(now)

    def reconcile(self, now: float) -> None:
        """Come nearer to the target: clocks, then starts, then stops: starts come first where slots allow."""
        have = self.counts()
        self._set_clocks(have, now)
        for key, wanted in self._target.items():
            for _ in range(wanted - have[key]):
                if not (self._revive(key) or self._start(key, now)):
                    break
                have[key] += 1
        lacking = {key for key, wanted in self._target.items() if wanted > have[key]}
        loading = {slot.key[0] for slot in self._taken() if slot.replica is None and slot.key is not None}
        for key in list(have):
            surplus = have[key] - self._target.get(key, 0)
            self._stop(key, min(surplus, self._spare(key, lacking, loading)), now)
        self._turn_off(now)

    def counts(self) -> Counter[Key]:
        """Return the replicas that serve or load, by service and point."""
        found: Counter[Key] = Counter()
        for node in self.nodes:
            for slot in node.slots:
                if slot.key is not None and (slot.replica is None or not slot.replica.draining):
                    found[slot.key] += 1
        return found

    def _set_clocks(self, have: Counter[Key], now: float) -> None:
        """Turn surplus replicas into missing ones that differ by their clock alone."""
        for key, wanted in self._target.items():
            while wanted > have[key]:
                slot = next((s for s in self._replicas() if self._turns(s, key, have)), None)
                if slot is None or slot.replica is None or slot.key is None:
                    break
                have[slot.key] -= 1
                have[key] += 1
                slot.key = key
                slot.replica.set_clock(key[1], now)
                if slot.replica.end_s < float("inf"):
                    self.push(slot.replica.end_s, "step", slot.replica)
                self.switches["clock"] += 1

    def _turns(self, slot: Slot, key: Key, have: Counter[Key]) -> bool:
        """Return whether a slot's replica is too much as it is and may become `key` by its clock."""
        service, point = key
        if slot.key is None or slot.replica is None or slot.replica.draining or slot.key == key:
            return False
        other = slot.key[1]
        alike = (slot.key[0], other.profile, other.node, other.batch) == (
            service,
            point.profile,
            point.node,
            point.batch,
        )
        return alike and have[slot.key] > self._target.get(slot.key, 0)

    def _replicas(self) -> Iterator[Slot]:
        return (slot for node in self.nodes for slot in node.slots if slot.replica is not None)

    def _revive(self, key: Key) -> bool:
        """Let a replica that drains serve again."""
        for slot in self._replicas():
            if slot.key == key and slot.replica is not None and slot.replica.draining:
                slot.replica.draining = False
                self.ready[key[0]].append(slot.replica)
                return True
        return False

    def _start(self, key: Key, now: float) -> bool:
        """Load a replica on an empty slot, on a node that boots or is turned on for it if need be."""
        slot = self._empty(key[1].node.name)
        if slot is None:
            slot = self._off(key[1].node.name)
            if slot is None:
                return False
            self._boot(slot.node, now)
        self.switches["start"] += 1
        slot.key = key
        if slot.node.state == "on":
            self._load(slot, now)
        return True

    def _empty(self, kind: str) -> Slot | None:
        """Return an empty slot of the fullest node that is on, or boots."""
        best: tuple[int, Slot] | None = None
        for node in self.nodes:
            if node.kind.name == kind and node.state in ("on", "boot"):
                free = [slot for slot in node.slots if slot.key is None]
                if free and (best is None or len(free) < best[0]):
                    best = len(free), free[0]
        return best[1] if best else None

    def _off(self, kind: str) -> Slot | None:
        return next((n.slots[0] for n in self.nodes if n.kind.name == kind and n.state == "off"), None)

    def _spare(self, key: Key, lacking: set[Key], loading: set[int]) -> int:
        """Return how many surplus replicas may stop: all where their service has what it wants.

        Where it loads some, none. Where starts wait for slots of this class of nodes, one, if another one serves.
        """
        service, point = key
        if service in loading:
            return 0
        if service not in {one[0] for one in lacking}:
            return len(self._slot_of)
        waits = any(one[1].node.name == point.node.name for one in lacking)
        return int(waits and len(self.ready[service]) > 1)

    def _taken(self) -> Iterator[Slot]:
        """Yield the slots that hold or load a replica."""
        return (slot for node in self.nodes for slot in node.slots if slot.key is not None)

    def _stop(self, key: Key, count: int, now: float) -> None:
        """Drain replicas, those on the emptiest nodes and with the least to do first; what still loads is given up."""
        if count <= 0:
            return
        here = [slot for slot in self._taken() if slot.key == key]
        loading = [slot for slot in here if slot.replica is None]
        serving = [slot for slot in here if slot.replica is not None and not slot.replica.draining]
        serving.sort(key=lambda s: (sum(o.key is not None for o in s.node.slots), s.replica.load if s.replica else 0))
        for slot in [*loading, *serving][:count]:
            self.switches["stop"] += 1
            if slot.replica is None:
                self._emptied(slot, now)
                continue
            slot.replica.draining = True
            self.ready[key[0]].remove(slot.replica)
            if slot.replica.idle:
                self._unload(slot.replica, now)

    # --- slots and nodes ---------------------------------------------------------------------------------------------

    def _boot(self, node: Node, now: float) -> None:
        node.state, node.since_s = "boot", now
        self.switches["boot"] += 1
        self.push(now + node.kind.boot_s, "booted", node, node.epoch)

    def _booted(self, node: Node, now: float) -> None:
        self._close(node, now)
        node.state, node.since_s, node.empty_s = "on", now, now
        for slot in node.slots:
            slot.since_s = now
            if slot.key is not None:
                self._load(slot, now)

    def _load(self, slot: Slot, now: float) -> None:
        assert slot.key is not None
        self._count_slot(slot, now)
        slot.until_s = now + slot.key[1].profile.load_s
        self.push(slot.until_s, "loaded", slot, slot.node.epoch)

    def _loaded(self, slot: Slot, now: float) -> None:
        assert slot.key is not None
        self._count_slot(slot, now)
        service, point = slot.key
        slot.replica = Replica(point, service, self._takes(service, point), self._scheduler, self.meter, self._stepwise)
        slot.replica.ready(now)
        self._slot_of[slot.replica] = slot
        self.ready[service].append(slot.replica)
        held, self.held[service] = self.held[service], deque()
        for job in held:
            self.arrive(job, now)
        if now > 0:
            self.reconcile(now)

    def _unload(self, replica: Replica, now: float) -> None:
        replica.settle(now)
        slot = self._slot_of.pop(replica)
        slot.replica = None
        self._emptied(slot, now, counted=True)

    def _emptied(self, slot: Slot, now: float, counted: bool = False) -> None:
        if not counted:
            self._count_slot(slot, now)
        slot.key, slot.since_s, slot.until_s = None, now, 0.0
        if all(each.key is None for each in slot.node.slots):
            slot.node.empty_s = now
            self.push(now + OFF_AFTER_S, "sweep", None)

    def _count_slot(self, slot: Slot, now: float) -> None:
        """Count the time of a slot without a replica: empty, or loading."""
        if slot.node.state == "on" and slot.replica is None:
            loading = slot.until_s > 0 and slot.key is not None
            watts = slot.node.kind.bare_w
            if loading and slot.key is not None:
                power = slot.key[1].power
                watts = max(slot.node.kind.parked_w, power.rows_w(1.0)) if power else slot.node.kind.parked_w
            self.meter.add("load" if loading else "bare", now - slot.since_s, watts)
        slot.since_s = now

    def _turn_off(self, now: float) -> None:
        for node in self.nodes:
            if node.state != "on" or any(slot.key is not None for slot in node.slots):
                continue
            if now - node.empty_s >= OFF_AFTER_S - 1e-9:
                self._close(node, now)
                node.state, node.epoch = "off", node.epoch + 1
                self.switches["off"] += 1

    def sweep(self, now: float) -> None:
        """Turn off nodes that have long been empty."""
        self._turn_off(now)

    def _close(self, node: Node, now: float) -> None:
        """Count a node's time in its state up to now."""
        if node.state == "boot":
            self.meter.add("boot", (now - node.since_s) * node.kind.slots, node.kind.bare_w)
            self.meter.add("host", now - node.since_s, node.kind.host_w)
        elif node.state == "on":
            self.meter.add("host", now - node.since_s, node.kind.host_w)
            for slot in node.slots:
                if slot.replica is None:
                    self._count_slot(slot, now)
                else:
                    slot.replica.settle(now)
        node.since_s = now

    def fail(self, node: Node, now: float) -> None:
        """Lose a node: what streamed is lost, what had no token goes elsewhere."""
        if node.state == "failed":
            return
        again: list[Job] = []
        for slot in node.slots:
            if slot.replica is not None:
                for job in slot.replica.abandon(now):
                    if job.emitted:
                        job.ended = "lost"
                        self.ended.append(job)
                    else:
                        again.append(job)
        self._close(node, now)
        for slot in node.slots:
            if slot.replica is not None:
                if slot.replica in self.ready[slot.replica.service]:
                    self.ready[slot.replica.service].remove(slot.replica)
                del self._slot_of[slot.replica]
                slot.replica = None
            slot.key, slot.until_s = None, 0.0
        node.state, node.epoch = "failed", node.epoch + 1
        self.switches["failed"] += 1
        self.reconcile(now)
        for job in sorted(again, key=lambda each: each.ask.number):
            job.restart()
            self.arrive(job, now)

    def close(self, now: float) -> None:
        """Count everything up to the end."""
        for node in self.nodes:
            self._close(node, now)
