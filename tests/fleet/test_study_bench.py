"""The study of policies: its traces, the runs that it keeps, and what it says of ours against others."""

from __future__ import annotations

import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

from llmbuild.errors import InputError
from llmbuild.fleet.policies.adaptive import Parts
from llmbuild.fleet.policies.named import POLICIES
from llmbuild.fleet.simulate.trace import Arrival, Trace
from tests.fleet.test_policies_bench import outcome, saved
from tests.support.fleets import fleet, node, profile, service

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))

import fleet_study as bench
from comparison import fleet_ablation
from comparison.fleet_pieces import Pieces, against, with_all
from comparison.fleet_settings import STUDIES, Source, Study

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"
SMALL = Study("small", "none", 2, 300, (Source("", "trace.csv", 1.0, 1.0),))


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    """A folder with a trace of a minute."""
    rows = [f"2023-11-16 00:00:{s:02}.0,{50 + s},{10 + s % 7}" for s in range(60)]
    (tmp_path / "trace.csv").write_text("\n".join([HEADER, *rows]))
    return tmp_path


def test_a_repeated_trace_comes_again_behind_itself() -> None:
    one = Trace("t", (Arrival(0.0, 5, 6), Arrival(4.0, 7, 8)), 10.0)
    twice = one.repeated(2)
    assert [a.at_s for a in twice.arrivals] == [0.0, 4.0, 10.0, 14.0]
    assert (twice.seconds, twice.rate, twice.told) == (20.0, one.rate, ("2 times, one after another",))
    assert one.repeated(1) is one


def test_a_study_of_several_passes_lasts_as_long_and_another_seed_keeps_other_requests(traces: Path) -> None:
    thin = replace(SMALL, sources=(replace(SMALL.sources[0], rate=0.5),))
    first, second = (thin.traces(traces, seed)[""] for seed in (0, 1))
    assert first.seconds == 2 * 60
    assert 30 < len(first.arrivals) < 90
    assert [a.prompt for a in first.arrivals] != [a.prompt for a in second.arrivals]


def test_the_fleet_file_of_a_study_says_the_lengths_of_its_requests(traces: Path) -> None:
    made = fleet(service())
    requests = SMALL.requests(made, traces, 0)
    kind = SMALL.fleet_with(made, requests).services[0].classes[0]
    assert kind.prompt == round(sum(one.prompt for one in requests) / len(requests))
    assert kind.ttft_s == made.services[0].classes[0].ttft_s


def test_every_study_names_services_of_its_fleet() -> None:
    for study in STUDIES:
        made = bench.read_fleet(bench.RECIPES / f"{study.fleet}.yaml", tuple(POLICIES))
        named = {one.service for one in study.sources} - {""}
        assert named <= {one.name for one in made.services}


def test_a_run_is_kept_once_and_an_interrupted_line_is_run_again(traces: Path, tmp_path: Path) -> None:
    made = fleet(service(), nodes=(node("fast", 4, 2),))
    kept = tmp_path / "small.jsonl"
    first = bench.Bench(SMALL, made, (profile(),), Pieces(kept))
    first.run(traces, 0, ["static-peak", "adaptive"])
    first.run(traces, 0, ["static-peak", "adaptive"])
    whole = kept.read_text()
    assert whole.count("\n") == 2
    kept.write_text(whole[:-30])
    again = bench.Bench(SMALL, made, (profile(),), Pieces(kept))
    assert (again.pieces.has("static-peak", 0), again.pieces.has("adaptive", 0)) == (True, False)
    again.run(traces, 0, ["static-peak", "adaptive"])
    assert Pieces(kept).outcomes == again.pieces.outcomes
    told = bench.text(again.simulated(traces, list(POLICIES)))
    assert "static-peak" in told and "adaptive against" in told


def test_a_line_that_is_no_outcome_is_refused_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "small.jsonl").write_text('{"policy": "adaptive"}\n')
    with pytest.raises(InputError, match=r"small\.jsonl:1: no outcome"):
        Pieces(tmp_path / "small.jsonl")


def test_ours_is_held_against_the_static_plan_the_best_in_use_and_the_oracle_seed_by_seed() -> None:
    names = {"static-peak": 2.0, "reactive": 1.6, "adaptive": 1.0, "oracle": 0.8}
    made = saved(*(outcome(name, j * (1 + seed), 1000, seed) for name, j in names.items() for seed in range(3)))
    found = {one.other: one.less for one in against(made)}
    assert found == {
        "static-peak": pytest.approx(0.5),
        "reactive": pytest.approx(0.375),
        "oracle": pytest.approx(-0.25),
    }
    assert all(one.low == pytest.approx(one.high) for one in against(made))


def test_a_table_has_the_seeds_of_all_its_policies() -> None:
    some = [outcome("static-peak", 2.0, 1000, seed) for seed in range(3)] + [outcome("adaptive", 1.0, 1000, 1)]
    assert [(one.policy, one.seed) for one in with_all(some)] == [("static-peak", 1), ("adaptive", 1)]
    assert "1 seeds" in bench.text(saved(*some))


def test_every_part_that_is_left_out_has_a_name_and_no_policy_has_it() -> None:
    assert set(fleet_ablation.PARTS.values()) == {field.name for field in fields(Parts)}
    assert not set(fleet_ablation.ABLATIONS) & set(POLICIES)
    assert fleet_ablation.named("adaptive") is POLICIES["adaptive"]
    with pytest.raises(InputError, match="no policy"):
        fleet_ablation.named("without sense")
