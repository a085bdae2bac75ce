"""Estimates: what an observation does to them, that they follow a machine's figures, and where they stand for what."""

from __future__ import annotations

import csv
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from llmbuild.errors import InputError
from llmbuild.fleet.estimate import offsets
from llmbuild.fleet.estimate.estimator import Estimator, learned, shipped
from llmbuild.fleet.estimate.figures import Observation, Point, machines, models, observations
from llmbuild.fleet.plan.load import stated
from llmbuild.fleet.plan.plan import plan
from llmbuild.fleet.profiles.gather import profiles_of
from llmbuild.report.fleet import plan_json
from llmbuild.spec.files.fleet import read_fleet
from llmbuild.spec.fleet import Fleet, Line, Profile, StepTime
from tests.support.fleets import fleet, node, service

NEW = "L4-24GB"


def step(device: str = NEW, model: str = "llama-3-8b", rows: float = 16.0, precision: str = "fp16") -> Point:
    return Point(machines()[device], models()[model], precision, "vllm", "batch", 1, rows, rows * 512, 0.0)


def seconds(of: Estimator, at: Point) -> float:
    return float(np.exp(of.together([at]).logs[0]))


def on(*devices: str, estimates: bool = True, profiles: tuple[Profile, ...] = ()) -> Fleet:
    nodes = tuple(replace(node(device, 8), memory_bytes=80e9) for device in devices)
    made = fleet(service("chat", 2.0, "llama-3-8b", ttft_s=5.0, tpot_s=0.5), nodes=nodes)
    return replace(made, estimates=estimates, profiles=profiles)


@cache
def without(device: str) -> Estimator:
    return learned([one for one in observations() if one.point.machine.name != device])


def error(device: str, seen: int) -> float:
    """Return the median error on rows of a machine of which nothing else was known; some of them are seen."""
    rows = [one for one in observations() if one.point.machine.name == device]
    logs = np.log([one.seconds for one in rows])
    which = np.linspace(0, len(rows) - 1, seen).astype(np.int64)
    left = np.setdiff1d(np.arange(len(rows)), np.linspace(0, len(rows) - 1, 10).astype(np.int64))
    found = without(device).together([one.point for one in rows]).given(which, logs[which])
    return float(np.exp(np.median(np.abs(found.logs - logs)[left])) - 1)


@pytest.mark.parametrize("times", [0.5, 1.7, 4.0])
def test_a_step_that_was_observed_takes_what_was_observed(times: float) -> None:
    took = times * seconds(shipped("seconds"), step())
    exact = shipped("seconds").refined([Observation(step(), took)], noise=1e-7)
    assert seconds(exact, step()) == pytest.approx(took, rel=1e-3)
    noisy = shipped("seconds").refined([Observation(step(), took)])
    assert abs(np.log(seconds(noisy, step()) / took)) < 3 * shipped("seconds").variances[-1] ** 0.5


def test_an_observation_moves_what_shares_something_with_it_and_nothing_else() -> None:
    before = shipped("seconds")
    after = before.refined([Observation(step(), 2 * seconds(before, step()))])
    moved = [
        seconds(after, at) / seconds(before, at)
        for at in (step(), step(rows=32), step(model="qwen3-14b"), step("MI300X-192GB", "gpt-oss-120b", 16, "mxfp4"))
    ]
    assert moved == sorted(moved, reverse=True)
    assert moved[2] > 1.2
    assert moved[3] == pytest.approx(1, abs=0.1)


def test_an_observation_that_joins_what_is_known_says_the_same_as_one_given_later() -> None:
    points = [step(), step(rows=1), step(model="qwen3-32b", precision="fp8")]
    seen = [Observation(step(), 0.2), Observation(step(rows=1), 0.03)]
    joined = shipped("seconds").refined(seen).together(points)
    given = shipped("seconds").together(points).given(np.array([0, 1]), np.log([0.2, 0.03]))
    assert joined.logs == pytest.approx(given.logs, abs=1e-6)
    assert joined.deviations == pytest.approx(given.deviations, abs=1e-6)


def test_a_machine_with_more_bandwidth_or_faster_products_is_never_slower() -> None:
    rng = np.random.default_rng(0)
    points = []
    for _ in range(40):
        machine = machines()[str(rng.choice(list(machines())))]
        model, rows = models()[str(rng.choice(list(models())))], float(rng.integers(0, 65))
        at = Point(machine, model, "fp8", "vllm", "batch", 1, rows, rows * 700, float(rng.integers(1, 2000)))
        wide = replace(machine, bandwidth=machine.bandwidth * 1.3)
        quick = replace(machine, fp16=machine.fp16 * 1.3, fp8=machine.fp8 * 1.3)
        points += [at, replace(at, machine=wide), replace(at, machine=quick)]
    slow, wide_s, quick_s = shipped("seconds").together(points).logs.reshape(-1, 3).T
    assert (wide_s < slow).all()
    assert (quick_s < slow).all()


@pytest.mark.parametrize(("device", "first", "last"), [("A100-SXM-40GB", 0.3, 0.12), ("MI300X-192GB", 3.0, 0.5)])
def test_observations_of_a_machine_that_was_held_out_make_its_estimates_better(
    device: str, first: float, last: float
) -> None:
    errors = [error(device, seen) for seen in (0, 3, 10)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < first
    assert errors[-1] < last


def test_estimates_stand_only_where_there_is_nothing_else_and_say_so(tmp_path: Path) -> None:
    asked = on(NEW, "H100-SXM-80GB")
    plain = profiles_of(replace(asked, estimates=False), tmp_path)
    found = profiles_of(asked, tmp_path)
    assert [p for p in found if p.device == "H100-SXM-80GB"] == list(plain)
    made = [p for p in found if p.device == NEW]
    assert [p.variant for p in made] == ["fp16", "fp8"]
    for each in made:
        assert (each.told, each.estimate) == ("estimated", True)
        assert each.error > 0.1
        assert "0 of llama-3-8b on L4-24GB" in each.source
        assert list(each.step.rows_s.values) == sorted(each.step.rows_s.values)
    assert not any(p.estimate for p in plain)


def test_watts_that_are_estimated_are_below_the_limit_of_the_board(tmp_path: Path) -> None:
    for each in profiles_of(on(NEW, "H200-SXM-141GB", "A30-24GB"), tmp_path):
        assert each.power is not None
        board = machines()[each.device].board_w
        assert 0.2 * board < each.power.rows_w(1) < each.power.rows_w(64) < 1.1 * board
        assert each.power.rows_w(64) < each.power.prompt_w < 1.1 * board


def test_a_profile_of_the_file_refines_the_estimates_of_other_models_on_its_device(tmp_path: Path) -> None:
    plain = profiles_of(on(NEW), tmp_path)[0]
    slow = replace(
        plain,
        model="qwen3-8b",
        step=StepTime(Line((1.0, 16.0), (0.2, 0.25)), 0.0, plain.step.prompt_s),
        decode_basis="measured",
        estimate=False,
    )
    refined = profiles_of(on(NEW, profiles=(slow,)), tmp_path)[0]
    assert refined.step.rows_s(16) > 1.5 * plain.step.rows_s(16)
    assert refined.source.endswith("refined by qwen3-8b on L4-24GB of the fleet file")
    again = profiles_of(on(NEW, profiles=(replace(slow, decode_basis="estimated"),)), tmp_path)[0]
    assert again.step == plain.step


def test_a_model_is_estimated_in_the_precision_that_it_comes_in(tmp_path: Path) -> None:
    asked = on("H200-SXM-141GB")
    asked = replace(asked, services=(replace(asked.services[0], model="gpt-oss-120b"),))
    assert [p.variant for p in profiles_of(asked, tmp_path)] == ["mxfp4"]


def test_a_plan_says_that_it_stands_on_an_estimate(tmp_path: Path) -> None:
    asked = on(NEW)
    found = plan(asked, profiles_of(asked, tmp_path), stated(asked))
    told = plan_json(found)
    assert found.feasible
    assert "by an estimate: nine of ten are within a factor of" in found.assignments[0].why
    assert told["basis"] == "estimated"
    (one,) = told["assignments"]  # type: ignore[misc, attr-defined]
    assert one["fit_error"] is None
    assert one["expected_error"] > 0.1


def test_what_has_no_figures_is_refused_with_those_that_have(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"device X .*there are A10-24GB.*`figures`"):
        profiles_of(on("X"), tmp_path)
    strange = on(NEW)
    strange = replace(strange, services=(replace(strange.services[0], model="m"),))
    with pytest.raises(InputError, match=r"model m .*there are bloom-176b.*`figures`"):
        profiles_of(strange, tmp_path)
    with pytest.raises(InputError, match=r"or set `estimates: true`"):
        profiles_of(on(NEW, estimates=False), tmp_path)


FIGURES = """
estimates: true
figures:
  devices: [{device: own, bandwidth: 600GB, fp16_tflops: 121, fp8_tflops: 242, memory: 24GB, board_w: 72, source: mine}]
  models: [{model: small, parameters: 4.0e9, layers: 36, kv_per_token: 147kB, source: mine}]
nodes: [{class: a, device: own, count: 1, memory: 24GB, watts: {bare: 1, parked: 2, basis: estimated, source: mine}}]
services: [{model: small, rate: 1, classes: [{name: c, prompt: 100, output: 100, slo: [tpot_s<=0.2]}]}]
"""


def test_figures_of_the_file_lead_to_estimates_of_what_nobody_knows(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(FIGURES)
    asked = read_fleet(path, ("adaptive",))
    slow = replace(asked, machines=(replace(asked.machines[0], bandwidth=300e9),))
    wide, narrow = profiles_of(asked, tmp_path), profiles_of(slow, tmp_path)
    assert [(p.device, p.model, p.variant, p.told) for p in wide] == [
        ("own", "small", "fp16", "estimated"),
        ("own", "small", "fp8", "estimated"),
    ]
    assert wide[0].step.rows_s(1) < narrow[0].step.rows_s(1)
    assert wide[0].weights_bytes == 8e9
    path.write_text(FIGURES.replace("layers: 36", "layers: 36, active: 1.0e9"))
    with pytest.raises(InputError, match="active and expert_share belong together"):
        read_fleet(path, ("adaptive",))


def test_a_step_reads_the_experts_that_its_tokens_choose() -> None:
    model = models()["gpt-oss-120b"]
    assert model.read(1) == pytest.approx(model.active)
    assert model.read(1e4) == pytest.approx(model.parameters)
    assert models()["llama-3-8b"].read(64) == models()["llama-3-8b"].parameters


def test_every_batch_names_its_source_and_fits_its_devices() -> None:
    assert len(observations()) > 1000
    for one in observations():
        assert one.source
        assert one.seconds > 0
        width = 0.5 if one.point.precision == "mxfp4" else 1.0
        assert one.point.model.parameters * width < one.point.machine.memory_bytes * one.point.devices


def test_rows_that_profiles_and_estimates_share_say_the_same() -> None:
    def cells(package: str, name: str) -> dict[str, dict[str, str]]:
        with (files(package) / name).open(encoding="utf-8") as file:
            return {row["row"]: row for row in csv.DictReader(file)}

    ours = cells("llmbuild.fleet.profiles", "published.csv")
    theirs = cells("llmbuild.fleet.estimate", "batches.csv")
    shared = ours.keys() & theirs.keys()
    assert len(shared) > 40
    for number in shared:
        one, other = ours[number], theirs[number]
        assert one["gpu"] == other["device"]
        assert (float(one["batch"] or 0), one["precision"]) == (float(other["batch"]), other["precision"])
        if one["latency_ms"]:
            assert float(one["latency_ms"]) / 1e3 == pytest.approx(float(other["seconds"]), rel=1e-3)


def test_a_covariance_is_the_sum_of_its_parts_by_their_variances() -> None:
    points = [one.point for one in observations()[::150]]
    drawn = np.random.default_rng(0)
    known = offsets.traits(points, drawn.dirichlet(np.ones(4), len(points)))
    variances = tuple(drawn.uniform(0.01, 0.1, len(offsets.START)))
    whole = np.tensordot(variances[:-1], offsets.parts(known, known), 1)
    np.testing.assert_allclose(offsets.covariance(variances, known, known), whole, rtol=1e-12)
