"""Scales of groups as they are stored."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmbuild.spec.formats import INTEGERS
from llmbuild.spec.formats import bits as formats_bits
from llmbuild.transform.quantized import dequantize, pad_columns, quantize, split_groups
from llmbuild.transform.scales import in_bytes, stored
from llmbuild.transform.weights import from_bf16, to_bf16


@st.composite
def scales(draw: st.DrawFn) -> np.ndarray:
    """Return scales f32[N,G] of either sign, some of them 0, over the whole range of f32."""
    drawn = np.random.default_rng(draw(st.integers(0, 999)))
    size = draw(st.integers(1, 5)), draw(st.integers(1, 20))
    found = np.ldexp(drawn.standard_normal(size), drawn.integers(-9, 2, size)) * draw(
        st.sampled_from((2.0**-149, 2.0**-124, 1e-30, 0.01, 1.0, 2.0**120))
    )
    return np.where(drawn.random(size) < draw(st.sampled_from((0.0, 0.3, 1.0))), 0, found).astype(np.float32)


@given(scales())
def test_bytes_and_powers_are_found_again_in_the_scales_that_they_make(scale: np.ndarray) -> None:
    codes, power = in_bytes(scale)
    made = codes * power[:, None]
    assert (codes != 0).all() and np.abs(codes.astype(int)).max() <= 127
    assert (np.frexp(power)[0] == 0.5).all()
    some = scale.any(axis=1)  # a row of nothing has any power
    again, same = in_bytes(made)
    assert np.array_equal(again[some], codes[some]) and np.array_equal(same[some], power[some])
    assert np.array_equal(from_bf16(to_bf16(made)), made)


@given(scales())
def test_a_scale_is_off_by_half_of_a_64th_of_the_largest_of_its_row_unless_it_is_next_to_none(
    scale: np.ndarray,
) -> None:
    codes, power = in_bytes(scale)
    largest = np.abs(scale).max(axis=1, keepdims=True).astype(np.float64)
    error = np.abs(codes * power[:, None].astype(np.float64) - scale)
    normal = largest >= 2.0**-119  # powers of less would leave the normal numbers of f32
    little = np.abs(scale) < power[:, None] / 2
    assert (error <= largest * np.where(little, 2.0**-6, 2.0**-7))[np.broadcast_to(normal, scale.shape)].all()
    assert (np.signbit(codes) == np.signbit(scale)).all()


@pytest.mark.parametrize("bits", [2, 4, 7])
def test_groups_of_zeros_do_not_decide_on_the_scales_of_their_row(bits: int) -> None:
    form, dense = INTEGERS[f"int{bits}_g32s8"], np.random.default_rng(bits).standard_normal((5, 96)).astype(np.float32)
    empty = dense * np.float32(1e-4)
    empty[:, 32:64] = 0
    quantized = quantize(empty, form)
    assert not dequantize(quantized)[:, 32:64].any()
    assert np.abs(quantized.scale).max() < 1e-3
    rest = np.delete(dequantize(quantized), np.s_[32:64], axis=1) / np.float32(1e-4)
    alone = dequantize(quantize(np.delete(dense, np.s_[32:64], axis=1), form))
    assert np.square(rest - alone).mean() < 1e-3 * np.square(alone).mean()


def test_a_matrix_has_bytes_for_its_groups_and_one_number_for_each_row() -> None:
    quantized = quantize(np.ones((64, 256), np.float32), INTEGERS["int6_g32s8"])
    assert quantized.bits_per_weight == formats_bits("int6_g32s8") + 32 / 256 == 6.375
    assert quantize(np.ones((64, 33), np.float32), INTEGERS["int6_g32s8"]).bits_per_weight == 6 + 32 / 33


def test_columns_that_are_added_and_groups_that_are_split_keep_to_bytes() -> None:
    dense = np.random.default_rng(0).standard_normal((3, 96)).astype(np.float32) * np.float32(1e-3)
    padded = pad_columns(quantize(dense, INTEGERS["int5_g32s8"]), 160)
    whole = quantize(dense[:, :60], INTEGERS["int5_g32s8"])
    split = split_groups(pad_columns(whole, 64), 32)
    assert split is not None and whole.group == 60
    for found in (padded, split):
        assert np.array_equal(stored(found.scale, "i8"), found.scale)
    assert np.array_equal(dequantize(padded)[:, :96], dequantize(quantize(dense, INTEGERS["int5_g32s8"])))
