"""Routers: which of the replicas that are ready gets a request, in the simulator and in the gateway."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Protocol, TypeVar

from llmbuild.fleet.capacity import OperatingPoint, steady
from llmbuild.fleet.simulate.trace import Asked
from llmbuild.spec.fleet import Fleet

SLACK = 0.5
"""Share of the time to the first token that may pass by the estimate."""
ROWS = 0.8
"""Share of the batch limit up to which replicas are filled one after another."""


class Candidate(Protocol):
    """A replica that may be chosen, simulated or live."""

    point: OperatingPoint
    takes: tuple[float, ...]
    """Requests a second by class; 0 where the class's SLO does not hold."""

    @property
    def load(self) -> int:
        """Return the sequences that run or wait."""

    def expected_ttft_s(self, prompt: int, now: float) -> float:
        """Return an estimate of the seconds to the first token of one more prompt."""


class Waiting(Protocol):
    """A request that is to be routed."""

    ask: Asked


C = TypeVar("C", bound=Candidate)


class Choose(Protocol):
    """Chooses a replica for a request among those that are ready."""

    def __call__(self, ready: Sequence[C], job: Waiting, now: float) -> C:
        """Return the replica."""


def least_loaded(ready: Sequence[C], job: Waiting, now: float) -> C:
    """Return the replica with the least to do, measured by what it takes."""
    kind = job.ask.kind
    return min(ready, key=lambda r: (r.load + 1) / (r.takes[kind] or 1e-9))


def by_slack(fleet: Fleet) -> Choose:
    """Return a router that takes the busiest replica that still answers in time, so that others may rest.

    After PolyServe (arXiv 2507.17769): the most loaded server that meets the deadline. Prompts that are put on top of
    each other make the answers beside them slow, so no replica gets more than it holds at the rate that it takes.
    """

    @cache
    def held(service: int, kind: int, point: OperatingPoint, takes: float) -> float:
        """Return how many sequences are on a replica at that rate: in the mean, one at least."""
        asked = fleet.services[service].classes[kind]
        state = steady(point, asked, takes)
        mean = state.rows + takes * point.step.prompt_s * asked.prompt
        return min(ROWS * point.batch, max(1.0, mean))

    def choose(ready: Sequence[C], job: Waiting, now: float) -> C:
        service, kind = job.ask.service, job.ask.kind
        limit = SLACK * fleet.services[service].classes[kind].ttft_s
        best, most = None, -1
        for replica in ready:
            load = replica.load
            if load <= most or load >= held(service, kind, replica.point, replica.takes[kind]):
                continue
            if replica.expected_ttft_s(job.ask.prompt, now) <= limit:
                best, most = replica, load
        return best or least_loaded(ready, job, now)

    return choose
