"""Plans against exact enumeration on tiny fleets, and the laws of bounds, shortages and what-ifs."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbuild.fleet.plan.load import stated
from llmbuild.fleet.plan.plan import Held, plan
from llmbuild.fleet.plan.program import Program, program
from llmbuild.fleet.plan.relax import relaxed
from llmbuild.fleet.plan.rounding import Rounding
from llmbuild.spec.fleet import Clock, Fleet, Profile
from tests.support.fleets import fleet, node, point, profile, service, two_kinds


def enumerated(asked: Program, most: int) -> tuple[float, float]:
    """Return the least (shortage, cost) of all ways to place up to `most` replicas of each option."""
    best = (float("inf"), float("inf"))
    for counts in product(range(most + 1), repeat=len(asked.options)):
        rounding = Rounding(asked)
        rounding.place(counts)
        used = [0] * len(asked.fleet.nodes)
        for option, count in zip(asked.options, counts, strict=True):
            used[option.node] += count
        if all(u <= slots for u, slots in zip(used, asked.slots, strict=True)):
            nodes = sum(ceil(u / n.slots) for u, n in zip(used, asked.fleet.nodes, strict=True))
            if asked.max_nodes is None or nodes <= asked.max_nodes:
                best = min(best, rounding.value())
    return best


def small(rate: float, slow: float) -> tuple[Fleet, tuple[Profile, ...]]:
    """Return a fleet of few slots, so that every plan can be looked at."""
    made, profiles = two_kinds(rate)
    nodes = (replace(made.nodes[0], count=2), replace(made.nodes[1], count=1))
    services = (made.services[0], replace(made.services[1], rate=rate * slow))
    return replace(made, nodes=nodes, services=services), profiles


@settings(max_examples=25, derandomize=True)
@given(rate=st.floats(0.2, 20), slow=st.floats(0.1, 2))
def test_an_exact_plan_is_the_best_of_all(rate: float, slow: float) -> None:
    made, profiles = small(rate, slow)
    asked = program(made, profiles, stated(made))
    shortage, cost = enumerated(asked, 2)
    found = plan(made, profiles, stated(made))
    if shortage == 0:
        assert (found.feasible, found.cost) == (True, pytest.approx(cost, rel=1e-6))
        assert found.bound == pytest.approx(cost, rel=1e-4)
    else:
        assert not found.feasible
        assert found.shortage <= shortage * 1.1 + 1e-6


@settings(max_examples=25, derandomize=True)
@given(rate=st.floats(0.2, 20), slow=st.floats(0.1, 2))
def test_a_searched_plan_lies_between_the_bound_and_its_neighbours(rate: float, slow: float) -> None:
    made, profiles = small(rate, slow)
    asked = program(made, profiles, stated(made))
    shortage, cost = enumerated(asked, 2)
    found = plan(made, profiles, stated(made), small=0)
    assert found.least_shortage <= found.shortage + 1e-6
    if shortage == 0:
        assert found.feasible
        assert found.bound <= cost * (1 + 1e-6)
        assert cost * (1 - 1e-6) <= found.cost <= cost * 1.2


def test_the_relaxation_serves_what_it_says_with_the_slots_there_are() -> None:
    made, profiles = two_kinds(40.0)
    asked = program(made, profiles, stated(made))
    found = relaxed(asked)
    used = [0.0] * len(made.nodes)
    for option, count in zip(asked.options, found.replicas, strict=True):
        used[option.node] += count
    assert all(u <= slots + 1e-6 for u, slots in zip(used, asked.slots, strict=True))
    assert found.shortage == pytest.approx(sum(map(sum, found.missing)))


def test_every_request_of_a_feasible_plan_has_a_place() -> None:
    made, profiles = two_kinds(12.0)
    found = plan(made, profiles, stated(made))
    placed = {
        s.name: sum(x.rate for a in found.assignments if a.service == s.name for x in a.served) for s in made.services
    }
    assert found.feasible
    assert placed == {s.name: pytest.approx(s.rate) for s in made.services}
    assert all(a.used <= 1 + 1e-9 for a in found.assignments)
    assert found.basis == "measured"


def test_more_load_never_costs_less() -> None:
    made, profiles = two_kinds(6.0)
    costs = [plan(made, profiles, stated(made).times(x)).cost for x in (0.5, 1, 2, 3)]
    assert costs == sorted(costs)


def test_fewer_nodes_never_cost_less() -> None:
    made, profiles = two_kinds(12.0)
    whole = plan(made, profiles, stated(made))
    without = made.with_counts({"fast": 0})
    less = plan(without, profiles, stated(without))
    assert not less.feasible or less.cost >= whole.cost - 1e-6


def test_a_limit_of_nodes_is_kept() -> None:
    made, profiles = two_kinds(12.0)
    for most in (0, 1, 2, 3, 10):
        assert sum(plan(made, profiles, stated(made), most).nodes) <= most


def test_a_shortage_says_how_many_nodes_are_missing_and_they_are_enough() -> None:
    made = fleet(service("s", 60.0), nodes=(node(count=1),))
    found = plan(made, (profile(),), stated(made))
    assert not found.feasible
    told = found.shortages[0].told
    count = int(told.split(" more of ")[0])
    more = made.with_counts({"fast": 1 + count})
    assert plan(more, (profile(),), stated(more)).feasible
    fewer = made.with_counts({"fast": count})
    assert not plan(fewer, (profile(),), stated(fewer)).feasible


def test_an_slo_that_no_idle_replica_meets_is_told_with_its_distance() -> None:
    made = fleet(service("s", 1.0, tpot_s=0.005))
    found = plan(made, (profile(),), stated(made))
    assert "tpot_s 0.01 s on an idle replica, 0.005 s asked" in found.shortages[0].told


def test_priority_decides_who_goes_without() -> None:
    first, second = service("first", 30.0), replace(service("second", 30.0), priority=5.0)
    made = fleet(first, second, nodes=(node(count=3),))
    found = plan(made, (profile(),), stated(made))
    lacking = {s.service: s.rate for s in found.shortages}
    assert lacking.get("second", 0.0) < lacking["first"]


def test_what_runs_is_kept_where_a_change_would_not_pay() -> None:
    made, profiles = two_kinds(6.0)
    best = plan(made, profiles, stated(made))
    services = {a.service for a in best.assignments}
    other = [(s, point(made, profiles[0]), 2) for s in sorted(services)]
    short = plan(made, profiles, stated(made), held=Held(tuple(other), 1.0))
    long = plan(made, profiles, stated(made), held=Held(tuple(other), 1e9))
    assert {a.point.node.name for a in short.assignments} == {"fast"}
    assert long.cost == pytest.approx(best.cost, rel=0.05)


def test_with_what_is_held_kept_a_plan_adds_what_is_missing_and_takes_nothing_away() -> None:
    made, profiles = two_kinds(30.0)
    wasteful = (("a", point(made, profiles[1], 16), 3), ("b", point(made, profiles[0], 16), 1))
    held = Held(wasteful, 1e9)
    kept = plan(made, profiles, stated(made), held=held, keep=True)
    running = {(one.service, one.point): one.replicas for one in kept.assignments}
    assert all(running[service, at] >= count for service, at, count in wasteful)
    assert kept.feasible and sum(running.values()) > 4


def test_what_is_held_and_kept_is_there_still_where_the_load_is_small() -> None:
    made, profiles = two_kinds(0.5)
    held = Held((("a", point(made, profiles[0], 16), 2), ("b", point(made, profiles[0], 16), 1)), 1e9)
    kept, free = (plan(made, profiles, stated(made), held=held, keep=keep) for keep in (True, False))
    assert (sum(one.replicas for one in kept.assignments), sum(one.replicas for one in free.assignments)) == (3, 2)
    assert free.cost < kept.cost


def test_with_what_is_held_kept_another_clock_takes_nothing_away() -> None:
    clock = Clock(800, 1.02, 1.2, 0.6, "measured", "made up")
    made, which = fleet(service("s", 3.0), nodes=(node("fast", 4, 1, (clock,)),)), profile()
    held = Held((("s", point(made, which), 1),), 1e9)
    (only,) = plan(made, (which,), stated(made), held=held, keep=True).assignments
    assert (only.point.clock, only.replicas) == (clock, 1)


def test_a_lower_clock_is_chosen_where_it_saves_and_is_fast_enough() -> None:
    slow = Clock(800, 1.05, 1.3, 0.6, "estimated", "made up")
    made = fleet(service("s", 3.0), nodes=(node(clocks=(slow,)),))
    found = plan(made, (profile(),), stated(made))
    assert [a.point.clock.mhz for a in found.assignments] == [800]
    assert found.basis == "estimated"


def test_objectives_choose_differently() -> None:
    made, profiles = two_kinds(12.0)
    nodes = (replace(made.nodes[0], price_per_h=1.0), replace(made.nodes[1], price_per_h=9.0))
    made = replace(made, nodes=nodes)
    cheap = plan(replace(made, objective="cost"), profiles, stated(made))
    saving = plan(replace(made, objective="energy"), profiles, stated(made))
    assert cheap.price_per_h < saving.price_per_h
    assert cheap.watts > saving.watts


def test_equal_programs_have_equal_plans() -> None:
    made, profiles = two_kinds(17.0)
    first, second = (plan(made, profiles, stated(made), small=0) for _ in range(2))
    assert replace(first, seconds=0.0) == replace(second, seconds=0.0)
