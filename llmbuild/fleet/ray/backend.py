"""The Ray backend: replicas are servers that agents run, detached actors of the fleet's namespace.

What runs is what the cluster says. Who comes after a kill -9 lists the agents and goes on. Which node of Ray is which
node of the fleet is decided here and kept while it lives; another one takes the place of a node that is lost.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic, sleep

import llmbuild
from llmbuild.errors import InputError
from llmbuild.fleet.actuators.interface import (
    APPLIED,
    NO_KEYS,
    NO_REPLICA,
    ONE_VARIANT,
    Answer,
    KeysFile,
    Live,
    Route,
    SetClock,
    SetPartition,
    SetPower,
    Slot,
    Start,
    Stop,
    Switch,
)
from llmbuild.fleet.actuators.noted import fields_of, known_of, serve_words
from llmbuild.fleet.actuators.served import DRAIN_S, KILL_S, READY_S
from llmbuild.fleet.ray.cluster import Cluster, Host, Lost, Noted, Order, Refused, Told
from llmbuild.fleet.ray.placing import cores_of, needs_of, placed, resource_of
from llmbuild.spec.fleet import Fleet, Profile

LOOK_S, ANSWER_S = 1.0, 0.5
"""Seconds between two looks at the agents, and that one look waits for answers."""
ADOPT_S = 10.0
"""Seconds that agents have to say what they are to an orchestrator that begins."""
SILENT_S = 20.0
"""Seconds after which an agent that was heard and says nothing any more is killed."""
PLACED_S = 60.0
"""Seconds beyond a server's start in which its node must take an agent."""
LOCK_S = 10.0
"""Seconds in which the cluster sees that an orchestrator has died."""


@dataclass
class _Replica:
    """A replica, its host, and since when it has been waited for."""

    live: Live
    host: str
    since_s: float
    heard: bool = False


class Ray:
    """Starts and ends agents. One class: replicas, hosts and looks change together."""

    ending: str = "requests are finished, then the replicas"

    def __init__(
        self,
        fleet: Fleet,
        catalog: Path,
        cluster: Cluster,
        drain_s: float = DRAIN_S,
        keys: KeysFile = NO_KEYS,
        clock: Callable[[], float] = monotonic,
        wait: Callable[[float], None] = sleep,
    ) -> None:
        self._fleet, self._catalog, self._cluster, self._keys = fleet, catalog, cluster, keys
        self._drain_s, self._clock, self._wait = drain_s, clock, wait
        self._replicas: dict[str, _Replica] = {}
        self._orphans: set[str] = set()
        """Agents of no slot that were told to end."""
        self._hosts: dict[str, Host] = {}
        self._places: dict[str, str] = {}
        """Host by node of the fleet."""
        self._looked_s = float("-inf")
        self._held = False

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other orchestrators away, waiting for the end of one that was killed.

        Raises:
            InputError: another one runs.
        """
        until_s = self._clock() + LOCK_S
        while not self._cluster.lock():
            if self._clock() >= until_s:
                raise InputError(f"another orchestrator runs fleet {self._fleet.name} on this cluster: end it")
            self._wait(1.0)
        self._held = True
        try:
            yield
        finally:
            self._held = False
            self._cluster.unlock()

    # --- actions -----------------------------------------------------------------------------------------------------

    def start(self, action: Start) -> Answer:
        """Start an agent on the host of a slot."""
        slot = action.slot
        if self._taken(slot):
            return Answer("unsupported", f"{slot.name} has a replica")
        host = self._hosts.get(self._places.get(slot.node, ""))
        if host is None:
            wanted = f"{resource_of(slot.kind)}: {action.point.node.slots}"
            return Answer("unsupported", f"no free node of Ray has the resource {wanted}")
        needs = needs_of(action.point.node, host)
        if isinstance(needs, str):
            return Answer("unsupported", needs)
        name = f"{slot.node}-{slot.index}-{secrets.token_hex(4)}"
        order = self._order(name, action, host)
        try:
            self._cluster.launch(order, needs)
        except Refused as error:
            return Answer("unsupported", str(error))
        live = Live(name, action.service, action.point, slot, "starting")
        self._replicas[name] = _Replica(live, host.name, self._clock())
        return replace(APPLIED, reason=f"{name} on {host.address}, node {host.name[:8]} of Ray")

    def _order(self, name: str, action: Start, host: Host) -> Order:
        noted = Noted(
            host=host.name,
            cores=cores_of(self._fleet, action.slot),
            **fields_of(self._fleet, action, self._keys.digest),
        )
        keys = [] if self._keys.path is None else ["--api-keys", str(self._keys.path.resolve())]
        place, catalog = (host.address, 0), str(self._catalog.resolve())
        words = [*serve_words(self._fleet, action, catalog, place, self._drain_s), *keys]
        start_s = max(READY_S, 3 * action.point.profile.load_s)
        return Order(name, tuple(words), noted, self._drain_s, start_s, llmbuild.__version__)

    def stop(self, action: Stop) -> Answer:
        """Let an agent drain its server, and go."""
        one = self._replicas.get(action.replica)
        if one is None:
            return Answer("unsupported", f"there is no replica {action.replica}")
        if one.live.state == "draining":
            return APPLIED
        try:
            if one.heard:
                self._cluster.stop(action.replica)
            else:
                self._cluster.kill(action.replica)  # it has begun nothing, and may wait for its host for ever
        except Refused as error:
            return Answer("unsupported", str(error))
        one.live, one.since_s = replace(one.live, state="draining"), self._clock()
        return APPLIED

    def switch(self, action: Switch) -> Answer:
        """Refuse: a server has one variant."""
        return ONE_VARIANT

    def route(self, action: Route) -> Answer:
        """Agree: the gateway routes."""
        return APPLIED if action.replica in self._replicas else NO_REPLICA

    def set_clock(self, action: SetClock) -> Answer:
        """Refuse: clocks are of the whole node."""
        return Answer("unsupported", "Ray sets no clocks of devices")

    def set_power(self, action: SetPower) -> Answer:
        """Refuse: power is of the whole node."""
        return Answer("unsupported", "Ray sets no power limits of devices")

    def set_partition(self, action: SetPartition) -> Answer:
        """Refuse: the resources of a node are fixed when it joins."""
        return Answer("unsupported", "Ray divides no devices: the resources of a node are those that it began with")

    # --- what is there -----------------------------------------------------------------------------------------------

    def live(self) -> Sequence[Live]:
        """Return the replicas; one that has ended is among them once, as dead.

        Raises:
            InputError: another orchestrator has taken over.
            Refused: the cluster does not answer.
        """
        now = self._clock()
        if now - self._looked_s < LOOK_S:
            return [one.live for one in self._replicas.values()]
        if self._held and not (self._cluster.locked() or self._cluster.lock()):  # its node may have been lost
            raise InputError(f"another orchestrator has taken over fleet {self._fleet.name}")
        self._look_at_hosts()
        seen = self._cluster.look([*self._replicas, *self._orphans], ANSWER_S)
        self._looked_s = now
        self._orphans -= {name for name in self._orphans if isinstance(seen.get(name), Lost)}
        for name, one in list(self._replicas.items()):
            one.live = self._now(one, seen.get(name), now)
        found = [one.live for one in self._replicas.values()]
        for each in found:
            if each.state == "dead":
                del self._replicas[each.name]
                with contextlib.suppress(Refused):
                    self._cluster.kill(each.name)
        return found

    def _look_at_hosts(self) -> None:
        self._hosts = {one.name: one for one in self._cluster.hosts()}
        self._places = placed(self._fleet, tuple(self._hosts.values()), self._places)

    def _now(self, one: _Replica, seen: Told | Lost | None, now: float) -> Live:
        """Return a replica as the cluster has it now."""
        live, asked = one.live, one.live.state == "draining"
        if one.host not in self._hosts:
            return replace(live, state="dead", told="" if asked else f"node {one.host[:8]} of Ray is lost", url="")
        if isinstance(seen, Lost):
            return replace(live, state="dead", told="" if asked else seen.told, url="")
        if seen is None:
            return self._silent(one, now)
        one.heard, one.since_s = True, now if not asked else one.since_s
        if seen.state == "dead":
            return replace(live, state="dead", told="" if asked else seen.told, url="")
        if asked:
            return live
        return replace(live, state=seen.state, url=seen.url, pid=seen.pid)

    def _silent(self, one: _Replica, now: float) -> Live:
        """Return an agent that says nothing: dead where it has been waited for long enough."""
        waited = now - one.since_s
        most_s = SILENT_S if one.heard else PLACED_S + one.live.point.node.boot_s
        if one.live.state == "draining":
            most_s += self._drain_s
        if waited < most_s:
            return one.live
        told = f"its agent has said nothing for {waited:.0f} s" if one.heard else f"no agent after {waited:.0f} s"
        return replace(one.live, state="dead", told=told, url="")

    # --- what was there before ---------------------------------------------------------------------------------------

    def adopt(self, profiles: Sequence[Profile], dry: bool = False) -> list[tuple[str, str]]:
        """Take over the fleet's agents, and end those that no slot is for; return each with what was done.

        With `dry` nothing is ended.
        """
        hosts = {one.name: one for one in self._cluster.hosts()}
        names = self._cluster.names()
        seen = self._cluster.look(names, ADOPT_S) if names else {}
        told = [(name, self._met(name, seen.get(name), hosts, profiles, dry)) for name in sorted(names)]
        self._look_at_hosts()
        return told

    def _met(
        self, name: str, seen: Told | Lost | None, hosts: dict[str, Host], profiles: Sequence[Profile], dry: bool
    ) -> str:
        """Take over an agent, or end it where no slot is for it; return which was done."""
        if isinstance(seen, Lost) or (seen is not None and (seen.state == "dead" or seen.noted.host not in hosts)):
            self._end(name, dry, at_once=True)
            return "has ended"
        if seen is None:
            self._end(name, dry, at_once=True)
            return f"ended: its agent has said nothing for {ADOPT_S:.0f} s"
        if seen.state == "draining":
            self._orphans.add(name)
            return "drains"
        live = self._known(name, seen, profiles)
        if live is None:
            self._end(name, dry)
            return "ended: of no service, variant, slot, cores, node or API keys of this fleet"
        self._places[live.slot.node] = seen.noted.host
        self._replicas[name] = _Replica(live, seen.noted.host, self._clock(), heard=True)
        return f"adopted: {live.point.name} on {live.slot.name}, node {seen.noted.host[:8]} of Ray"

    def _known(self, name: str, seen: Told, profiles: Sequence[Profile]) -> Live | None:
        """Return the replica of an agent; None where this fleet has no such one, or its place is another's."""
        known = known_of(seen.noted, self._fleet, profiles, self._keys.digest)
        if known is None:
            return None
        service, point, slot = known
        host = seen.noted.host
        elsewhere = self._places.get(slot.node, host) != host
        another = any(node != slot.node and at == host for node, at in self._places.items())
        if self._taken(slot) or elsewhere or another or seen.noted.cores != cores_of(self._fleet, slot):
            return None
        return Live(name, service, point, slot, "starting", pid=seen.pid)

    def _end(self, name: str, dry: bool, at_once: bool = False) -> None:
        if dry:
            return
        with contextlib.suppress(Refused):
            if at_once:
                self._cluster.kill(name)
            else:
                self._cluster.stop(name)
                self._orphans.add(name)

    def _taken(self, slot: Slot) -> bool:
        return any(one.live.slot == slot for one in self._replicas.values())

    # --- the end -----------------------------------------------------------------------------------------------------

    def hurry(self) -> None:
        """Kill what was told to end."""
        for name in [*self._orphans, *(name for name, one in self._replicas.items() if one.live.state == "draining")]:
            with contextlib.suppress(Refused):
                self._cluster.kill(name)

    def close(self, wait: Callable[[float], None], now: bool = False) -> None:
        """End all replicas: drained, or killed after their time, or at once with `now`."""
        until_s = self._clock() + (0 if now else self._drain_s) + KILL_S + SILENT_S
        while (self._replicas or self._orphans) and self._clock() < until_s:
            for name in self._replicas:
                self.stop(Stop(name, "the orchestrator ends"))
            if now:
                self.hurry()
            self._looked_s = float("-inf")
            with contextlib.suppress(Refused):  # what is not ended now is adopted, or ended, by the next one
                self.live()
            if self._replicas or self._orphans:
                wait(0.1)


class Dry(Ray):
    """Says what it would do; nothing is started or ended."""

    def start(self, action: Start) -> Answer:
        """Agree where a host is there."""
        if self._places.get(action.slot.node) is None:
            return super().start(action)
        return APPLIED

    def stop(self, action: Stop) -> Answer:
        """Agree."""
        return APPLIED

    def live(self) -> Sequence[Live]:
        """Return what would be adopted, as ready."""
        return [replace(one.live, state="ready") for one in self._replicas.values()]
