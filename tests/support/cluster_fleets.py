"""Fleets in a simulated cluster, and orchestrators of them whose time a test steers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from llmbuild.fleet.actuators.interface import Answer, Live
from llmbuild.fleet.capacity import OperatingPoint
from llmbuild.fleet.kubernetes.api import connected
from llmbuild.fleet.kubernetes.backend import Kubernetes
from llmbuild.fleet.kubernetes.manifests import Asked
from llmbuild.fleet.loop import Loop, unseen
from llmbuild.fleet.policy import Target
from llmbuild.spec.cluster import Cluster as Said
from llmbuild.spec.cluster import Pods
from llmbuild.spec.fleet import Fleet
from tests.support.clusters import Cluster
from tests.support.fleets import Fixed, fleet, node, point, profile, service

PODS = Pods(4, 2e9, (("pool", "fast"),))
SAID = Said("registry.example/llmbuild:1", "llm", "catalog")
KNOWN = profile("fast")


def cluster_fleet(slots: int = 2, name: str = "small", image: str = SAID.image) -> Fleet:
    """Return a fleet of one class in the namespace llm."""
    kind = replace(node("fast", slots), pods=PODS)
    made = fleet(service(), nodes=(kind,))
    return replace(made, name=name, cluster=replace(SAID, image=image))


def batch(made: Fleet, rows: int) -> OperatingPoint:
    """Return the operating point of a batch limit."""
    return point(made, KNOWN, rows)


SMALL = cluster_fleet()


def two_nodes(cpus: int = 8) -> Cluster:
    """Return a cluster of two nodes for the class."""
    found = Cluster()
    for name in ("a", "b"):
        found.node(name, cpus, labels={"pool": "fast"})
    return found


@dataclass
class Steered:
    """An orchestrator's loop on a cluster."""

    cluster: Cluster
    made: Fleet
    folder: Path
    targets: tuple[tuple[float, Target], ...]
    keys: str = ""
    lines: list[str] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        api = connected("llm", self.cluster.kubeconfig(self.folder))
        self.backend = Kubernetes(
            self.made, api, Asked(5.0, self.keys), clock=lambda: self.cluster.now, wait=self.passes
        )
        self.loop = Loop(
            self.made, Fixed(*self.targets), self.backend, self.lines.append, lambda _, a: self.answers.append(a)
        )

    def passes(self, seconds: float) -> None:
        """Let time pass in the cluster."""
        self.cluster.now += seconds

    def adopt(self) -> list[tuple[str, str]]:
        """Take over what is there."""
        return self.backend.adopt((KNOWN,))

    def run(self, seconds: float) -> Sequence[Live]:
        """Beat once a second as an orchestrator does; return what takes requests or will."""
        until, kept = self.cluster.now + seconds, list[Live]()
        while self.cluster.now < until:
            try:
                kept = list(self.loop.beat(self.cluster.now, unseen(self.made)))
            except OSError as error:
                self.errors.append(str(error))
            self.passes(1.0)
        return kept

    def said(self, text: str) -> bool:
        """Return whether a line has a text."""
        return any(text in line for line in self.lines)


def states(live: Sequence[Live]) -> list[tuple[str, str, int]]:
    """Return slot, state and batch limit of replicas."""
    return sorted((one.slot.name, one.state, one.point.batch) for one in live)
