"""Quantization and layouts of weight matrices."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbuild.kernels.layouts import FORMATS, Codes, Layout
from llmbuild.spec.formats import INTEGERS
from llmbuild.transform import weights
from llmbuild.transform.panels import pack, pack_codes, unpack
from llmbuild.transform.quantized import dequantize, quantize
from llmbuild.transform.reference import quantized_rows

SIZES = st.tuples(st.integers(1, 150), st.integers(1, 20).map(lambda quads: 4 * quads))


def matrix(size: tuple[int, int]) -> weights.Array:
    return np.random.default_rng(size[0]).standard_normal(size).astype(np.float32)


@settings(max_examples=30)
@given(SIZES)
def test_quantized_rows_are_within_half_a_step(size: tuple[int, int]) -> None:
    dense = matrix(size)
    quantized, scale = weights.quantize_rows(dense)
    assert np.abs(quantized * scale[:, None] - dense).max() <= scale.max() * 0.5001
    assert np.abs(quantized).max(axis=1).tolist() == [127] * size[0]


def test_row_of_zeros_stays_zero_with_a_scale_of_one() -> None:
    quantized, scale = weights.quantize_rows(np.zeros((2, 4), np.float32))
    assert not quantized.any()
    assert scale.tolist() == [1.0, 1.0]


@settings(max_examples=30)
@given(SIZES)
def test_panels_hold_every_row_once(size: tuple[int, int]) -> None:
    dense = matrix(size)
    packed = weights.pack_panels(dense)
    rows = packed.transpose(0, 2, 1).reshape(-1, size[1])
    assert np.array_equal(rows[: size[0]], dense)
    assert not rows[size[0] :].any()


def test_interleaved_panel_has_a_gate_row_and_its_up_row_in_one_lane() -> None:
    gate, up = np.arange(40)[:, None], 1000 + np.arange(40)[:, None]
    mixed = weights.interleave(gate, up)[:, 0]
    assert mixed.shape == (128,)
    assert mixed[:32].tolist() == list(range(32))
    assert mixed[32:64].tolist() == list(range(1000, 1032))
    assert mixed[64:72].tolist() == list(range(32, 40))


@pytest.mark.parametrize("value", [0.0, 1e-20, 1.0, 1e20])
def test_activations_of_any_size_are_quantized(value: float) -> None:
    integers, scale = quantized_rows(np.full((1, 16), value, np.float32))
    assert np.allclose(integers * scale, value, rtol=1e-6)


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_of_any_length_fill_their_bytes_and_no_two_share_a_bit(bits: int) -> None:
    codes = Codes(bits)
    pieces = [piece for quad in range(codes.quads) for piece in codes.pieces(quad)]
    held = [(piece.byte, piece.start + i) for piece in pieces for i in range(piece.count)]
    assert sorted(held) == [(byte, bit) for byte in range(codes.bytes_) for bit in range(8)]
    for quad in range(codes.quads):
        said = [piece.place + i for piece in codes.pieces(quad) for i in range(piece.count)]
        assert sorted(said) == list(range(bits))


def test_panels_of_codes_lie_as_their_layout_says() -> None:
    codes = np.arange(-32, 32).astype(np.int8)[None].repeat(64, 0)
    codes[5] = codes[5, ::-1]
    bytes_ = pack_codes(Layout("int6_g32", 64), codes).reshape(4, 3, 64, 4).astype(int)
    for row, column in ((0, 0), (5, 3), (63, 7), (5, 10), (17, 27), (5, 40), (1, 59)):
        assert bytes_[column // 16, column % 16 // 4, row, column % 4] & 63 == codes[row, column] + 32
    for row, column in ((0, 12), (5, 31), (63, 63)):  # two bits above each of three others
        spare = bytes_[column // 16, :, row, column % 4] >> 6
        assert spare @ [1, 4, 16] == codes[row, column] + 32


@pytest.mark.parametrize("columns", [32, 64, 96, 576])
@pytest.mark.parametrize("form", [form for form in FORMATS if form in INTEGERS])
def test_packing_keeps_every_code(form: str, columns: int) -> None:
    quantized = quantize(
        np.random.default_rng(columns).standard_normal((100, columns)).astype(np.float32), INTEGERS[form]
    )
    layout = Layout(form, columns)
    data, scale = pack(layout, quantized)
    assert data.nbytes == 2 * layout.panel_bytes
    values, factor = unpack(layout, data.view(np.uint8), scale.view(np.uint8))
    np.testing.assert_allclose((values * factor[:, None])[:100], dequantize(quantized), rtol=1e-6)
    assert (values[100:] == 0).all()
