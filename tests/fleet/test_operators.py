"""Operators of a model as things to be placed: profiles, cells, plans."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbuild.errors import InputError
from llmbuild.fleet.capacity import MEMORY_SHARE
from llmbuild.fleet.estimate.figures import machines
from llmbuild.fleet.operators.cell import ETHERNET, FREE, NETWORK, NVLINK, Cell, Link, Phase, asked
from llmbuild.fleet.operators.placement import Level, Placement, placements, whole
from llmbuild.fleet.operators.plan import LAYERS, MODELS, OPERATORS, REPLICAS, Table, table
from llmbuild.fleet.operators.profile import DENSE, LAYER, OperatorProfile, Shape
from llmbuild.fleet.operators.published import SHAPES, published, shape
from llmbuild.fleet.operators.roofline import roofline
from llmbuild.spec.decoder import Decoder
from llmbuild.spec.fleet import NodeClass, RequestClass

H100 = "H100-SXM-80GB"
NODE = NodeClass(H100, 200, H100, False, 1, 80e9, 75.0, 75.0, 113.0, 0.0, 410.0, "estimated")
CHAT = RequestClass("chat", 1.0, 1155, 211, 1.0, ttft_s=2.0, tpot_s=0.1)
PHASES: tuple[Phase, ...] = ("both", "prompt", "decode")
TINY = Shape("tiny", Decoder(1024, 4096, 8, 2, 128, 32000), 4)


def of(model: str, devices: int = 1) -> OperatorProfile:
    """Return a published profile on H100."""
    return published()[H100, model, devices]


@cache
def choices(model: str, link: Link = NVLINK[H100], most: int = 2) -> Table:
    """Return the choices of a model for chats."""
    mine = tuple(p for (device, name, _), p in published().items() if (device, name) == (H100, model))
    return table(mine, NODE, link, ((CHAT, 1.0),), most=most)


def summed(profile: OperatorProfile, rows: float, context: float) -> float:
    """Return the seconds of a step as the sum of all its calls."""
    layer = sum(profile.seconds(kind, rows, context) for kind in LAYER)
    return profile.shape.layers * layer + profile.seconds("head", rows, context)


@pytest.mark.parametrize(("rows", "step_s"), [(1, 7.9e-3), (16, 10.8e-3), (64, 18.4e-3)])
def test_the_sum_of_published_operators_is_below_a_published_step(rows: int, step_s: float) -> None:
    # Llama-3-8B, static batches of 1024 and 1024 tokens, vLLM on H100 (Argonne): an engine spends time between calls
    assert 0.6 * step_s < summed(of("llama-3-8b"), rows, 1536) < step_s


@pytest.mark.parametrize(("device", "model", "devices"), list(published()))
def test_a_roofline_is_within_a_third_of_what_was_published(device: str, model: str, devices: int) -> None:
    profile = published()[device, model, devices]
    estimate = roofline(profile.shape, machines()[device])
    for rows in (64, 256):
        ratio = summed(estimate, rows, 1024) / summed(profile, rows, 1024)
        assert 0.7 < ratio < 1.35


def test_a_profile_says_where_its_figures_come_from() -> None:
    assert of("llama-3-8b").told == "published, norms and activations estimated"
    assert of("llama-3-8b").whole == "estimated"
    assert roofline(TINY, machines()[H100]).told == "estimated"
    with pytest.raises(InputError, match="no sizes of model"):
        shape("unheard-of")


@pytest.mark.parametrize(("model", "billions"), [("llama-3-8b", 8.03), ("qwen3-14b", 14.77), ("qwen3-32b", 32.76)])
def test_the_weights_of_all_kinds_are_the_model(model: str, billions: float) -> None:
    assert sum(SHAPES[model].parameters(kind) for kind in DENSE) / 1e9 == pytest.approx(billions, rel=0.005)


def test_calls_never_get_shorter_with_more_rows() -> None:
    for profile in published().values():
        for kind in LAYER:
            times = [profile.seconds(kind, rows, 1024) for rows in (1, 8, 32, 128, 256, 512)]
            assert all(a <= b * (1 + 1e-9) for a, b in pairwise(times))


@given(st.sampled_from(sorted(SHAPES)), st.floats(1, 512), st.floats(16, 8192))
@settings(max_examples=30)
def test_a_whole_model_on_one_device_takes_the_sum_of_its_operators(model: str, rows: float, context: float) -> None:
    profile = of(model)
    assert Cell(profile, whole(profile.shape), ETHERNET).step_s(rows, context) == pytest.approx(
        summed(profile, rows, context)
    )


@given(st.floats(1, 512), st.floats(16, 8192), st.sampled_from(PHASES))
@settings(max_examples=30)
def test_operators_that_share_one_device_are_a_whole_model(rows: float, context: float, phase: Phase) -> None:
    profile = of("qwen3-14b")
    owners = whole(profile.shape).owners
    apart = Cell(profile, Placement("operators", "all on one", 1, owners, (1.0,)), FREE)
    model = Cell(profile, whole(profile.shape), FREE)
    assert apart.step_s(rows, context, phase) == pytest.approx(model.step_s(rows, context, phase))
    assert apart.prompt_s(context, phase) == pytest.approx(model.prompt_s(context, phase))
    assert asked(apart, NODE, CHAT, phase).point.batch == asked(model, NODE, CHAT, phase).point.batch


@pytest.mark.parametrize("devices", [1, 2, 3, 5])
def test_every_placement_holds_the_model_once(devices: int) -> None:
    model = SHAPES["qwen3-14b"]
    for place in placements(model, devices) if devices > 1 else [whole(model)]:
        calls = [sum(each.get(kind, 0) for each in place.visits) for kind in ("qkv", "out", "mlp", "head")]
        held = sum(place.weights(model, device) for device in range(devices))
        assert calls == [model.layers] * 3 + [1]
        assert held == pytest.approx(sum(model.weights(kind) for kind in DENSE))
        assert sum(place.share(device) for device in range(devices)) == pytest.approx(1)
        assert sum(count for _, count in place.alike) == devices
        hops, sent = place.sent(model)
        assert (hops > 0) == (sent > 0) == (devices > 1)


def test_a_slower_link_never_makes_a_step_shorter() -> None:
    profile = of("qwen3-14b")
    for place in placements(profile.shape, 3):
        times = [Cell(profile, place, link).step_s(192, 1200) for link in (FREE, NVLINK[H100], NETWORK, ETHERNET)]
        assert times == sorted(times)


def test_weights_held_once_leave_room_for_more_positions() -> None:
    model, room = SHAPES["qwen3-32b"], 80e9 * MEMORY_SHARE
    alone = whole(model).kv_tokens(model, room)
    apart = max(place.kv_tokens(model, room) for place in placements(model, 2))
    assert apart > 5 * 2 * alone
    assert whole(model).kv_tokens(model, 60e9) == 0


def test_devices_that_share_matrices_sum_over_the_link() -> None:
    near, far = (Cell(of("qwen3-32b", 2), whole(shape("qwen3-32b", 2)), link) for link in (FREE, ETHERNET))
    sums = 2 * 64 * (ETHERNET.latency_s + 64 * 2 * 5120 / ETHERNET.bandwidth)  # 2 (n - 1) / n rows of 16 bits
    assert far.step_s(64, 1000) - near.step_s(64, 1000) == pytest.approx(sums, rel=0.01)


@given(st.sampled_from(["llama-3-8b", "qwen3-32b"]), st.floats(0.1, 60))
@settings(max_examples=30)
def test_a_plan_with_more_to_choose_from_never_takes_more_devices(model: str, rate: float) -> None:
    plans = [choices(model).plan(rate, levels) for levels in (REPLICAS, MODELS, LAYERS, OPERATORS)]
    devices = [each.devices for each in plans]
    assert all(each.feasible for each in plans)
    assert devices == sorted(devices, reverse=True)


@given(st.sampled_from(["llama-3-8b", "qwen3-32b"]), st.floats(0.1, 30), st.sampled_from([REPLICAS, OPERATORS]))
@settings(max_examples=40)
def test_twice_the_load_never_takes_fewer_devices(model: str, rate: float, levels: tuple[Level, ...]) -> None:
    one, two = (choices(model).plan(each, levels) for each in (rate, 2 * rate))
    assert one.devices <= two.devices <= 2 * one.devices
    assert one.watts_at(rate / 2) <= one.watts


def test_a_plan_takes_its_rate_in_each_phase() -> None:
    for rate in (1.0, 7.0, 40.0):
        plan = choices("qwen3-32b").plan(rate)
        for phase in {choice.phase for choice, _ in plan.cells}:
            assert sum(c.takes.rate * count for c, count in plan.cells if c.phase == phase) >= rate
        assert plan.devices == sum(choice.devices * count for choice, count in plan.cells)


def test_a_model_that_leaves_little_memory_takes_fewer_devices_apart() -> None:
    plans = [choices("qwen3-32b").plan(20.0, levels) for levels in (REPLICAS, (*REPLICAS, "operators"))]
    assert plans[1].devices < 0.7 * plans[0].devices


def test_a_load_that_no_cell_takes_has_no_plan() -> None:
    hurried = replace(CHAT, tpot_s=0.001)
    found = table((of("llama-3-8b"),), NODE, FREE, ((hurried, 1.0),), most=2).plan(1.0)
    few = replace(NODE, count=1)
    short = table((of("llama-3-8b"),), few, FREE, ((CHAT, 1.0),), most=2).plan(500.0)
    assert (found.feasible, found.cells, short.feasible) == (False, (), False)


def test_classes_share_a_cell_by_time() -> None:
    code = RequestClass("code", 1.0, 2048, 28, 1.6, ttft_s=2.0, tpot_s=0.2)
    profile = (of("llama-3-8b"),)
    alone = [table(profile, NODE, FREE, ((kind, 1.0),), most=1).choices[0].takes.rate for kind in (CHAT, code)]
    both = table(profile, NODE, FREE, ((CHAT, 0.5), (code, 0.5)), most=1).choices[0].takes.rate
    assert both == pytest.approx(2 / (1 / alone[0] + 1 / alone[1]))


def test_a_cell_draws_at_least_what_waiting_devices_do_and_at_most_their_limits() -> None:
    profile = of("qwen3-14b")
    for place in [whole(profile.shape), *placements(profile.shape, 3)]:
        cell = Cell(profile, place, NVLINK[H100])
        for rows in (1, 64, 512):
            assert cell.devices * 113 < cell.watts(rows, 1000, 113) < cell.devices * 700
