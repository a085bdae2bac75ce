"""The forecast: a level, its rise until a new replica serves, and a head-room; and the policy without each part."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from llmbuild.fleet.policies.adaptive import ALL, Adaptive, Parts, lead_s
from llmbuild.fleet.policies.forecast import ABOVE, BIN_S, FEWEST, Forecast, rise
from llmbuild.fleet.policies.routing import least_loaded
from llmbuild.fleet.policy import Observation, Seen
from llmbuild.fleet.simulate.outcome import Outcome
from llmbuild.fleet.simulate.run import given_of, simulate
from llmbuild.fleet.simulate.trace import Asked, steady_trace
from llmbuild.spec.fleet import Clock
from tests.support.fleets import fleet, node, profile, service


def seen(forecast: Forecast, rates: list[float]) -> None:
    for i, rate in enumerate(rates, 1):
        one = Seen(0, 0, rate * BIN_S, 100.0, 50.0)
        forecast.observe(Observation(i * BIN_S, BIN_S, (one,), {}, {}, {}, {}))


def begun(ahead_s: float = 0.0, z: float = 0.0) -> Forecast:
    forecast = Forecast(fleet(service()), z, ahead_s)
    forecast.begin({(0, 0): 4.0})
    return forecast


def test_a_straight_rise_is_its_slope_and_no_other_line_rises() -> None:
    assert rise([1.0 + 0.5 * i for i in range(10)]) == pytest.approx(0.5)
    assert rise([9.0 - 0.5 * i for i in range(10)]) == 0.0
    assert rise([3.0] * 10) == 0.0


def test_few_windows_and_those_that_scatter_more_than_they_rise_have_no_rise() -> None:
    assert rise([1.0 + i for i in range(FEWEST - 1)]) == 0.0
    assert rise([1.0, 9.0, 1.0, 1.0, 8.0, 2.0, 1.0, 9.0]) == 0.0


def test_a_rise_goes_on_for_the_seconds_that_a_start_takes() -> None:
    climbing = [4.0 + 0.05 * i for i in range(20)]
    now, ahead = begun(), begun(ahead_s=300.0)
    seen(now, climbing)
    seen(ahead, climbing)
    assert ahead.rates()[0, 0] - now.rates()[0, 0] == pytest.approx(0.05 * 300 / BIN_S)


def test_no_forecast_is_far_above_what_was_seen() -> None:
    ahead = begun(ahead_s=3000.0)
    seen(ahead, [4.0 + i for i in range(10)])
    assert ahead.rates()[0, 0] == pytest.approx(13.0 * ABOVE)


def test_headroom_grows_with_the_errors() -> None:
    rng = random.Random(0)
    calm, rough = begun(z=1.64), begun(z=1.64)
    seen(calm, [4.0] * 20)
    seen(rough, [rng.uniform(2.0, 6.0) for _ in range(20)])
    assert calm.rates()[0, 0] == pytest.approx(4.0, rel=0.01)
    assert rough.rates()[0, 0] > 4.5


def test_a_start_takes_the_boot_of_the_slowest_node_and_the_load_of_the_slowest_profile() -> None:
    assert lead_s(given_of(fleet(nodes=(node(), replace(node("slow"), boot_s=40.0))), (profile(),), [])) == 45.0


CLOCK = Clock(800, 1.02, 1.2, 0.6, "measured", "made up")


def outcome(parts: Parts) -> Outcome:
    made = fleet(service("a", 12.0), nodes=(replace(node("fast", 6, 1, (CLOCK,)), boot_s=100.0),))
    calm = [one for one in steady_trace(made, 600, 1) if one.number % 6 == 0 or one.at_s < 200]
    requests = [Asked(i, *one[1:]) for i, one in enumerate(calm)]
    return simulate(made, (profile(),), requests, "x", lambda given: Adaptive(given, parts), least_loaded)


@pytest.mark.parametrize("name", ["headroom", "hold"])
def test_without_what_it_keeps_the_policy_takes_less_energy(name: str) -> None:
    assert outcome(replace(ALL, **{name: False})).total_j < outcome(ALL).total_j


def test_without_clocks_the_policy_takes_more_energy() -> None:
    assert outcome(replace(ALL, clocks=False)).total_j > 1.02 * outcome(ALL).total_j
