"""What the backend asks of a cluster of Ray, and what it is told: a narrow seam, without the library."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from llmbuild.fleet.actuators.interface import State


class Refused(OSError):
    """The cluster does not do what it is asked, or does not answer."""


@dataclass(frozen=True)
class Host:
    """A node of the cluster that is alive."""

    name: str
    """Ray's own number of it."""
    address: str
    resources: Mapping[str, float]
    """What it was started with."""


@dataclass(frozen=True)
class Noted:
    """What an agent notes of its replica for a later orchestrator."""

    service: str
    variant: str
    batch: int
    clock_mhz: int
    node: str
    slot: int
    keys: str
    host: str
    """Ray's number of the node that it was started on."""
    cores: tuple[int, ...] = ()
    """CPUs that it is pinned to; empty: not pinned."""


@dataclass(frozen=True)
class Order:
    """What an agent is started with."""

    name: str
    words: tuple[str, ...]
    """Arguments of `llmbuild`."""
    noted: Noted
    drain_s: float
    start_s: float
    """Seconds that the server has to be ready."""
    version: str
    """Of llmbuild: the agent's must be the same."""


@dataclass(frozen=True)
class Needs:
    """What an agent takes of its host while it lives."""

    resource: str
    cpus: float = 0.0
    gpus: float = 0.0


@dataclass(frozen=True)
class Told:
    """What an agent says of its server."""

    noted: Noted
    state: State
    url: str = ""
    pid: int = 0
    told: str = ""


@dataclass(frozen=True)
class Lost:
    """An agent that is gone, and why."""

    told: str


class Cluster(Protocol):
    """Agents by name, in the namespace of one fleet."""

    def lock(self) -> bool:
        """Take the right to run the fleet, which ends with this process; return whether it was free."""

    def locked(self) -> bool:
        """Return whether it is still this process's."""

    def unlock(self) -> None:
        """Give it back."""

    def hosts(self) -> Sequence[Host]:
        """Return the nodes that are alive."""

    def names(self) -> Sequence[str]:
        """Return the agents that are there."""

    def launch(self, order: Order, needs: Needs) -> None:
        """Start an agent on the host of its order, and nowhere else; whether that succeeds, `look` says."""

    def look(self, names: Collection[str], seconds: float) -> Mapping[str, Told | Lost]:
        """Return what agents say within that time; one that does not answer is left out."""

    def stop(self, name: str) -> None:
        """Let an agent drain its server, then go."""

    def kill(self, name: str) -> None:
        """End an agent and its server at once; one that is gone is ended."""
