"""The replicas as the gateway sees them: which take requests, what each has to do, and the choice among them."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from llmbuild.fleet.actuators.interface import Live
from llmbuild.fleet.capacity import OperatingPoint, capacity
from llmbuild.fleet.policies.routing import Choose
from llmbuild.fleet.simulate.trace import Asked
from llmbuild.serve.api.errors import UNAVAILABLE, ApiError
from llmbuild.spec.fleet import Fleet

HELD_S = 30.0
"""Seconds that a request waits for a replica that starts."""
MOST_HELD = 256
"""Requests of a service that wait so."""
WARM_S = 5.0
"""Seconds of a replica from which nothing is learned."""
SUSPECT_S = 1.0
"""Seconds for which a replica that broke a connection gets nothing."""
RETRY_S = 5
"""What a client is told to wait where nothing serves."""


@dataclass(eq=False)
class Job:
    """A request on its way through the gateway."""

    ask: Asked
    begun: bool = False
    """Whether its first byte has come."""


@dataclass(eq=False)
class Place:
    """A replica that takes requests."""

    live: Live
    point: OperatingPoint
    takes: tuple[float, ...]
    jobs: set[Job] = field(default_factory=set)
    since_s: float = 0.0
    """When it began to take requests, by the event loop's clock."""
    suspect_s: float = 0.0
    """Until when it is not trusted."""

    @property
    def load(self) -> int:
        """Return the sequences that run or wait."""
        return len(self.jobs)

    def expected_ttft_s(self, prompt: int, now: float) -> float:
        """Return an estimate of the seconds to the first token of one more prompt: what is before it, and itself."""
        step, batch = self.point.step, self.point.batch
        before = sum(job.ask.prompt for job in self.jobs if not job.begun)
        rows = min(self.load, batch)
        context = sum(job.ask.prompt + job.ask.output / 2 for job in self.jobs if job.begun)
        step_s = step.seconds(max(1, rows), context, 0)
        over = self.load + 1 - batch
        mean = sum(job.ask.output for job in self.jobs) / max(1, self.load)
        wait = over * mean * step_s / batch if over > 0 else 0.0
        return wait + 2 * step_s + (before + prompt) * step.prompt_s


class Table:
    """Keeps places by replica, and those who wait for one; only the event loop's thread calls it."""

    def __init__(self, fleet: Fleet, choose: Choose) -> None:
        self._fleet, self._choose = fleet, choose
        self._places: dict[str, Place] = {}
        self._coming: set[int] = set()
        self._held = [0 for _ in fleet.services]
        self._changed = asyncio.Event()

    def update(self, live: Sequence[Live], wanted: Collection[int] = ()) -> None:
        """Take what the loop has found: replicas that take requests or will, and services that are to have some."""
        kept = {}
        for one in live:
            if one.state == "ready":
                kept[one.name] = self._places.get(one.name) or self._place(one)
        self._places = kept
        self._coming = {one.service for one in live if one.state == "starting"} | set(wanted)
        self._changed.set()
        self._changed = asyncio.Event()

    def _place(self, live: Live) -> Place:
        service = self._fleet.services[live.service]
        takes = tuple(capacity(live.point, kind, service.attainment).rate for kind in service.classes)
        return Place(live, live.point, takes, since_s=asyncio.get_running_loop().time())

    @property
    def places(self) -> list[Place]:
        """Return the replicas that take requests."""
        return list(self._places.values())

    @property
    def held(self) -> int:
        """Return the requests that wait for a replica."""
        return sum(self._held)

    def serves(self, service: int) -> bool:
        """Return whether a replica of a service takes requests."""
        return any(place.live.service == service for place in self._places.values())

    async def place(self, job: Job, without: set[str], now: float) -> Place | None:
        """Return a replica for a request, waiting for one that starts; None where only those `without` are left.

        Raises:
            ApiError: there is none, and none is coming in time.
        """
        service, loop = job.ask.service, asyncio.get_running_loop()
        until = now + HELD_S
        while True:
            there = [one for one in self._places.values() if one.live.service == service]
            ready = [one for one in there if one.live.name not in without and one.suspect_s <= loop.time()]
            able = [one for one in ready if one.takes[job.ask.kind] > 0] or ready
            if able:
                return self._choose(able, job, loop.time())
            if there and all(one.live.name in without for one in there):
                return None
            waits = bool(there) or service in self._coming
            if not waits or self._held[service] >= MOST_HELD or loop.time() >= until:
                raise self._none(service)
            await self._wait(service, until)

    async def _wait(self, service: int, until: float) -> None:
        """Wait until something has changed, or a replica that broke a connection may be trusted again."""
        loop = asyncio.get_running_loop()
        self._held[service] += 1
        try:
            async with asyncio.timeout_at(min(until, loop.time() + SUSPECT_S)):
                await self._changed.wait()
        except TimeoutError:
            pass
        finally:
            self._held[service] -= 1

    def _none(self, service: int) -> ApiError:
        name = self._fleet.services[service].name
        again = {"retry-after": str(RETRY_S)}
        return ApiError(503, f"no replica of {name} serves now", UNAVAILABLE, "no_replica", headers=again)
