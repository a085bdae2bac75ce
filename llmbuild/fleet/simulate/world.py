"""Nodes with their slots, replicas that start and stop on them, and what all of it draws."""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable, Iterator

from llmbuild.fleet.capacity import OperatingPoint
from llmbuild.fleet.policy import Target
from llmbuild.fleet.simulate.meter import Meter, Use
from llmbuild.fleet.simulate.node import Key, Node, Slot, denied, lacking, layout_with
from llmbuild.fleet.simulate.replica import QUEUE, Job, Replica, Router
from llmbuild.serve.schedule.state import Scheduler
from llmbuild.spec.fleet import Fleet
from llmbuild.spec.partitions import Layout

Takes = Callable[[int, OperatingPoint], tuple[float, ...]]
"""Requests a second that a replica takes, by class of a service."""
OFF_AFTER_S = 60.0
"""Seconds after which a node without replicas is turned off, where its policy wants fewer nodes."""


class World:
    """Applies targets and keeps the accounts. One class: nodes, slots, queues and events change together."""

    def __init__(
        self, fleet: Fleet, scheduler: Scheduler, router: Router, takes: Takes, stepwise: bool = False
    ) -> None:
        self.fleet, self.meter = fleet, Meter(fleet.tariff)
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
            if whom.state in ("boot", "change") and whom.epoch == epoch:
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
        self._take(target)
        for key, count in target.items():
            for _ in range(count):
                slot = self._empty(key[1]) or self._off(key[1])
                if slot is None:
                    break
                slot.node.state = "on"
                slot.key = key
                self._loaded(slot, 0.0)
        self.switches = Counter({name: n for name, n in self.switches.items() if name == "denied"})

    def _take(self, target: Target) -> None:
        """Take a target; replicas that need layouts which the fleet file does not allow are counted and never start."""
        if target != self._target:
            count = denied(self.fleet, target)
            if count:
                self.switches["denied"] += count
        self._target = dict(target)

    def apply(self, target: Target, now: float) -> None:
        """Want other replicas: what is missing starts, and what is too much stops as soon as it is not needed."""
        self._take(target)
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
        short = {key for key, wanted in self._target.items() if wanted > have[key]}
        loading = {slot.key[0] for slot in self._taken() if slot.replica is None and slot.key is not None}
        for key in list(have):
            surplus = have[key] - self._target.get(key, 0)
            self._stop(key, min(surplus, self._spare(key, short, loading)), now)
        self._turn_off(now)
        if any(self._drain_for(kind, now) for kind in {key[1].node.name for key in short if key[1].part}):
            self.reconcile(now)

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
            if slot.key == key and slot.replica is not None and slot.replica.draining and slot.node.next is None:
                slot.replica.draining = False
                self.ready[key[0]].append(slot.replica)
                return True
        return False

    def _start(self, key: Key, now: float) -> bool:
        """Load a replica on an empty slot, on a node that boots or is turned on for it if need be."""
        slot = self._empty(key[1]) or self._divided(key[1], now)
        if slot is None:
            had = {node: node.layout for node in self.nodes if node.state == "off"}
            slot = self._off(key[1])
            if slot is None:
                return False
            self._boot(slot.node, now, had[slot.node] != slot.node.layout)
        self.switches["start"] += 1
        slot.key = key
        if slot.node.state == "on":
            self._load(slot, now)
        return True

    def _empty(self, point: OperatingPoint) -> Slot | None:
        """Return an empty slot of the fullest node that is on, or will be."""
        best: tuple[int, Slot] | None = None
        for node in self.nodes:
            if node.kind.name == point.node.name and node.state in ("on", "boot", "change") and node.next is None:
                free = [slot for slot in node.slots if slot.key is None and slot.part == point.part]
                if free and (best is None or len(free) < best[0]):
                    best = len(free), free[0]
        return best[1] if best else None

    def _off(self, point: OperatingPoint) -> Slot | None:
        """Return a slot of a node that is off, with a layout that is lacked."""
        off = [node for node in self.nodes if node.kind.name == point.node.name and node.state == "off"]
        layout = self._layout(point)
        if not off or (point.part is not None and layout is None):
            return None
        node = next((each for each in off if each.layout == layout), off[0])
        if node.layout != layout:
            node.divide(layout)
        return next(slot for slot in node.slots if slot.part == point.part)

    def _layout(self, point: OperatingPoint) -> Layout | None:
        """Return the layout that another node is to take for a point."""
        kind, part = self.fleet.node_class(point.node.name), point.part
        if part is None:
            return None
        more, _ = lacking(self.fleet, kind, self.nodes, self._target)
        return next((layout for layout in more if part in layout.slices), None) or layout_with(self.fleet, kind, part)

    def _spare(self, key: Key, short: set[Key], loading: set[int]) -> int:
        """Return how many surplus replicas may stop: all where their service has what it wants.

        Where it loads some, none. Where starts wait for slots of this kind, one, if another one serves.
        """
        service, point = key
        if service in loading:
            return 0
        if service not in {one[0] for one in short}:
            return len(self._slot_of)
        waits = any(one[1].place == point.place for one in short)
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
            self._drain(slot, now)

    def _drain(self, slot: Slot, now: float) -> None:
        """Let a slot's replica end what it has begun, and take no more."""
        if slot.replica is None:
            self._emptied(slot, now)
            return
        slot.replica.draining = True
        self.ready[slot.replica.service].remove(slot.replica)
        if slot.replica.idle:
            self._unload(slot.replica, now)

    # --- layouts -----------------------------------------------------------------------------------------------------

    def _divided(self, point: OperatingPoint, now: float) -> Slot | None:
        """Return a slot of an empty node that takes another layout for it."""
        kind = self.fleet.node_class(point.node.name)
        if point.part is None or not any(
            node.kind is kind and node.state == "on" and node.empty for node in self.nodes
        ):
            return None
        more, less = lacking(self.fleet, kind, self.nodes, self._target)
        layout = next((each for each in more if point.part in each.slices), None)
        node = next(
            (n for n in self.nodes if n.kind is kind and n.state == "on" and n.empty and n.layout in less), None
        )
        if layout is None or node is None:
            return None
        self._divide(node, layout, now)
        return next(slot for slot in node.slots if slot.part == point.part)

    def _drain_for(self, name: str, now: float) -> bool:
        """Begin to drain a node for a layout that is lacked, one at a time; return whether one was found.

        Where no node is left to be turned on, a node goes whose services are served elsewhere, else the one with the
        fewest that are not: they wait until it is back.
        """
        kind = self.fleet.node_class(name)
        here = [node for node in self.nodes if node.kind is kind and node.state != "failed"]
        if any(node.state in ("off", "boot", "change") or node.next is not None for node in here):
            return False
        more, less = lacking(self.fleet, kind, here, self._target)
        there = [node for node in here if node.layout in less]
        if not more or not there:
            return False
        node = min(there, key=self._alone)
        node.next = next(iter(more))
        for slot in node.slots:
            if slot.key is not None and not (slot.replica is not None and slot.replica.draining):
                self.switches["stop"] += 1
                self._drain(slot, now)
        if node.next is not None and node.empty:
            self._divide(node, node.next, now)
        return True

    def _alone(self, node: Node) -> tuple[int, int]:
        """Return how many services only this node serves, and how much it has to do."""
        here = {slot.replica for slot in node.slots if slot.replica is not None}
        services = {replica.service for replica in here}
        return sum(here.issuperset(self.ready[s]) for s in services), sum(replica.load for replica in here)

    def _divide(self, node: Node, layout: Layout, now: float) -> None:
        """Begin to change the layout of an empty node."""
        assert node.kind.partitions is not None
        self._close(node, now)
        node.divide(layout)
        node.state, node.next, node.since_s = "change", None, now
        self.switches["partition"] += 1
        self.push(now + node.kind.partitions.change.seconds, "booted", node, node.epoch)

    # --- slots and nodes ---------------------------------------------------------------------------------------------

    def _boot(self, node: Node, now: float, divides: bool) -> None:
        node.state, node.since_s = "boot", now
        self.switches["boot"] += 1
        more_s = 0.0
        if divides and node.kind.partitions is not None:
            more_s = node.kind.partitions.change.seconds
            self.switches["partition"] += 1
        self.push(now + node.kind.boot_s + more_s, "booted", node, node.epoch)

    def _booted(self, node: Node, now: float) -> None:
        self._close(node, now)
        node.state, node.since_s, node.empty_s = "on", now, now
        for slot in node.slots:
            slot.since_s = now
            if slot.key is not None:
                self._load(slot, now)
        if node.kind.partitions is not None:
            self.reconcile(now)  # what its layout was changed for

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
        if slot.node.empty:
            slot.node.empty_s = now
            if slot.node.next is not None:
                self._divide(slot.node, slot.node.next, now)
                return
            self.push(now + OFF_AFTER_S, "sweep", None)

    def _count_slot(self, slot: Slot, now: float) -> None:
        """Count the time of a slot without a replica: empty, or loading."""
        if slot.node.state == "on" and slot.replica is None:
            loading = slot.until_s > 0 and slot.key is not None
            watts = slot.load_w if loading else slot.bare_w
            self.meter.add("load" if loading else "bare", slot.since_s, now - slot.since_s, watts)
        slot.since_s = now

    def _turn_off(self, now: float) -> None:
        for node in self.nodes:
            if node.state != "on" or not node.empty:
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
        if node.state in ("boot", "change"):
            use: Use = "boot" if node.state == "boot" else "change"
            self.meter.add(use, node.since_s, now - node.since_s, node.kind.bare_w, node.kind.slots)
            self.meter.add("host", node.since_s, now - node.since_s, node.kind.host_w)
        elif node.state == "on":
            self.meter.add("host", node.since_s, now - node.since_s, node.on_w)
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
        node.state, node.next, node.epoch = "failed", None, node.epoch + 1
        self.switches["failed"] += 1
        self.reconcile(now)
        for job in sorted(again, key=lambda each: each.ask.number):
            job.restart()
            self.arrive(job, now)

    def close(self, now: float) -> None:
        """Count everything up to the end."""
        for node in self.nodes:
            self._close(node, now)
