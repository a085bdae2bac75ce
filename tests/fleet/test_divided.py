"""Plans with partitions against enumeration of layouts, and the laws of layouts that are held."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import combinations_with_replacement, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbuild.fleet.plan.layouts import changed, columns, fewest, settled
from llmbuild.fleet.plan.load import stated
from llmbuild.fleet.plan.plan import Held, Plan, plan
from llmbuild.fleet.plan.program import Program, program
from llmbuild.fleet.plan.relax import relaxed
from llmbuild.fleet.plan.rounding import Rounding
from llmbuild.fleet.profiles.divided import divided
from llmbuild.spec.fleet import Fleet, NodeClass, Profile
from tests.support.fleets import divided_node, fleet, node, profile, service

MANY = ("a", "b", "c", "d")


def asked(
    *rates: float, kind: NodeClass | None = None, allowed: bool = True, beside: tuple[NodeClass, ...] = ()
) -> tuple[Fleet, tuple[Profile, ...]]:
    """Return a fleet of GPUs that may be divided, with a service for each rate."""
    kind = kind or divided_node()
    services = (service(name, rate) for name, rate in zip(MANY, rates, strict=False))
    made = fleet(*services, nodes=(kind, *beside))
    whole = (profile(kind.device), *(profile(each.device) for each in beside))
    return replace(made, actuators=("set_partition",) if allowed else ()), (*whole, *divided(made.nodes, whole))


def enumerated(found: Program) -> tuple[float, float]:
    """Return the least (shortage, cost) over all layouts of all nodes and all that their slots may hold."""
    (of,), best = found.columns, (float("inf"), float("inf"))
    for on in range(found.fleet.nodes[0].count + 1):
        for layouts in combinations_with_replacement(of.counts, on):
            room = [sum(counts[p] for counts in layouts) for p in range(len(of.parts))]
            for counts in product(range(3), repeat=len(found.options)):
                used = [0] * len(room)
                for option, count in zip(found.options, counts, strict=True):
                    used[option.place] += count
                if all(u <= r for u, r in zip(used, room, strict=True)):
                    rounding = Rounding(found)
                    rounding.place(counts)
                    fits = [rounding.fit(s, rounding.counts(s)) for s in range(len(found.demands))]
                    cost = sum(fit.cost for fit in fits) + on * found.node_cost[0]
                    best = min(best, (sum(sum(fit.missing) for fit in fits), cost))
    return best


@settings(max_examples=8, derandomize=True)
@given(rate=st.floats(0.2, 30), other=st.floats(0.2, 30))
def test_an_exact_plan_is_the_best_of_all_layouts(rate: float, other: float) -> None:
    made, profiles = asked(rate, other, kind=divided_node(layouts=("3g.40gb", "3g.40gb")))
    shortage, cost = enumerated(program(made, profiles, stated(made)))
    found, searched = (plan(made, profiles, stated(made), small=most) for most in (60, 0))
    if shortage > 0:
        assert not found.feasible
        return
    assert (found.method, found.feasible) == ("exact", True)
    assert found.cost == pytest.approx(cost, rel=1e-6)
    assert found.bound == pytest.approx(cost, rel=1e-4)
    assert searched.bound <= cost * (1 + 1e-6)
    assert cost * (1 - 1e-6) <= searched.cost <= cost * 1.1


@settings(max_examples=25, derandomize=True)
@given(wanted=st.tuples(*[st.integers(0, 3)] * 6), held=st.lists(st.integers(0, 27), max_size=6))
def test_the_fewest_nodes_have_what_is_wanted_and_one_less_does_not(wanted: tuple[int, ...], held: list[int]) -> None:
    made, _ = asked(1.0)
    of = columns(made, made.nodes[0])
    found = fewest(of, wanted)
    assert all(have >= want for have, want in zip(of.slots(found), wanted, strict=True))
    on = tuple(held.count(i) for i in range(len(of.layouts)))
    kept = settled(of, on, wanted)
    assert all(have >= want for have, want in zip(of.slots(kept), wanted, strict=True))
    assert sum(kept) == of.nodes(wanted)
    assert settled(of, kept, wanted) == kept
    memory = sum(want * (part.memory_share if part else 1) for want, part in zip(wanted, of.parts, strict=True))
    assert of.nodes(wanted) >= memory - 1e-9


def test_the_fewest_nodes_of_many_slots_are_near_the_bound() -> None:
    made, _ = asked(1.0)
    of = columns(made, made.nodes[0])
    names = [part.name if part else "" for part in of.parts]
    wanted = tuple({"3g.40gb": 70, "2g.20gb": 40, "1g.10gb": 35}.get(name, 0) for name in names)
    assert 35 + 40 / 4 <= of.nodes(wanted) <= 52  # two 3g a node, and four times the memory of a 2g


def test_several_small_services_share_a_gpu_and_watts_are_those_of_one_board() -> None:
    made, profiles = asked(0.5, 0.5, 0.5, 0.5, kind=divided_node(count=4))
    together = plan(made, profiles, stated(made))
    apart = plan(made.undivided(), profiles, stated(made))
    assert (together.nodes, apart.nodes) == ((1,), (4,))
    assert together.cost < apart.cost
    ((layout, count),) = together.layouts[0]
    assert count == 1
    held = Counter(a.point.part for a in together.assignments for _ in range(a.replicas))
    assert held <= Counter(layout.slices)
    assert together.watts >= made.nodes[0].idle_w
    assert together.basis == "estimated"


@pytest.mark.parametrize("held", [False, True])
def test_the_search_alone_finds_the_shared_gpu(held: bool) -> None:
    made, profiles = asked(0.5, 0.5, 0.5, 0.5, kind=divided_node(count=4))
    whole = plan(replace(made, actuators=()), profiles, stated(made))
    assert whole.nodes == (4,)
    found = plan(made, profiles, stated(made), held=_held(whole, 1e6) if held else None, small=0)
    assert found.nodes == (1,)
    assert found.bound <= found.cost


def _held(made: Plan, horizon_s: float) -> Held:
    replicas = tuple((a.service, a.point, a.replicas) for a in made.assignments)
    return Held(replicas, horizon_s, made.layouts)


def test_a_layout_is_kept_where_another_one_would_not_pay() -> None:
    made, profiles = asked(0.5, 0.5)
    whole = plan(replace(made, actuators=()), profiles, stated(made))
    assert plan(made, profiles, stated(made), held=_held(whole, 1.0)).layouts == whole.layouts
    assert plan(made, profiles, stated(made), held=_held(whole, 1e6)).nodes == (1,)


def test_without_leave_the_layout_stays_as_it_is() -> None:
    made, profiles = asked(0.5, 0.5, kind=divided_node(now=("3g.40gb", "3g.40gb")), allowed=False)
    found = plan(made, profiles, stated(made))
    assert [(layout.name, count) for layout, count in found.layouts[0]] == [("2x 3g.40gb", 1)]


def test_a_class_without_partitions_plans_as_if_there_were_none_elsewhere() -> None:
    made, profiles = asked(6.0, 3.0, kind=divided_node(count=1), beside=(node("fast", 4, 2),))
    alone = replace(made, nodes=made.nodes[1:])
    first = plan(alone, profiles, stated(alone))
    gone = made.with_counts({"gpu": 0})
    second = plan(gone, profiles, stated(gone))
    assert (second.cost, second.nodes[1:]) == (pytest.approx(first.cost), first.nodes)
    assert second.bound == pytest.approx(first.bound)


@settings(max_examples=6, derandomize=True)
@given(rates=st.tuples(*[st.floats(0.2, 12)] * 3), most=st.integers(1, 5))
def test_a_plan_never_has_more_than_there_is(rates: tuple[float, ...], most: int) -> None:
    made, profiles = asked(*rates, kind=divided_node(count=3), beside=(node("fast", 2, 2),))
    found = plan(made, profiles, stated(made), max_nodes=most, moves=600, small=0)
    assert sum(found.nodes) <= most
    assert found.nodes[0] == sum(count for _, count in found.layouts[0]) <= 3
    have = Counter(part for layout, count in found.layouts[0] for part in layout.slices for _ in range(count))
    used = Counter(a.point.part for a in found.assignments if a.point.part for _ in range(a.replicas))
    assert used <= have
    assert found.least_shortage <= found.shortage + 1e-6
    if found.feasible:
        assert relaxed(program(made, profiles, stated(made), most)).bound <= found.cost * (1 + 1e-6)


def test_a_shortage_says_how_many_nodes_are_missing_where_they_are_divided() -> None:
    made, profiles = asked(60.0, kind=divided_node(count=1))
    found = plan(made, profiles, stated(made))
    count = int(found.shortages[0].told.split(" more of ")[0])
    more = made.with_counts({"gpu": 1 + count})
    assert plan(more, profiles, stated(more)).feasible


def test_changes_are_of_nodes_that_are_on() -> None:
    assert changed((2, 0), (1, 1)) == 1
    assert changed((2, 0), (2, 1)) == 0
    assert changed((2, 0), (0, 1)) == 1
