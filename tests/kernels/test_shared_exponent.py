"""Weights of 12 bits that share the exponent of their row: what rounding costs, how they lie, and what products say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmbuild.kernels.choose import KNOWN
from llmbuild.kernels.instructions import Instructions
from llmbuild.kernels.layouts import LIFT, LINE, Layout
from llmbuild.spec.formats import SHARED
from llmbuild.transform.panels import encode, pack, unpack
from llmbuild.transform.shared_exponent import codes, nearest, pack_codes, unpack_codes, values
from llmbuild.transform.weights import from_bf16, to_bf16
from tests.support.machines import MACHINES
from tests.support.products import products_module


@st.composite
def matrices(draw: st.DrawFn) -> np.ndarray:
    drawn = np.random.default_rng(draw(st.integers(0, 999)))
    size = draw(st.sampled_from((1, 2, 65))), 16 * draw(st.integers(1, 9))
    spread, magnitude = draw(st.sampled_from((0, 1, 6, 12))), draw(st.sampled_from((1e-25, 1e-3, 1.0, 1e25)))
    dense = drawn.standard_normal(size) * np.exp(spread * drawn.standard_normal(size)) * magnitude
    dense = np.clip(dense, -3.3e38, 3.3e38).astype(np.float32)
    dense[drawn.random(size) < 0.1] = 0
    if draw(st.booleans()):
        dense[-1] = draw(st.sampled_from((0.0, 1e-40, 3.3e38)))
    return dense


@given(matrices())
def test_a_weight_is_off_by_a_small_part_of_itself_or_a_tiny_one_of_its_row(dense: np.ndarray) -> None:
    rounded, exact = nearest(dense).astype(np.float64), dense.astype(np.float64)
    largest = np.maximum(np.abs(exact), np.abs(rounded)).max(axis=1, keepdims=True)  # it may round up to another power
    bound = np.maximum(2.0**-8 * np.abs(exact), 2.0**-15 * (1 + 2.0**-8) * largest)  # to bf16 first: ties move
    assert (np.abs(rounded - exact) <= np.where(largest > 2.0**-100, bound, largest)).all()
    assert (rounded[exact == 0] == 0).all()


@given(matrices())
def test_rounding_again_changes_nothing_and_packing_keeps_every_weight(dense: np.ndarray) -> None:
    rounded, layout = encode(SHARED, dense), Layout(SHARED, dense.shape[1])
    assert np.array_equal(nearest(rounded), rounded)
    data, scale = pack(layout, rounded)
    assert data.nbytes == -(-len(dense) // 64) * layout.panel_bytes
    read, power = unpack(layout, data.view(np.uint8), scale.view(np.uint8))
    assert np.array_equal((read * power[:, None])[: len(dense)], rounded)
    assert (read[len(dense) :] == 0).all()


@given(matrices())
def test_bf16_has_every_weight_and_a_row_within_the_window_is_bf16s(dense: np.ndarray) -> None:
    rounded = nearest(dense)
    assert np.array_equal(from_bf16(to_bf16(rounded)), rounded)
    largest = np.abs(dense).max(axis=1, keepdims=True)
    inside = (np.abs(dense) >= 2.0**-13 * largest) & (largest > 2.0**-99)
    assert np.array_equal(rounded[inside], from_bf16(to_bf16(dense))[inside])


def test_every_code_comes_back() -> None:
    stored = np.arange(4096, dtype=np.uint16).reshape(2, 2048)
    for placed in (stored, np.random.default_rng(0).permutation(np.repeat(stored, 16)).reshape(2, -1)):
        assert np.array_equal(unpack_codes(pack_codes(placed)), placed)
    numbers = values(stored[stored >> 7 & 15 > 0])
    assert len(np.unique(np.abs(numbers))) == 15 * 128
    rows = np.concatenate([numbers.reshape(-1, 128), np.zeros((30, 16), np.float32)], axis=1)
    rows[:, -1] = 1  # the largest exponent there is, so that rows share it
    assert np.array_equal(values(codes(rows)), rows)


UNITS = [
    pytest.param(unit, id=unit.name, marks=pytest.mark.skipif(bool(MACHINES[unit.name].lacks), reason="not here"))
    for unit in KNOWN
    if SHARED in unit.kernels
]


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("together", [False, True], ids=["one row", "a tile of rows"])
def test_products_agree_with_float64_over_the_whole_range(tmp_path: Path, unit: Instructions, together: bool) -> None:
    kernel, drawn = unit.kernels[SHARED], np.random.default_rng(0)
    layout, rows = Layout(SHARED, 48, kernel.narrow), kernel.row_tile if together else 1
    drawn_with = ((0, 1.0), (8, 1e-20), (8, 1e20), (0, 0.0))
    (tmp_path / "products.mlir").write_text(products_module(unit, layout, rows, len(drawn_with)))
    artifact, calls, inputs = MACHINES[unit.name].compile(tmp_path / "products.mlir"), [], []
    for spread, magnitude in drawn_with:
        dense = drawn.standard_normal((64, 48)) * np.exp(spread * drawn.standard_normal((64, 48))) * magnitude
        data, power = pack(layout, encode(SHARED, dense.astype(np.float32)))
        x = (drawn.standard_normal((rows, 48)) * np.exp(drawn.standard_normal((rows, 48)))).astype(np.float32)
        x = from_bf16(to_bf16(x)) if kernel.narrow else x
        lifted = to_bf16(x * np.float32(LIFT)) if kernel.narrow else x * np.float32(LIFT)
        prepared = np.zeros((rows, layout.prepared_bytes), np.uint8)
        prepared[:, LINE : LINE + lifted[0].nbytes] = lifted.view(np.uint8)
        inputs += [data, prepared.reshape(-1).view(np.int8)]
        calls.append((x, unpack(layout, data.view(np.uint8), power.view(np.uint8))[0].astype(np.float64)))
    made, _ = MACHINES[unit.name].call(artifact, inputs, len(calls), "local-task")
    for (x, weights), sums in zip(calls, made, strict=True):
        expected, size = x.astype(np.float64) @ weights.T, np.abs(x).astype(np.float64) @ np.abs(weights).T
        assert (np.abs(sums.reshape(rows, 64) - expected) <= 48 * 2.0**-24 * size).all()
