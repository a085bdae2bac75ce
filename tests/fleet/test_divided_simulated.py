"""Layouts in the simulator: drains, the time of a change, leave to change, and watts that slices do not lower."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llmbuild.fleet.capacity import OperatingPoint
from llmbuild.fleet.plan.load import stated
from llmbuild.fleet.plan.plan import plan
from llmbuild.fleet.policies.named import POLICIES
from llmbuild.fleet.policies.routing import least_loaded
from llmbuild.fleet.policy import Target, target_of
from llmbuild.fleet.profiles.divided import of_slice
from llmbuild.fleet.simulate.outcome import Outcome
from llmbuild.fleet.simulate.run import Failing, Setting, simulate
from llmbuild.fleet.simulate.trace import steady_trace
from llmbuild.spec.fleet import Fleet, Profile
from llmbuild.spec.partitions import GPUS
from tests.fleet.test_divided import asked
from tests.support.fleets import Fixed, divided_node, profile

BY_NAME = {each.name: each for each in GPUS["H100-80GB"].slices}


def on(made: Fleet, name: str) -> OperatingPoint:
    """Return a point on a slice."""
    return OperatingPoint(of_slice(profile("gpu"), f"gpu/{name}", BY_NAME[name]), made.nodes[0], 16, part=BY_NAME[name])


def run(made: Fleet, profiles: tuple[Profile, ...], *targets: tuple[float, Target], seconds: float = 120) -> Outcome:
    requests = steady_trace(made, seconds, 1)
    return simulate(made, profiles, requests, "fixed", Fixed(*targets), least_loaded)


def test_an_idle_node_draws_the_same_in_every_layout() -> None:
    made, profiles = asked(0.01)
    drawn = []
    for name in ("7g.80gb", "3g.40gb", "1g.10gb"):
        outcome = run(made, profiles, (0.0, {(0, on(made, name)): 1}), seconds=400)
        idle = outcome.total_j - outcome.joules["decode"] - outcome.joules["prompt"]
        drawn.append(idle / outcome.slot_seconds["host"])
    board = made.nodes[0].idle_w
    assert all(board <= each <= board + 40 for each in drawn)  # and what the loaded slice has above an empty one
    assert drawn == sorted(drawn, reverse=True)


def test_what_a_plan_with_partitions_draws_is_what_the_simulator_counts() -> None:
    made, profiles = asked(0.5, 0.5, 0.5, 0.5, kind=divided_node(count=4))
    found = plan(made, profiles, stated(made))
    outcome = run(made, profiles, (0.0, target_of(found)), seconds=600)
    assert outcome.switches == {}
    assert outcome.total_j / outcome.seconds == pytest.approx(found.watts, rel=0.05)
    assert outcome.attainment >= 0.98


@pytest.mark.parametrize(("change", "seconds"), [("direct", 2.15), ("operator", 65.9)])
def test_a_change_drains_takes_its_time_and_is_charged(change: str, seconds: float) -> None:
    made, profiles = asked(1.0, kind=divided_node(count=1, change="operator" if change == "operator" else "direct"))
    before, after = on(made, "7g.80gb"), on(made, "3g.40gb")
    outcome = run(made, profiles, (0.0, {(0, before): 1}), (20.0, {(0, after): 2}), seconds=200)
    assert outcome.slot_seconds["change"] == pytest.approx(seconds)
    assert outcome.joules["change"] == pytest.approx(seconds * made.nodes[0].bare_w)
    assert outcome.slot_seconds["load"] == pytest.approx(2 * 5.0)
    assert outcome.switches == {"partition": 1, "start": 2, "stop": 1}
    assert (outcome.classes[0].lost, outcome.classes[0].rejected, outcome.classes[0].unfinished) == (0, 0, 0)


def test_a_spare_node_takes_the_new_layout_before_the_old_one_goes() -> None:
    made, profiles = asked(1.0, kind=divided_node(count=2))
    before, after = on(made, "7g.80gb"), on(made, "3g.40gb")
    outcome = run(made, profiles, (0.0, {(0, before): 1}), (20.0, {(0, after): 2}), seconds=200)
    assert (outcome.switches["boot"], outcome.switches["partition"], outcome.switches["off"]) == (1, 1, 1)
    assert outcome.slot_seconds["boot"] == pytest.approx(20 + 2.15)
    assert outcome.attainment == 1.0


def test_a_node_is_drained_whose_service_others_serve() -> None:
    made, profiles = asked(1.0, 1.0, kind=divided_node(count=2))
    whole, half = on(made, "7g.80gb"), on(made, "3g.40gb")
    outcome = run(made, profiles, (0.0, {(0, whole): 2}), (20.0, {(0, whole): 1, (1, half): 1}), seconds=200)
    assert outcome.switches["partition"] == 1
    assert outcome.classes[0].attainment == 1.0
    assert outcome.classes[1].met > 0


def test_without_leave_the_layout_stays_and_it_is_told() -> None:
    made, profiles = asked(1.0, kind=divided_node(count=2), allowed=False)
    before, after = on(made, "7g.80gb"), on(made, "3g.40gb")
    outcome = run(made, profiles, (0.0, {(0, before): 1}), (20.0, {(0, before): 1, (0, after): 1}))
    assert outcome.switches == {"denied": 1}
    assert outcome.attainment == 1.0


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("allowed", [False, True])
def test_every_policy_runs_where_nodes_are_divided(name: str, allowed: bool) -> None:
    made, profiles = asked(0.5, 0.5, 0.5, kind=divided_node(count=3), allowed=allowed)
    requests = steady_trace(made, 150, 1)
    chosen = POLICIES[name]
    setting = Setting(1, failures=(Failing("gpu-0", 70.0, 20.0),))
    outcome = simulate(made, profiles, requests, name, chosen.make, chosen.router(made), setting)
    assert sum(one.arrivals for one in outcome.classes) == len(requests)
    assert sum(one.unfinished for one in outcome.classes) == 0
    assert outcome.switches.get("denied", 0) == 0
    assert outcome.switches.get("partition", 0) == 0 or allowed


def test_adaptive_divides_a_node_where_it_pays_and_not_for_a_short_time() -> None:
    made, profiles = asked(0.4, 0.4, kind=divided_node(count=2, change="operator"))
    requests = steady_trace(replace(made, services=(replace(made.services[0], rate=8.0), made.services[1])), 120, 1)
    late = [one._replace(at_s=one.at_s + 120, number=one.number + 9999) for one in steady_trace(made, 900, 2)]
    chosen = POLICIES["adaptive"]
    short = simulate(made, profiles, requests, "adaptive", chosen.make, chosen.router(made))
    long = simulate(made, profiles, [*requests, *late], "adaptive", chosen.make, chosen.router(made))
    assert short.switches.get("partition", 0) == 0
    assert long.switches.get("partition", 0) == 1
    assert long.attainment > 0.95
