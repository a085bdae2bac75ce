"""Cells run call by call: what plans promise is held against it."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from llmbuild.fleet.estimate.figures import machines
from llmbuild.fleet.operators.cell import FREE, NVLINK, Cell
from llmbuild.fleet.operators.placement import Level, placements, whole
from llmbuild.fleet.operators.plan import MODELS, Table, table
from llmbuild.fleet.operators.profile import OperatorProfile, Shape
from llmbuild.fleet.operators.queues import Answered, Request, attained, run, simulate
from llmbuild.fleet.operators.roofline import roofline
from llmbuild.spec.decoder import Decoder
from llmbuild.spec.fleet import NodeClass, RequestClass

H100 = "H100-SXM-80GB"
WIDE = Shape("wide", Decoder(8192, 28672, 64, 8, 128, 128256), 4)
"""Few layers of a large model: as many calls as a test can pay for."""
SMALL = NodeClass(H100, 50, H100, False, 1, 14e9, 75.0, 75.0, 113.0, 0.0, 410.0, "estimated")
"""A device that the model nearly fills."""
KIND = RequestClass("chat", 1.0, 600, 60, 0.7, ttft_s=0.3, tpot_s=0.02)


def profile() -> OperatorProfile:
    """Return the estimated operators of the model."""
    return roofline(WIDE, machines()[H100])


def requests(rate: float, seconds: float, seed: int = 0) -> list[Request]:
    """Return Poisson arrivals with log-normal lengths."""
    rng = random.Random(seed)
    sigma = math.sqrt(math.log1p(KIND.spread**2))

    def length(mean: float) -> int:
        return max(1, round(rng.lognormvariate(math.log(mean) - sigma**2 / 2, sigma)))

    found, at = [], rng.expovariate(rate)
    while at < seconds:
        found.append(Request(at, length(KIND.prompt), length(KIND.output)))
        at += rng.expovariate(rate)
    return found


def choices(levels: tuple[Level, ...]) -> Table:
    """Return the choices whose cells have one of these levels."""
    found = table((profile(),), SMALL, NVLINK[H100], ((KIND, 1.0),), most=2)
    return replace(found, choices=tuple(each for each in found.choices if each.level in levels))


@pytest.mark.parametrize("batches", [1, 2, 3])
def test_a_step_of_the_model_of_queues_is_near_one_that_is_run(batches: int) -> None:
    room = replace(SMALL, memory_bytes=1e15)
    for place in [whole(WIDE), *placements(WIDE, 2)[::2], *placements(WIDE, 3)[1::4]]:
        count = batches if place.devices > 1 else 1
        cell = Cell(profile(), place, NVLINK[H100])
        answered = simulate(cell, [Request(0.0, 600, 31)] * (64 * count), "decode", room, count)
        ran = max(each.last_s for each in answered) / 30
        assert 0.7 < cell.cycle_s(64, 615, count) / ran < 1.4, place.name


def test_a_batch_that_is_alone_takes_exactly_the_sum_of_its_calls() -> None:
    cell = Cell(profile(), whole(WIDE), FREE)
    (answered,) = simulate(cell, [Request(0.0, 600, 2)], "decode", SMALL, 1)
    assert answered.last_s == pytest.approx(cell.cycle_s(1, 600, 1))


@pytest.mark.parametrize("levels", [("replica",), ("pipeline",), ("operators",)])
def test_plans_hold_their_slo_when_they_are_run(levels: tuple[Level, ...]) -> None:
    found = choices(levels)
    rate = 1.9 * max(each.takes.rate for each in found.choices if each.phase == "decode")
    plan = found.plan(min(rate, 60.0), levels)
    assert plan.feasible
    answered = run(plan, requests(plan.rate, 12.0), SMALL, KIND)
    assert attained(answered, KIND, after_s=1.0) >= 0.98


def test_every_request_is_answered_once() -> None:
    asked = requests(25.0, 4.0)
    for plan in (choices(MODELS).plan(25.0), choices(("operators",)).plan(25.0)):
        answered = run(plan, asked, SMALL, KIND)
        assert sorted(each.request for each in answered) == asked
        assert all(each.request.at_s < each.first_s <= each.last_s for each in answered)


def test_an_overloaded_cell_misses() -> None:
    found = choices(("operators",))
    plan = replace(found.plan(5.0, ("operators",)), rate=5.0)
    assert attained(run(plan, requests(400.0, 3.0), SMALL, KIND), KIND) < 0.5


def test_attainment_counts_both_times() -> None:
    in_time = Answered(Request(0.0, 10, 11), 0.1, 0.2)
    late, slow = in_time._replace(first_s=0.4, last_s=0.5), in_time._replace(last_s=0.9)
    assert attained([in_time, late, slow, in_time], KIND) == 0.5
    assert attained([], KIND) == 1.0
