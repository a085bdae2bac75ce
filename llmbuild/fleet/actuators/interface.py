"""The actions on a fleet, their answers, and what a backend tells of its replicas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from llmbuild.fleet.capacity import OperatingPoint
from llmbuild.spec.fleet import GUARDED, Fleet

Outcome = Literal["applied", "denied", "unsupported"]
State = Literal["starting", "ready", "draining", "dead"]


@dataclass(frozen=True)
class Slot:
    """A place for one replica: a node by its name, and which of its slots."""

    kind: str
    """Class of nodes."""
    node: str
    index: int

    @property
    def name(self) -> str:
        """Return it in words."""
        return f"{self.node}/{self.index}"


@dataclass(frozen=True)
class Start:
    """Start a replica of a service on an empty slot."""

    service: int
    point: OperatingPoint
    slot: Slot
    why: str


@dataclass(frozen=True)
class Stop:
    """End a replica: what it has begun is finished, within the backend's limit."""

    replica: str
    why: str


@dataclass(frozen=True)
class Switch:
    """Let a replica serve another operating point, in place."""

    replica: str
    point: OperatingPoint
    why: str


@dataclass(frozen=True)
class Route:
    """Give a replica requests, or no more of them."""

    replica: str
    open: bool
    why: str


@dataclass(frozen=True)
class SetClock:
    """Set the clock of a node's device; 0: its own choice."""

    node: str
    mhz: int
    why: str


@dataclass(frozen=True)
class SetPower:
    """Bound what a node's device draws."""

    node: str
    watts: float
    why: str


@dataclass(frozen=True)
class SetPartition:
    """Divide a node's device."""

    node: str
    layout: tuple[str, ...]
    why: str


Action = Start | Stop | Switch | Route | SetClock | SetPower | SetPartition

NAMES: dict[type[Action], str] = {
    Start: "start",
    Stop: "stop",
    Switch: "switch",
    Route: "route",
    SetClock: "set_clock",
    SetPower: "set_power",
    SetPartition: "set_partition",
}


@dataclass(frozen=True)
class Answer:
    """What became of an action. `denied`: the fleet file does not allow it. `unsupported`: the backend cannot."""

    outcome: Outcome
    reason: str = ""


APPLIED = Answer("applied")


@dataclass(frozen=True)
class KeysFile:
    """The API keys that replicas ask for: a file, and what says whether another file has the same ones."""

    path: Path | None = None
    digest: str = ""


NO_KEYS = KeysFile()


@dataclass(frozen=True)
class Intended:
    """An action that a dry run would begin with, and what it would be answered."""

    action: Action
    answer: Answer


@dataclass(frozen=True)
class Live:
    """A replica as a backend sees it."""

    name: str
    service: int
    point: OperatingPoint
    slot: Slot
    state: State
    url: str = ""
    """Where it answers, once it is ready."""
    pid: int = 0
    told: str = ""
    """Why it is dead: its exit code and its last line."""

    @property
    def key(self) -> tuple[int, OperatingPoint]:
        """Return what a target counts it as."""
        return self.service, self.point


class Actuator(Protocol):
    """A backend. Each action answers at once; what it leads to is seen in `live`."""

    def start(self, action: Start) -> Answer:
        """Start a replica."""

    def stop(self, action: Stop) -> Answer:
        """Drain and end a replica."""

    def switch(self, action: Switch) -> Answer:
        """Change a replica's operating point in place."""

    def route(self, action: Route) -> Answer:
        """Open or close a replica for requests."""

    def set_clock(self, action: SetClock) -> Answer:
        """Set a node's clock."""

    def set_power(self, action: SetPower) -> Answer:
        """Bound a node's power."""

    def set_partition(self, action: SetPartition) -> Answer:
        """Divide a node's device."""

    def live(self) -> Sequence[Live]:
        """Return the replicas, also those that have died since the last time, once."""


def perform(fleet: Fleet, backend: Actuator, action: Action) -> Answer:
    """Let a backend perform an action, unless it is one that the fleet file must allow and does not."""
    name = NAMES[type(action)]
    if name in GUARDED and name not in fleet.actuators:
        return Answer("denied", f"the fleet file does not allow it: add `actuators: [{name}]`")
    answer: Answer = getattr(backend, name)(action)
    return answer


def slots_of(fleet: Fleet) -> tuple[Slot, ...]:
    """Return all places for replicas, node by node."""
    return tuple(Slot(kind.name, node, i) for kind in fleet.nodes for node in kind.nodes for i in range(kind.slots))
