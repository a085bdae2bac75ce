"""The local backend: replicas are `llmbuild serve` processes, each pinned to the cores of its slot.

A replica is a session of its own: Ctrl-C in the terminal ends the orchestrator, which drains its replicas, and a
kill -9 of the orchestrator leaves them serving for the next one to adopt.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic

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
from llmbuild.fleet.actuators.journal import MARK, Entry, Journal, began_of, boot_of, runs
from llmbuild.fleet.actuators.noted import fields_of, known_of, serve_words
from llmbuild.fleet.actuators.served import CHECK_S, DRAIN_S, KILL_S, READY_S, SILENT, address, ended, ready
from llmbuild.fleet.profiles.measured import machine_of
from llmbuild.process import child
from llmbuild.runtime import model as loader
from llmbuild.spec.fleet import Fleet, Profile

_PINNED = Path(__file__).with_name("pinned.py")


def checked(fleet: Fleet) -> None:
    """Refuse a fleet that this machine is not.

    Raises:
        InputError: a class of nodes has no cores, cores that are not here, or another machine.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise InputError("the local backend pins processes to cores, which needs Linux")
    here = loader.host_facts().machine
    mine = os.sched_getaffinity(0)
    for kind in fleet.nodes:
        if not kind.machine or not here.startswith(machine_of(kind)):
            told = f"nodes of class {kind.name} are not this machine"
            raise InputError(f"{told}: on the local backend give `machine: host` and `cores`")
        if not kind.cores:
            raise InputError(f"class {kind.name} has no cores: give a list for each slot, such as `cores: [[0], [1]]`")
        away = sorted({core for each in kind.cores for core in each} - mine)
        if away:
            there = ", ".join(map(str, sorted(mine)))
            raise InputError(f"class {kind.name}: core {away[0]} is not among those of this process: there are {there}")


@dataclass
class _Replica:
    """A replica and its process; `child` is None where another orchestrator started it."""

    live: Live
    entry: Entry
    child: subprocess.Popen[bytes] | None
    begun_s: float
    end_s: float = float("inf")
    """When it is killed."""
    check_s: float = 0.0
    """When it is asked next."""
    silent: int = 0


class Local:
    """Starts and ends replicas on this machine. One class: processes, journal and states change together."""

    ending: str = "requests are finished, then the replicas"

    def __init__(
        self,
        fleet: Fleet,
        catalog: Path,
        journal: Journal,
        drain_s: float = DRAIN_S,
        clock: Callable[[], float] = monotonic,
        keys: KeysFile = NO_KEYS,
    ) -> None:
        self._fleet, self._catalog, self._journal = fleet, catalog, journal
        self._keys = keys
        self._drain_s, self._clock = drain_s, clock
        self._replicas: dict[str, _Replica] = {}
        self._orphans: list[tuple[Entry, float]] = []
        """Processes that were told to end, and when they are killed."""

    def held(self) -> AbstractContextManager[None]:
        """Keep other orchestrators away.

        Raises:
            InputError: another one runs, or the folder of the journal cannot be written.
        """
        return self._journal.held()

    # --- actions -----------------------------------------------------------------------------------------------------

    def start(self, action: Start) -> Answer:
        """Start a server on a slot's cores, on a port of the loopback that it finds itself."""
        if any(one.live.slot == action.slot for one in self._replicas.values()):
            return Answer("unsupported", f"{action.slot.name} has a replica")
        name = f"{action.slot.node}-{action.slot.index}-{secrets.token_hex(4)}"
        cores = self._cores(action.slot)
        words = child.python(str(_PINNED), ",".join(map(str, cores)), *self._words(action))
        with self._address(name).open("wb") as said, self._log(name).open("wb") as log:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=log,
                env=child.environment({MARK: self._journal.mark(name)}),
                cwd="/",
                start_new_session=True,
            )
        entry = Entry(
            name=name,
            pid=process.pid,
            began=began_of(process.pid) or 0,
            boot=boot_of(),
            **fields_of(self._fleet, action, self._keys.digest),
        )
        live = Live(name, action.service, action.point, action.slot, "starting", pid=process.pid)
        self._replicas[name] = _Replica(live, entry, process, self._clock())
        self._save()
        return replace(APPLIED, reason=f"{name}, pid {process.pid}, cores {','.join(map(str, cores))}")

    def _words(self, action: Start) -> list[str]:
        catalog = str(self._catalog.resolve())
        keys = [] if self._keys.path is None else ["--api-keys", str(self._keys.path.resolve())]
        return ["llmbuild", *serve_words(self._fleet, action, catalog, ("127.0.0.1", 0), self._drain_s), *keys]

    def stop(self, action: Stop) -> Answer:
        """Send SIGTERM: the server finishes what it has begun. It is killed where that takes too long."""
        one = self._replicas.get(action.replica)
        if one is None:
            return Answer("unsupported", f"there is no replica {action.replica}")
        if one.live.state != "draining":
            one.live = replace(one.live, state="draining")
            one.end_s = self._clock() + self._drain_s + KILL_S
            _signal(one.entry, signal.SIGTERM)
        return APPLIED

    def switch(self, action: Switch) -> Answer:
        """Refuse: a server has one variant."""
        return ONE_VARIANT

    def route(self, action: Route) -> Answer:
        """Agree: the gateway routes, a process takes whatever comes."""
        return APPLIED if action.replica in self._replicas else NO_REPLICA

    def set_clock(self, action: SetClock) -> Answer:
        """Refuse: setting clocks of CPUs is not built."""
        return Answer("unsupported", "the local backend sets no clocks")

    def set_power(self, action: SetPower) -> Answer:
        """Refuse: bounding the power of CPUs is not built."""
        return Answer("unsupported", "the local backend sets no power limits")

    def set_partition(self, action: SetPartition) -> Answer:
        """Refuse: slots are sets of cores, which the fleet file states."""
        return Answer("unsupported", "the slots of a local node are the cores of the fleet file")

    # --- what is there -----------------------------------------------------------------------------------------------

    def live(self) -> Sequence[Live]:
        """Return the replicas; one that has ended is among them once, as dead."""
        found = []
        self._end_orphans()
        for name, one in list(self._replicas.items()):
            one.live = self._seen(one)
            found.append(one.live)
            if one.live.state == "dead":
                del self._replicas[name]
                self._address(name).unlink(missing_ok=True)
                if one.end_s < float("inf"):  # it was to end: its log says nothing that is needed
                    self._log(name).unlink(missing_ok=True)
        if any(one.state == "dead" for one in found):
            self._save()
        return found

    def _end_orphans(self) -> None:
        self._orphans = [(entry, end_s) for entry, end_s in self._orphans if runs(entry)]
        for entry, end_s in self._orphans:
            if self._clock() >= end_s:
                _signal(entry, signal.SIGKILL)

    def _seen(self, one: _Replica) -> Live:
        code = None if one.child is None else one.child.poll()
        over = code is not None or not runs(one.entry)
        now = self._clock()
        if over:
            return replace(one.live, state="dead", told=self._why(one, code))
        if now >= one.end_s:
            _signal(one.entry, signal.SIGKILL)
        if one.live.state == "ready":
            self._check(one, now)
        if one.live.state != "starting":
            return one.live
        url = self._url(one.entry.name)
        if url and ready(url):
            one.check_s = now + CHECK_S
            return replace(one.live, state="ready", url=url)
        if now - one.begun_s > READY_S:
            _signal(one.entry, signal.SIGKILL)
        return one.live

    def _check(self, one: _Replica, now: float) -> None:
        """Kill a replica that serves no more."""
        if now < one.check_s:
            return
        one.check_s = now + CHECK_S
        one.silent = 0 if ready(one.live.url) else one.silent + 1
        if one.silent >= SILENT:
            _signal(one.entry, signal.SIGKILL)

    def _why(self, one: _Replica, code: int | None) -> str:
        """Return how a replica ended: its code, and what it said last where nobody asked it to end."""
        if one.live.state != "draining":
            with contextlib.suppress(OSError), self._log(one.entry.name).open("rb") as log:
                return ended(code, log)
        return ended(code)

    # --- what was there before ---------------------------------------------------------------------------------------

    def adopt(self, profiles: Sequence[Profile], dry: bool = False) -> list[tuple[str, str]]:
        """Take over what an earlier orchestrator started, and end what is not known; return each with what was done.

        With `dry` nothing is ended or written.
        """
        told = []
        marked = self._journal.marked()
        for entry in self._journal.read():
            marked.pop(entry.name, None)
            if not runs(entry):
                told.append((entry.name, "has ended"))
                continue
            live = self._known(entry, profiles)
            if live is not None and not self._taken(live.slot) and self._pinned(entry, live.slot):
                self._replicas[entry.name] = _Replica(live, entry, None, self._clock())
                told.append((entry.name, f"adopted: pid {entry.pid} on {live.slot.name}"))
                continue
            other = "of no service, variant, slot, cores or API keys of this fleet"
            told.append((entry.name, f"ended: pid {entry.pid} is {other}"))
            self._orphan(entry, dry)
        for name, pid in marked.items():  # started, and not written down before its orchestrator was killed
            began = began_of(pid)
            if began is not None:
                told.append((name, f"ended: pid {pid} was started and not written down"))
                self._orphan(Entry(name, "", "", 0, 0, "", 0, pid, began, boot_of()), dry)
        if not dry:
            self._save()
        return told

    def _orphan(self, entry: Entry, dry: bool) -> None:
        """End a process that no slot of this fleet is for."""
        if not dry:
            self._orphans.append((entry, self._clock() + self._drain_s + KILL_S))
            _signal(entry, signal.SIGTERM)

    def _pinned(self, entry: Entry, slot: Slot) -> bool:
        """Return whether a process runs on the cores that the fleet file gives its slot now."""
        with contextlib.suppress(OSError):
            return os.sched_getaffinity(entry.pid) == set(self._cores(slot))
        return False

    def _taken(self, slot: Slot) -> bool:
        return any(one.live.slot == slot for one in self._replicas.values())

    def _known(self, entry: Entry, profiles: Sequence[Profile]) -> Live | None:
        """Return the replica of an entry; None where this fleet has no such one."""
        known = known_of(entry, self._fleet, profiles, self._keys.digest)
        return None if known is None else Live(entry.name, *known, "starting", pid=entry.pid)

    def close(self, wait: Callable[[float], None], now: bool = False) -> None:
        """End all replicas: drained, or killed after their time, or at once with `now`."""
        for name in self._replicas:
            self.stop(Stop(name, "the orchestrator ends"))
        if now:
            self.hurry()
        while self._replicas or self._orphans:
            self.live()
            if self._replicas or self._orphans:
                wait(0.05)

    def hurry(self) -> None:
        """Kill at the next look what was told to end."""
        now = self._clock()
        for one in list(self._replicas.values()):
            one.end_s = min(one.end_s, now)
        self._orphans = [(entry, now) for entry, _ in self._orphans]

    # --- files -------------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        self._journal.write([one.entry for one in self._replicas.values()])

    def _cores(self, slot: Slot) -> tuple[int, ...]:
        kind = self._fleet.node_class(slot.kind)
        return kind.cores[kind.nodes.index(slot.node) * kind.slots + slot.index]

    def _log(self, name: str) -> Path:
        return self._journal.folder / f"{name}.log"

    def _address(self, name: str) -> Path:
        return self._journal.folder / f"{name}.url"

    def _url(self, name: str) -> str:
        with contextlib.suppress(OSError), self._address(name).open("rb") as said:
            return address(said)
        return ""


def _signal(entry: Entry, name: signal.Signals) -> None:
    """Send a signal to the process of an entry, if it still is that one."""
    if runs(entry):
        with contextlib.suppress(ProcessLookupError):
            os.kill(entry.pid, name)


class Dry(Local):
    """Says what it would do; nothing is started, ended or written."""

    def start(self, action: Start) -> Answer:
        """Agree."""
        return APPLIED

    def stop(self, action: Stop) -> Answer:
        """Agree."""
        return APPLIED

    def live(self) -> Sequence[Live]:
        """Return what would be adopted, as ready."""
        return [replace(one.live, state="ready") for one in self._replicas.values()]
