"""A fleet for real: the backend, the loop's beats and the gateway in one process, from adoption to the last drain."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from llmbuild.fleet.actuators.interface import NAMES, Action, Answer, Backend, Intended, KeysFile
from llmbuild.fleet.actuators.journal import Journal
from llmbuild.fleet.actuators.local import Dry, Local, checked
from llmbuild.fleet.actuators.served import DRAIN_S
from llmbuild.fleet.gateway.app import Gateway, application
from llmbuild.fleet.gateway.metrics import FleetMetrics
from llmbuild.fleet.gateway.seen import Watch
from llmbuild.fleet.gateway.table import Table
from llmbuild.fleet.loop import Loop, given_live, permitted, unseen
from llmbuild.fleet.nodes_out import NodesOut
from llmbuild.fleet.policies.named import live_policy
from llmbuild.serve.api.keys import Keys
from llmbuild.serve.api.server import Place, listening, server_of, signals, url_of
from llmbuild.spec.fleet import Fleet, Profile

BEAT_S = 0.25
"""Seconds between two looks at the replicas."""


@dataclass(frozen=True)
class Setup:
    """What is run, with what, and where its state is kept."""

    fleet: Fleet
    profiles: tuple[Profile, ...]
    catalog: Path
    folder: Path
    policy: str
    place: Place = Place(port=0, drain_s=DRAIN_S)  # noqa: RUF009 - frozen
    keys: Keys = Keys()  # noqa: RUF009 - frozen
    keys_file: Path | None = None
    """Where the keys are, for the replicas, which ask for them too."""

    @property
    def asked_of_replicas(self) -> KeysFile:
        """Return the keys as a backend gives them to its replicas."""
        return KeysFile(self.keys_file, self.keys.digest)


def local(setup: Setup, fleet: Fleet) -> Backend:
    """Return the backend whose replicas are processes of this machine.

    Raises:
        InputError: the fleet is not this machine.
    """
    checked(fleet)
    return Local(fleet, setup.catalog, Journal(setup.folder), setup.place.drain_s, keys=setup.asked_of_replicas)


def local_dry(setup: Setup, fleet: Fleet) -> Backend:
    """Return the same backend where it starts, ends and writes nothing.

    Raises:
        InputError: the fleet is not this machine.
    """
    checked(fleet)
    return Dry(fleet, setup.catalog, Journal(setup.folder), keys=setup.asked_of_replicas)


Make = Callable[[Setup, Fleet], Backend]
"""Makes the backend of a fleet as it may be run."""


def dry(setup: Setup, tell: Callable[[str], None], make: Make = local_dry) -> list[Intended]:
    """Return what would be done first; nothing is started, ended or written.

    Raises:
        InputError: the backend cannot run the fleet, or the policy cannot run live.
    """
    fleet = permitted(setup.fleet)
    backend = make(setup, fleet)
    for name, told in backend.adopt(setup.profiles, dry=True):
        tell(f"finds    {name}: {told}")
    found: list[Intended] = []
    loop = _loop(setup, fleet, backend, tell, lambda action, answer: found.append(Intended(action, answer)))
    loop.beat(0.0, unseen(fleet))
    return found


def orchestrate(setup: Setup, tell: Callable[[str], None], ready: Callable[[str], None], make: Make = local) -> bool:
    """Run a fleet until SIGTERM or SIGINT; return whether all that was begun was finished.

    The first signal lets requests end, and takes no more; a second one ends them. `ready` is called with the address
    once every service has a replica. What becomes of the replicas is the backend's.

    Raises:
        InputError: the backend cannot run the fleet, another orchestrator runs it, or the port is taken.
    """
    backend = make(setup, permitted(setup.fleet))
    with backend.held(), contextlib.closing(listening(setup.place)) as listener:
        runner = _Runner(setup, tell, backend)
        try:
            return asyncio.run(runner.run(listener, lambda: ready(url_of(setup.place, listener))))
        finally:
            backend.close(time.sleep, now=True)  # whatever broke, nothing that is to end is left behind


def _loop(
    setup: Setup,
    fleet: Fleet,
    backend: Backend,
    tell: Callable[[str], None],
    done: Callable[[Action, Answer], None],
) -> Loop:
    policy = live_policy(setup.policy).make(given_live(fleet, setup.profiles))
    return Loop(fleet, policy, backend, tell, done, NodesOut(setup.folder).read)


class _Runner:
    """The parts of a running fleet."""

    def __init__(self, setup: Setup, tell: Callable[[str], None], backend: Backend) -> None:
        self._setup, self._tell = setup, tell
        self._fleet = fleet = permitted(setup.fleet)
        self.backend = backend
        self._metrics = FleetMetrics(self._gauges)
        self._loop = _loop(setup, fleet, self.backend, tell, self._acted)
        self._watch = Watch(fleet, time.monotonic())
        self._table: Table | None = None
        self._states: Mapping[tuple[str, str], float] = {}
        self._corrected: dict[int, float] = {}
        self._ending = False

    async def run(self, listener: object, ready: Callable[[], None]) -> bool:
        """Serve until a signal comes."""
        self._table = table = Table(self._fleet, live_policy(self._setup.policy).router(self._fleet))
        state = Gateway(self._fleet, table, self._watch, self._metrics, self._setup.keys, self._tell)
        server = server_of(application(state))
        with signals() as asked:
            for name, told in self.backend.adopt(self._setup.profiles):
                self._tell(f"finds    {name}: {told}")
            running = asyncio.ensure_future(server.serve(sockets=[listener]))  # type: ignore[list-item]
            beating = asyncio.ensure_future(self._beats(ready))
            first = asyncio.ensure_future(asked.get())
            await asyncio.wait((running, beating, first), return_when=asyncio.FIRST_COMPLETED)
            self._ending, state.draining = True, True
            first.cancel()
            self._tell(f"ends     {self.backend.ending}")
            second = asyncio.ensure_future(asked.get())
            done = await _drained(state, self._setup.place.drain_s, second)
            await asyncio.wait((beating,))
            server.should_exit = True
            ending = asyncio.ensure_future(asyncio.to_thread(self.backend.close, time.sleep))
            if not second.done():
                await asyncio.wait((ending, second), return_when=asyncio.FIRST_COMPLETED)
            if second.done():
                self.backend.hurry()
            await ending
            second.cancel()
            await running
            beating.result()  # what broke the loop is told
        return done

    async def _beats(self, ready: Callable[[], None]) -> None:
        """Beat until the end; tell once that every service is served."""
        assert self._table is not None
        began, told = 0.0, False
        while not self._ending:
            now = time.monotonic()
            began = began or now  # the first decision is at 0
            decides = self._loop.due(now - began)
            traffic = self._watch.traffic(now, decides)
            try:
                live = await asyncio.to_thread(self._loop.beat, now - began, traffic)
            except OSError as error:  # a full disk, too many processes: the next beat may do better
                self._tell(f"error    {error}")
                await asyncio.sleep(1.0)
                continue
            wanted = {service for service, _ in self._loop.target}
            self._table.update(live, wanted)
            states = Counter((self._fleet.services[one.service].name, str(one.state)) for one in live)
            self._states = {key: float(count) for key, count in states.items()}
            if decides:
                self._metrics.decisions.inc()
                self._tell_corrections()
            if not told and all(self._table.serves(service) for service in wanted):
                told = True
                ready()
            await asyncio.sleep(BEAT_S)

    def _tell_corrections(self) -> None:
        """Tell how far steps are off their profiles, where that has changed by a fifth."""
        for s, one in enumerate(self._watch.corrections):
            if abs(one.factor / self._corrected.get(s, 1.0) - 1) > 0.2:
                self._corrected[s] = one.factor
                name = self._fleet.services[s].name
                self._tell(
                    f"corrects {name}: tokens take {one.factor:.2f} times their profile, and loads count so much"
                )

    def _acted(self, action: Action, answer: Answer) -> None:
        self._metrics.actions.labels(NAMES[type(action)], answer.outcome).inc()

    def _gauges(self) -> Mapping[str, Mapping[tuple[str, str], float]]:
        places = [] if self._table is None else self._table.places
        names = [one.name for one in self._fleet.services]
        running = {(name, ""): 0.0 for name in names}
        for place in places:
            running[names[place.live.service], ""] += place.load
        waiting = {(name, ""): float(self._watch.waiting[s]) for s, name in enumerate(names)}
        factors = {(name, ""): self._watch.corrections[s].factor for s, name in enumerate(names)}
        return {
            "fleet_replicas": self._states,
            "fleet_running": running,
            "fleet_waiting": waiting,
            "fleet_correction": factors,
        }


async def _drained(state: Gateway, most_s: float, second: asyncio.Future[None]) -> bool:
    """Wait until every request is answered, for some seconds or up to the next signal; return whether all are."""
    until = time.monotonic() + most_s
    while state.open and time.monotonic() < until and not second.done():
        await asyncio.wait((second,), timeout=0.05)
    return not state.open


def to_stderr(line: str) -> None:
    """Write a line of the log."""
    print(line, file=sys.stderr, flush=True)
