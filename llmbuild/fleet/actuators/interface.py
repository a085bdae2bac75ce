"""The actions on a fleet, their answers, and what a backend tells of its replicas."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from llmbuild.fleet.capacity import OperatingPoint
from llmbuild.spec.fleet import GUARDED, Fleet, Profile
from llmbuild.spec.partitions import Layout, Slice

Outcome = Literal["applied", "denied", "unsupported"]
State = Literal["starting", "ready", "draining", "dead"]


@dataclass(frozen=True)
class Slot:
    """A place for one replica: a node by its name, and which of its slots."""

    kind: str
    """Class of nodes."""
    node: str
    index: int
    part: Slice | None = None
    """The slice of a GPU that it is; None: a whole device."""

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
    """Divide each device of a node that holds nothing: slices by name and first memory slice, as 3g.40gb@4."""

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
ONE_VARIANT = Answer("unsupported", "a server holds one variant with one batch limit: another replica is started")
NO_REPLICA = Answer("unsupported", "there is no such replica")


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


class Backend(Actuator, Protocol):
    """An actuator that outlives its orchestrator: what it is told to do, it finds again."""

    ending: str
    """What becomes of the replicas when the orchestrator ends, for its log."""

    def held(self) -> AbstractContextManager[None]:
        """Keep other orchestrators of the fleet away."""

    def adopt(self, profiles: Sequence[Profile], dry: bool = False) -> list[tuple[str, str]]:
        """Take over what an earlier orchestrator started; return each replica with what was done."""

    def hurry(self) -> None:
        """Give what was told to end no more time."""

    def close(self, wait: Callable[[float], None], now: bool = False) -> None:
        """Do with the replicas what `ending` says, or end at once, with `now`, what is to end."""


def perform(fleet: Fleet, backend: Actuator, action: Action) -> Answer:
    """Let a backend perform an action, unless it is one that the fleet file must allow and does not."""
    name = NAMES[type(action)]
    if name in GUARDED and name not in fleet.actuators:
        return Answer("denied", f"the fleet file does not allow it: add `actuators: [{name}]`")
    answer: Answer = getattr(backend, name)(action)
    return answer


def slots_of(fleet: Fleet, layouts: Mapping[str, Layout] | None = None) -> tuple[Slot, ...]:
    """Return all places for replicas, node by node; a node without a layout has the one of the fleet file."""
    found = []
    for kind in fleet.nodes:
        for node in kind.nodes:
            parts: tuple[Slice | None, ...] = (None,)
            if kind.partitions is not None:
                parts = (layouts or {}).get(node, kind.partitions.now).slices
            found += [Slot(kind.name, node, i, part) for i, part in enumerate(parts * kind.slots)]
    return tuple(found)
