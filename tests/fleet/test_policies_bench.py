"""Policies over a trace as the benchmark keeps and plots them."""

from __future__ import annotations

import sys
from dataclasses import replace
from math import nan
from pathlib import Path

import pytest

from llmbuild.errors import InputError
from llmbuild.fleet.simulate.outcome import ClassOutcome, Moment, Outcome
from llmbuild.fleet.simulate.run import Setting, simulate
from llmbuild.fleet.simulate.trace import steady_trace
from tests.support.fleets import fleet, node, profile, service

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))

import fleet as bench
from comparison import fleet_plot, fleet_runs
from comparison.fleet_runs import Simulated

MOMENTS = tuple(Moment(20.0 * i, 20.0, 10 * i, 2000.0 + i, 3 + i % 2) for i in range(6))


def outcome(policy: str, joules: float, met: int, seed: int = 0) -> Outcome:
    kind = ClassOutcome("s", "chat", 1000, met, 0, 0, 0, 1.0, (0.1, 0.2, 0.3), (nan, nan, nan))
    uses = {"decode": joules * 50, "prompt": joules * 50}
    return Outcome(policy, seed, (kind,), 120.0, uses, {}, 10, 100, 1.0, {}, "estimated", 0.1, "", moments=MOMENTS)


def saved(*outcomes: Outcome, clocks: bool = False) -> Simulated:
    return Simulated("cpus", 0.99, clocks, True, 100.0, ("a trace",), outcomes)


def test_the_best_policy_in_use_takes_the_least_energy_of_those_that_attain_what_is_asked() -> None:
    peak, ours = outcome("static-peak", 2.0, 1000), outcome("adaptive", 1.0, 995)
    more, less = outcome("reactive", 1.8, 995), outcome("lowest-clock", 1.5, 991)
    assert saved(peak, ours, more, less, clocks=True).best_in_use == "lowest-clock"
    assert saved(peak, more, outcome("lowest-clock", 1.5, 980), clocks=True).best_in_use == "reactive"
    assert (
        saved(outcome("reactive", 1.8, 900), outcome("lowest-clock", 2.0, 950), clocks=True).best_in_use
        == "lowest-clock"
    )
    assert saved(peak, ours).best_in_use is None


def test_without_clocks_the_lowest_clock_is_the_static_plan_and_left_out() -> None:
    made = saved(outcome("static-peak", 2.0, 1000), outcome("reactive", 2.5, 995), outcome("lowest-clock", 2.0, 1000))
    assert (made.policies, made.best_in_use) == (("static-peak", "reactive"), "reactive")


def test_attainment_is_the_mean_over_seeds_of_the_worst_class() -> None:
    assert fleet_runs.attained([outcome("x", 1.0, 900), outcome("x", 1.0, 950, seed=1)]) == pytest.approx(0.925)


def test_switching_is_the_share_of_boots_layouts_and_loads() -> None:
    uses = {"decode": 60.0, "prompt": 20.0, "parked": 10.0, "boot": 5.0, "change": 3.0, "load": 2.0}
    one = replace(outcome("adaptive", 1.0, 990), joules=uses)
    assert (one.switching_share, one.idle_share) == pytest.approx((0.1, 0.2))
    assert "10.0%" in bench.text(saved(one))


def test_what_a_simulation_gives_is_read_back_as_it_was(tmp_path: Path) -> None:
    made = fleet(service("a", 4.0), nodes=(node("fast", 4, 2),))
    requests, named = steady_trace(made, 100, 1), bench.policy("adaptive")
    one = simulate(made, (profile(),), requests, "adaptive", named.make, named.router(made), Setting(1, every_s=20.0))
    whole = saved(one)
    fleet_runs.write(whole, tmp_path / "saved.json")
    assert fleet_runs.read(tmp_path / "saved.json") == whole
    assert bench.text(fleet_runs.read(tmp_path / "saved.json")) == bench.text(whole)


def test_percentiles_of_nothing_are_read_back_as_nothing(tmp_path: Path) -> None:
    fleet_runs.write(saved(outcome("adaptive", 1.0, 0)), tmp_path / "saved.json")
    (one,) = fleet_runs.read(tmp_path / "saved.json").outcomes
    assert str(one.classes[0].tpot_s) == "(nan, nan, nan)"


def test_plots_are_written_of_files_and_are_small(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    made = saved(*(outcome(name, 1.0 + seed / 10, 990, seed) for name in bench.POLICIES for seed in range(3)))
    fleet_plot.energy([made, replace(made, clocks=True)], tmp_path / "energy.svg")
    fleet_plot.day(made, tmp_path / "day.svg")
    sizes = [(tmp_path / name).stat().st_size for name in ("energy.svg", "day.svg")]
    assert [1_000 < size < 150_000 for size in sizes] == [True, True]


def test_a_day_without_power_by_time_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    made = saved(replace(outcome("adaptive", 1.0, 990), moments=()))
    with pytest.raises(InputError, match="--every"):
        fleet_plot.day(made, tmp_path / "day.svg")


@pytest.mark.parametrize("text", ["no JSON", "[]", '{"runs": []}', '{"format": "fleet 1", "fleet": "cpus"}'])
def test_a_file_that_no_simulation_saved_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "saved.json").write_text(text)
    with pytest.raises(InputError, match=r"saved\.json"):
        fleet_runs.read(tmp_path / "saved.json")
