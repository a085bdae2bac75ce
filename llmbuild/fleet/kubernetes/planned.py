"""A plan without a cluster: what it would start, and what Kubernetes refuses with and without one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from llmbuild.fleet.actuators.interface import (
    APPLIED,
    ONE_VARIANT,
    Answer,
    Live,
    Route,
    SetClock,
    SetPartition,
    SetPower,
    Start,
    Stop,
    Switch,
)
from llmbuild.spec.fleet import Profile


class Inert:
    """What no replica of Kubernetes can: it is refused with its reason."""

    ending: str = ""

    def switch(self, action: Switch) -> Answer:
        """Refuse: a server has one variant."""
        return ONE_VARIANT

    def set_clock(self, action: SetClock) -> Answer:
        """Refuse: pods may not set clocks."""
        return Answer("unsupported", "Kubernetes sets no clocks of devices")

    def set_power(self, action: SetPower) -> Answer:
        """Refuse: pods may not bound power."""
        return Answer("unsupported", "Kubernetes sets no power limits of devices")

    def set_partition(self, action: SetPartition) -> Answer:
        """Refuse: who divides a device must drain its node first."""
        return Answer("unsupported", "partitions of devices belong to the cluster's operator: name their resources")

    def hurry(self) -> None:
        """Do nothing: what drains has its time, and nothing waits for it here."""

    def close(self, wait: Callable[[float], None], now: bool = False) -> None:
        """Leave the replicas as they are."""

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep nobody away."""
        yield


class Planned(Inert):
    """Agrees with what it is told to start, on a fleet without replicas: for the objects of a plan."""

    def __init__(self) -> None:
        self.starts: list[Start] = []

    def start(self, action: Start) -> Answer:
        """Agree."""
        self.starts.append(action)
        return APPLIED

    def stop(self, action: Stop) -> Answer:
        """Agree."""
        return APPLIED

    def route(self, action: Route) -> Answer:
        """Agree."""
        return APPLIED

    def live(self) -> Sequence[Live]:
        """Return nothing."""
        return ()

    def adopt(self, profiles: Sequence[Profile], dry: bool = False) -> list[tuple[str, str]]:
        """Find nothing."""
        return []
