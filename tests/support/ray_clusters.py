"""A simulated cluster of Ray whose time a test steers: agents start, answer, drain and die with their nodes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

from llmbuild.fleet.actuators.interface import NO_KEYS, Answer, KeysFile, Live
from llmbuild.fleet.loop import Loop, unseen
from llmbuild.fleet.policy import Target
from llmbuild.fleet.ray.backend import Ray
from llmbuild.fleet.ray.cluster import Host, Lost, Needs, Order, Refused, Told
from llmbuild.spec.fleet import Fleet
from tests.support.fleets import Fixed, profile

READY_S, DRAIN_S = 3.0, 2.0
KNOWN = profile("fast")


@dataclass
class Agent:
    """An actor and its server."""

    order: Order
    needs: Needs
    began_s: float = float("inf")
    """When its node had room for it."""
    stopped_s: float = float("inf")
    broken: str = ""


@dataclass
class Nodes:
    """The cluster, which orchestrators share."""

    now: float = 0.0
    hosts: dict[str, Host] = field(default_factory=dict)
    agents: dict[str, Agent] = field(default_factory=dict)
    holder: int | None = None
    silent: set[str] = field(default_factory=set)
    """Hosts whose agents answer nothing."""
    broken: str = ""
    """Why servers that are started now end at once."""
    down: bool = False
    launched: list[Order] = field(default_factory=list)
    drivers: count[int] = field(default_factory=count)

    def node(self, name: str, **resources: float) -> None:
        """Add a node."""
        self.hosts[name] = Host(name, f"10.0.0.{len(self.hosts) + 1}", resources or {"llmbuild_fast": 1.0})

    def remove(self, name: str) -> None:
        """Lose a node, and what runs there."""
        del self.hosts[name]
        self.agents = {key: one for key, one in self.agents.items() if one.order.noted.host != name}

    def free(self, host: str) -> float:
        """Return how many more agents a node takes."""
        taken = sum(one.order.noted.host == host and one.began_s <= self.now for one in self.agents.values())
        return self.hosts[host].resources["llmbuild_fast"] - taken

    def passes(self) -> None:
        """Let drained agents go, and others begin."""
        self.agents = {key: one for key, one in self.agents.items() if self.now < one.stopped_s + DRAIN_S}
        for one in self.agents.values():
            if one.began_s > self.now and self.free(one.order.noted.host) >= 1:
                one.began_s, one.broken = self.now, self.broken


class Driver:
    """One orchestrator's access to it: the seam of the backend."""

    def __init__(self, nodes: Nodes) -> None:
        self._nodes, self._number = nodes, next(nodes.drivers)

    def lock(self) -> bool:
        """Take the lock where nobody has it."""
        if self._nodes.holder is None:
            self._nodes.holder = self._number
        return self.locked()

    def locked(self) -> bool:
        """Return whether it is ours."""
        return self._nodes.holder == self._number

    def unlock(self) -> None:
        """Give it back."""
        if self.locked():
            self._nodes.holder = None

    def hosts(self) -> Sequence[Host]:
        """Return the nodes."""
        self._answers()
        return list(self._nodes.hosts.values())

    def names(self) -> Sequence[str]:
        """Return the agents."""
        self._answers()
        self._nodes.passes()
        return list(self._nodes.agents)

    def launch(self, order: Order, needs: Needs) -> None:
        """Start an agent as soon as its host has room."""
        self._answers()
        self._nodes.launched.append(order)
        self._nodes.agents[order.name] = Agent(order, needs)
        self._nodes.passes()

    def look(self, names: Collection[str], seconds: float) -> Mapping[str, Told | Lost]:
        """Return how agents are."""
        self._answers()
        self._nodes.passes()
        found = {name: self._told(name) for name in names}
        return {name: told for name, told in found.items() if told is not None}

    def _told(self, name: str) -> Told | Lost | None:
        one = self._nodes.agents.get(name)
        if one is None:
            return Lost("the actor died")
        noted = one.order.noted
        if noted.host in self._nodes.silent or one.began_s > self._nodes.now:
            return None
        if one.broken:
            return Told(noted, "dead", told=one.broken)
        if one.stopped_s < float("inf"):
            return Told(noted, "draining")
        ready = self._nodes.now - one.began_s >= READY_S
        return (
            Told(noted, "ready", f"http://{self._nodes.hosts[noted.host].address}:1", 7)
            if ready
            else Told(noted, "starting")
        )

    def stop(self, name: str) -> None:
        """Let an agent drain."""
        self._answers()
        self._nodes.agents[name].stopped_s = min(self._nodes.agents[name].stopped_s, self._nodes.now)

    def kill(self, name: str) -> None:
        """End an agent."""
        self._nodes.agents.pop(name, None)

    def _answers(self) -> None:
        if self._nodes.down:
            raise Refused("the cluster does not answer")


@dataclass
class Steered:
    """An orchestrator's loop on the cluster."""

    nodes: Nodes
    made: Fleet
    folder: Path
    targets: tuple[tuple[float, Target], ...]
    keys: KeysFile = NO_KEYS
    lines: list[str] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.driver = Driver(self.nodes)
        self.backend = Ray(
            self.made, self.folder, self.driver, 5.0, self.keys, clock=lambda: self.nodes.now, wait=self.passes
        )
        self.loop = Loop(
            self.made, Fixed(*self.targets), self.backend, self.lines.append, lambda _, a: self.answers.append(a)
        )

    def passes(self, seconds: float) -> None:
        """Let time pass."""
        self.nodes.now += seconds

    def adopt(self, dry: bool = False) -> list[tuple[str, str]]:
        """Take over what is there."""
        return self.backend.adopt((KNOWN,), dry)

    def run(self, seconds: float) -> Sequence[Live]:
        """Beat once a second as an orchestrator does; return what takes requests or will."""
        until, kept = self.nodes.now + seconds, list[Live]()
        while self.nodes.now < until:
            try:
                kept = list(self.loop.beat(self.nodes.now, unseen(self.made)))
            except OSError as error:
                self.errors.append(str(error))
            self.passes(1.0)
        return kept

    def said(self, text: str) -> bool:
        """Return whether a line has a text."""
        return any(text in line for line in self.lines)


def three_nodes() -> Nodes:
    """Return a cluster of three nodes for the class."""
    found = Nodes()
    for name in ("a", "b", "c"):
        found.node(name)
    return found


def with_slots(made: Fleet, slots: int, cores: tuple[tuple[int, ...], ...] = ()) -> Fleet:
    """Return a fleet whose only class has so many slots on each node."""
    return replace(made, nodes=(replace(made.nodes[0], slots=slots, cores=cores),))
