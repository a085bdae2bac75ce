"""Run a policy over requests: `observe` load and nodes, `decide` a target, `act` on the world, in simulated time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from math import ceil, inf
from time import perf_counter

from llmbuild.errors import InputError
from llmbuild.fleet.capacity import OperatingPoint, capacity
from llmbuild.fleet.policy import BIN_S, Counted, Given, Make, Observation, Policy, Seen
from llmbuild.fleet.simulate.outcome import Moment, Outcome, classes_of
from llmbuild.fleet.simulate.replica import Job, Router
from llmbuild.fleet.simulate.trace import Asked
from llmbuild.fleet.simulate.world import Takes, World
from llmbuild.serve.schedule.fcfs import Fcfs
from llmbuild.serve.schedule.state import Scheduler
from llmbuild.spec.fleet import Basis, Fleet, Profile, weakest

LATEST_S = 3600.0
"""Seconds after the last arrival at which what still runs is given up as unfinished."""
_LEARN = 0.002
"""Weight of a request in the running means of lengths: fewer than some 500 say little of lengths with long tails."""


@dataclass(frozen=True)
class Failing:
    """A node that fails, and for how long."""

    node: str
    at_s: float
    seconds: float = inf


@dataclass(frozen=True)
class Setting:
    """How a trace is run."""

    seed: int = 0
    scheduler: Scheduler = field(default_factory=Fcfs)
    failures: tuple[Failing, ...] = ()
    stepwise: bool = False
    """Ask the scheduler at each step, also where nothing changed: slower, for tests."""
    every_s: float = 0.0
    """Seconds of the intervals for which power and replicas are told; 0: they are not."""


class _Run:
    """The loop over arrivals, events and ticks, and what it has seen."""

    def __init__(
        self, fleet: Fleet, requests: Sequence[Asked], policy: Policy, router: Router, setting: Setting
    ) -> None:
        self.fleet, self.policy = fleet, policy
        self.jobs = [Job(ask) for ask in requests]
        self.world = World(fleet, setting.scheduler, router, _takes(fleet), setting.stepwise)
        self._arrived: Counter[tuple[int, int]] = Counter()
        self._lengths = {
            (s, c): [kind.prompt, kind.output]
            for s, service in enumerate(fleet.services)
            for c, kind in enumerate(service.classes)
        }
        self.world.meter.every_s = self._every_s = setting.every_s
        self._replicas: dict[int, int] = {}
        self.decide_s = 0.0
        self.used: dict[tuple[int, OperatingPoint], None] = {}
        self._seen_ended = 0
        named = {node.name: node for node in self.world.nodes}
        for one in setting.failures:
            if one.node not in named:
                raise InputError(f"no node {one.node!r} to fail: nodes are {_range(fleet)}")
            self.world.push(one.at_s, "fail", named[one.node])
            if one.seconds < inf:
                self.world.push(one.at_s + one.seconds, "back", named[one.node])

    def go(self) -> float:
        """Run to the end, and return its time."""
        world, jobs, period = self.world, self.jobs, self.fleet.period_s
        self._decide(0.0, first=True)
        now, i, tick = 0.0, 0, period
        latest = (jobs[-1].ask.at_s if jobs else 0.0) + LATEST_S
        while len(world.ended) < len(jobs) and now < latest:
            arrival = jobs[i].ask.at_s if i < len(jobs) else inf
            event = world.events[0][0] if world.events else inf
            now = min(arrival, event, tick)
            if event <= now:
                self._happen(now)
            elif arrival <= now:
                self._arrive(jobs[i], now)
                i += 1
            else:
                self._decide(now)
                tick += period
        world.close(now)
        return now

    def _happen(self, now: float) -> None:
        _, _, what, whom, epoch = self.world.events[0]
        self.world.pop()
        if what == "sweep":
            self.world.sweep(now)
        else:
            self.world.handle(now, what, whom, epoch)

    def _arrive(self, job: Job, now: float) -> None:
        key = job.ask.service, job.ask.kind
        self._arrived[key] += 1
        lengths = self._lengths[key]
        lengths[0] += _LEARN * (job.ask.prompt - lengths[0])
        self.world.arrive(job, now)

    def _decide(self, now: float, first: bool = False) -> None:
        began = perf_counter()
        self.policy.observe(self._observed(now))
        target = self.policy.decide()
        self.decide_s += perf_counter() - began
        self.used.update(dict.fromkeys(key for key, count in target.items() if count))
        if first:
            self.world.begin(target)
        else:
            self.world.apply(target, now)
        if self._every_s:
            self._replicas.setdefault(int(now // self._every_s), sum(self.world.counts().values()))

    def moments(self, end_s: float) -> tuple[Moment, ...]:
        """Return the intervals up to the end, where they are asked for; a policy's period may be longer than one."""
        if not self._every_s:
            return ()
        every_s, replicas, found = self._every_s, 0, list[Moment]()
        came = Counter(int(job.ask.at_s // every_s) for job in self.jobs)
        for number in range(ceil(end_s / every_s)):
            begin_s = number * every_s
            replicas = self._replicas.get(number, replicas)
            joules = self.world.meter.drawn.get(number, 0.0)
            found.append(Moment(begin_s, min(every_s, end_s - begin_s), came[number], joules, replicas))
        return tuple(found)

    def _observed(self, now: float) -> Observation:
        world = self.world
        for job in world.ended[self._seen_ended :]:
            if job.ended == "finished":
                lengths = self._lengths[job.ask.service, job.ask.kind]
                lengths[1] += _LEARN * (job.ask.output - lengths[1])
        self._seen_ended = len(world.ended)
        seen = tuple(
            Seen(s, c, self._arrived[s, c], prompt, output) for (s, c), (prompt, output) in self._lengths.items()
        )
        self._arrived.clear()
        free: Counter[str] = Counter()
        failed: Counter[str] = Counter()
        for node in world.nodes:
            if node.state == "failed":
                failed[node.kind.name] += 1
            else:
                free[node.kind.name] += sum(slot.key is None for slot in node.slots)
        queued = {
            s: len(world.held[s]) + sum(len(r.waiting) for r in world.ready[s]) for s in range(len(self.fleet.services))
        }
        return Observation(now, self.fleet.period_s, seen, world.counts(), free, failed, queued)


def simulate(
    fleet: Fleet,
    profiles: Sequence[Profile],
    requests: Sequence[Asked],
    name: str,
    make: Make,
    router: Router,
    setting: Setting = Setting(),
) -> Outcome:
    """Return what comes of requests under a policy. Equal arguments give equal outcomes, but for `decide_s`.

    What the policy's first decision wants is there when time begins: starts are charged after it.

    Raises:
        InputError: a failure names no node.
    """
    given = given_of(fleet, profiles, requests)
    began = perf_counter()
    policy = make(given)
    making = perf_counter() - began
    run = _Run(fleet, requests, policy, router, setting)
    seconds = run.go()
    meter = run.world.meter
    done = [job for job in run.jobs if job.ended == "finished"]
    return Outcome(
        policy=name,
        seed=setting.seed,
        classes=classes_of(fleet, run.jobs),
        seconds=seconds,
        joules=dict(meter.joules),
        slot_seconds=dict(meter.seconds),
        prompt_tokens=sum(job.ask.prompt for job in done),
        output_tokens=sum(job.ask.output for job in done),
        node_hours=meter.seconds["host"] / 3600,
        switches=dict(run.world.switches),
        basis=_basis(run),
        decide_s=making + run.decide_s,
        explained=policy.explain(),
        grams=meter.grams if fleet.tariff and fleet.tariff.carbon else None,
        money=meter.money if fleet.tariff and fleet.tariff.price else None,
        tariff_basis=fleet.tariff.basis if fleet.tariff else None,
        moments=run.moments(seconds),
    )


def given_of(fleet: Fleet, profiles: Sequence[Profile], requests: Sequence[Asked]) -> Given:
    """Return what a policy may know of requests before they come."""
    bins: dict[int, Counter[tuple[int, int]]] = {}
    lengths: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for ask in requests:
        key = ask.service, ask.kind
        bins.setdefault(int(ask.at_s // BIN_S), Counter())[key] += 1
        lengths.setdefault(key, []).append((ask.prompt, ask.output))
    last = max(bins, default=0)
    return Given(
        fleet,
        tuple(profiles),
        {
            (s, c): _means(lengths.get((s, c), []), kind.prompt, kind.output)
            for s, service in enumerate(fleet.services)
            for c, kind in enumerate(service.classes)
        },
        tuple(Counted(i * BIN_S, dict(bins.get(i, Counter()))) for i in range(last + 1)),
    )


def _means(found: Sequence[tuple[int, int]], prompt: float, output: float) -> tuple[float, float]:
    """Return the means of prompts and answers; the file's where none came."""
    if not found:
        return prompt, output
    return sum(p for p, _ in found) / len(found), sum(o for _, o in found) / len(found)


def _takes(fleet: Fleet) -> Takes:
    @cache
    def takes(service: int, point: OperatingPoint) -> tuple[float, ...]:
        asked = fleet.services[service]
        return tuple(capacity(point, kind, asked.attainment).rate for kind in asked.classes)

    return takes


def _basis(run: _Run) -> Basis:
    points = [point for _, point in run.used]
    bases = {basis for p in points for basis in (p.profile.basis, p.node.watts_basis, p.clock.basis)}
    return weakest(["measured", *bases])


def _range(fleet: Fleet) -> str:
    return ", ".join(f"{node.name}-0 to {node.name}-{node.count - 1}" for node in fleet.nodes)
