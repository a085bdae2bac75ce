"""The live loop over a backend of records and a clock that a test steers: starts, drains, deaths, and what is told."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import pytest

from llmbuild.fleet.actuators.interface import (
    Answer,
    Live,
    Route,
    SetClock,
    SetPartition,
    SetPower,
    Start,
    Stop,
    perform,
    slots_of,
)
from llmbuild.fleet.capacity import OperatingPoint, capacity
from llmbuild.fleet.loop import FAILED, Loop, Traffic, given_live, permitted, unseen
from llmbuild.fleet.policies.named import POLICIES
from llmbuild.fleet.policy import Given, Observation, Seen, Target
from llmbuild.fleet.transition import Scene, steps, used
from llmbuild.spec.fleet import Clock, Fleet
from tests.support.fleets import Fixed, fleet, node, point, profile, service
from tests.support.live_fleets import FakeBackend

SMALL = fleet(service(), nodes=(node("fast", 2),))
OLD, NEW = (point(SMALL, profile("fast"), batch) for batch in (8, 16))
EACH = capacity(OLD, SMALL.services[0].classes[0], 0.99).rate
"""Requests a second that a replica of OLD takes."""


class Steered:
    """A loop, its backend, and what it tells."""

    def __init__(self, made: Fleet, *targets: tuple[float, Target]) -> None:
        self.backend, self.lines, self.answers = FakeBackend(), list[str](), list[Answer]()
        self.policy = Watched(*targets)
        self.loop = Loop(
            made, self.policy, self.backend, self.lines.append, lambda _, answer: self.answers.append(answer)
        )
        self.fleet, self.now = made, 0.0
        self.serving: list[Live] = []

    def run(self, until: float, rates: Mapping[tuple[int, int], float] | None = None) -> None:
        """Beat four times a second."""
        while self.now <= until:
            self.backend.now = self.now
            traffic = replace(unseen(self.fleet), rates=rates or {})
            self.serving = [one for one in self.loop.beat(self.now, traffic) if one.state == "ready"]
            if rates and self.now >= 5:
                self.checked(rates)
            self.now += 0.25

    def checked(self, rates: Mapping[tuple[int, int], float]) -> None:
        """Hold the capacity that takes requests against the load of the moment."""
        assert used(self.fleet, 0, rates, [one.point for one in self.serving]) <= 1, self.now

    def points(self) -> list[int]:
        """Return the batch limits of what serves."""
        return sorted(one.point.batch for one in self.serving)


class Watched(Fixed):
    """A policy that keeps what it was shown."""

    def __init__(self, *targets: tuple[float, Target]) -> None:
        super().__init__(*targets)
        self.seen: list[Observation] = []

    def observe(self, seen: Observation) -> None:
        self.seen.append(seen)
        super().observe(seen)


def test_new_replicas_are_ready_before_old_ones_are_drained() -> None:
    made = fleet(service(), nodes=(node("fast", 3),))
    old, new = (point(made, profile("fast"), batch) for batch in (8, 16))
    at = Steered(made, (0.0, {(0, old): 2}), (20.0, {(0, new): 2}))
    at.run(60.0, {(0, 0): EACH * 0.9})
    assert at.points() == [16, 16]
    kinds = [type(one).__name__ for one in at.backend.actions]
    assert kinds == ["Start", "Start", "Start", "Route", "Stop", "Start", "Route", "Stop"]


def test_without_a_slot_one_goes_first_where_the_others_take_the_load() -> None:
    at = Steered(SMALL, (0.0, {(0, OLD): 2}), (20.0, {(0, NEW): 2}))
    at.run(60.0, {(0, 0): EACH * 0.9})
    assert at.points() == [16, 16]
    assert any("makes room; the others take the load of the moment, 90%" in line for line in at.lines)


def test_without_room_for_the_load_of_the_moment_it_is_said_what_is_missing() -> None:
    at = Steered(SMALL, (0.0, {(0, OLD): 2}), (20.0, {(0, NEW): 2}))
    at.run(4.0)
    while at.now < 60:
        at.run(at.now, {})
        at.loop.beat(at.now, replace(unseen(SMALL), rates={(0, 0): EACH * 1.6}))
    assert at.points() == [16, 16]
    (said,) = (line for line in at.lines if "no room to start" in line)
    assert "what is left has 62% of the load of the moment" in said


def test_a_replica_that_the_load_of_the_moment_needs_is_kept() -> None:
    at = Steered(SMALL, (0.0, {(0, OLD): 2}), (20.0, {(0, OLD): 1}))
    at.run(40.0, {(0, 0): EACH * 1.5})
    assert len(at.serving) == 2
    at.run(45.0, {(0, 0): EACH * 0.5})
    assert len(at.serving) == 1


def test_a_replica_that_dies_is_started_again() -> None:
    at = Steered(SMALL, (0.0, {(0, OLD): 2}))
    at.run(20.0)
    at.backend.die(at.serving[0].name)
    at.run(20.25)
    assert len(at.serving) == 1
    at.run(23.0)
    assert len(at.serving) == 2
    assert sum(isinstance(one, Start) for one in at.backend.actions) == 3
    assert not any(isinstance(one, Stop) for one in at.backend.actions)


def test_starts_that_fail_are_tried_ever_more_rarely_and_their_node_fails() -> None:
    made = replace(SMALL, period_s=1.0)
    at = Steered(made, (0.0, {(0, OLD): 2}))
    at.backend.broken = {slots_of(made)[0]}
    at.run(60.0)
    starts = [one for one in at.backend.actions if isinstance(one, Start) and one.slot in at.backend.broken]
    assert len(starts) == 6  # at 0, 3, 7, 13, 23 and 41 s: each takes 2 s to fail; 1, 2, 4, 8, 16, 32 s pass
    assert at.policy.seen[-1].failed == {"fast": 1}
    assert at.policy.seen[-1].free_slots == {}
    at.backend.broken = set()
    at.run(120.0)
    assert (len(at.serving), at.policy.seen[-1].failed) == (2, {})
    assert FAILED == 3


def test_a_decision_is_made_once_in_a_period_however_often_the_loop_beats() -> None:
    at = Steered(replace(SMALL, period_s=10.0), (0.0, {(0, OLD): 1}))
    at.run(35.0)
    assert [one.now_s for one in at.policy.seen] == [0.0, 10.0, 20.0, 30.0]
    assert all(one.period_s == 10.0 for one in at.policy.seen)
    assert len([line for line in at.lines if line.startswith("decides")]) == 1


def test_what_starts_and_is_not_wanted_any_more_is_given_up() -> None:
    live = [Live("r1", 0, OLD, slots_of(SMALL)[0], "starting")]
    (done,) = steps(SMALL, {}, Scene(live, frozenset(), {}))
    assert done == Stop("r1", "not wanted any more before it was ready")


def test_clocks_are_planned_and_set_only_where_the_file_allows_it() -> None:
    low = Clock(1000, 1.2, 1.2, 0.7)
    kind = node("fast", 2, clocks=(low,))
    denied = fleet(service(), nodes=(kind,))
    allowed = replace(denied, actuators=("set_clock",))
    assert permitted(denied).nodes[0].clocks == ()
    assert permitted(allowed) == allowed
    slow = OperatingPoint(profile("fast"), kind, 8, low)
    for made, outcome in ((denied, "denied"), (allowed, "applied")):
        at = Steered(made, (0.0, {(0, slow): 1}))
        at.run(1.0)
        assert [one.outcome for one in at.answers] == [outcome, "applied"]
        assert [type(one) for one in at.backend.actions] == ([Start] if outcome == "denied" else [SetClock, Start])
        assert ("add `actuators: [set_clock]`" in "".join(at.lines)) == (outcome == "denied")


def test_guarded_actions_are_denied_or_left_to_the_backend() -> None:
    backend, allowed = FakeBackend(), replace(SMALL, actuators=("set_power", "set_partition"))
    for action in (SetPower("fast-0", 100.0, "w"), SetPartition("fast-0", ("1g", "1g"), "w")):
        assert perform(SMALL, backend, action).outcome == "denied"
        assert perform(allowed, backend, action) == Answer("unsupported", "it does not")


@pytest.mark.parametrize("name", ["adaptive", "static-peak", "static-mean", "reactive", "lowest-clock"])
def test_every_live_policy_begins_with_the_rates_of_the_file(name: str) -> None:
    made = fleet(service("s", EACH * 1.5), nodes=(node("fast", 4),))
    given: Given = given_live(made, (profile("fast"),))
    assert given.most(0.0, 60.0) == pytest.approx({(0, 0): EACH * 1.5})
    policy = POLICIES[name].make(given)
    policy.observe(Observation(0.0, 10.0, (Seen(0, 0, 0, 100.0, 50.0),), {}, {"fast": 4}, {}, {}))
    assert sum(policy.decide().values()) >= 2


def test_the_adaptive_policy_follows_the_load_live() -> None:
    made = fleet(service("s", 1.0), nodes=(node("fast", 4),))
    given = given_live(made, (profile("fast"),))
    backend, lines = FakeBackend(), list[str]()
    loop = Loop(made, POLICIES["adaptive"].make(given), backend, lines.append)
    now, most = 0.0, 0
    for _ in range(4 * 400):
        rate = EACH * 3.5 if 100 <= now < 200 else 1.0
        backend.now = now
        traffic = Traffic((Seen(0, 0, round(rate * 10), 100.0, 50.0),), {}, {(0, 0): rate})
        live = loop.beat(now, traffic)
        most = max(most, len(live)) if now < 250 else most
        now += 0.25
    assert most >= 3
    assert any("capacity was short" in line for line in lines)


def test_replicas_that_take_no_more_requests_are_closed_before_they_are_told_to_end() -> None:
    at = Steered(SMALL, (0.0, {(0, OLD): 2}), (20.0, {(0, OLD): 1}))
    at.run(30.0)
    last = [one for one in at.backend.actions if isinstance(one, (Route, Stop))]
    assert [type(one) for one in last] == [Route, Stop]
    assert any(line.startswith("ended") for line in at.lines)
    assert not any(line.startswith("died") for line in at.lines)


def drawn(rng: random.Random, made: Fleet) -> dict[tuple[int, OperatingPoint], int]:
    """Return a random target that the slots of a fleet hold, with something for every service."""
    found: dict[tuple[int, OperatingPoint], int] = {}
    slots = [slot.kind for slot in slots_of(made)]
    rng.shuffle(slots)
    for i, kind in enumerate(slots[: rng.randint(2, len(slots))]):
        service_ = i if i < 2 else rng.randrange(2)
        at = point(made, profile(kind), rng.choice((4, 8, 16)))
        found[service_, at] = found.get((service_, at), 0) + 1
    return found


def takes(made: Fleet, target: Target, service_: int) -> float:
    """Return the requests a second that a service's replicas take."""
    kind = made.services[service_].classes[0]
    return sum(capacity(p, kind, 0.99).rate * count for (of, p), count in target.items() if of == service_)


@pytest.mark.parametrize("seed", range(8))
def test_from_any_target_to_any_other_capacity_falls_below_the_load_only_where_it_is_said(seed: int) -> None:
    rng = random.Random(seed)
    made = fleet(service("a"), service("b"), nodes=(node("fast", 2), node("slow", 2)), period_s=1.0)
    backend, lines = FakeBackend(rng.choice((0.5, 2.0)), rng.choice((0.0, 3.0))), list[str]()
    loop = Loop(made, Fixed(*((40.0 * i, drawn(rng, made)) for i in range(6))), backend, lines.append)
    rates, held = {(0, 0): 0.0, (1, 0): 0.0}, [False, False]
    for beat in range(4 * 240):
        backend.now = now = beat / 4
        fresh = beat % 160 == 100  # a load that what is wanted takes, and that stays while the next target comes
        if fresh:
            rates = {(s, 0): takes(made, loop.target, s) * rng.uniform(0.1, 0.95) for s in (0, 1)}
        said = len(lines)
        live = loop.beat(now, replace(unseen(made), rates=rates))
        told = any("no room to start" in line for line in lines[said:])
        ready = Counter(one.key for one in live if one.state == "ready")
        for s in (0, 1):
            enough = takes(made, ready, s) >= rates[s, 0]
            assert enough or told or fresh or not held[s], (now, s, lines[-3:])
            held[s] = enough
        if beat % 160 == 159 and all(takes(made, loop.target, s) >= rates[s, 0] for s in (0, 1)):
            assert ready == Counter(loop.target), (now, lines[-5:])
