from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmbuild.spec.formats import INTEGERS, Format
from llmbuild.spec.formats import bits as formats_bits
from llmbuild.transform.quantized import (
    Quantized,
    by_group,
    closest_range,
    code_range,
    dequantize,
    fit_group,
    nearest,
    pack_nibbles,
    quantize,
    round_up_to_bf16,
    stack,
    unpack_nibbles,
)
from llmbuild.transform.weights import quantize_rows

plain_formats = st.builds(Format, st.integers(2, 8), st.sampled_from((0, 32, 64, 128)), st.booleans())
formats = plain_formats | st.builds(Format, st.integers(2, 7), st.just(32), scale=st.just("i8"))
sizes = st.tuples(st.sampled_from((1, 2, 7, 64, 65)), st.sampled_from((1, 2, 8, 31, 32, 96, 100, 128, 192, 256)))
magnitudes = st.sampled_from((1e-30, 1e-6, 0.02, 1.0, 1e30))


@st.composite
def matrices(draw: st.DrawFn) -> np.ndarray:
    drawn = np.random.default_rng(draw(st.integers(0, 99)))
    dense = (drawn.standard_normal(draw(sizes)) * draw(magnitudes)).astype(np.float32)
    match draw(st.sampled_from(("plain", "zero row", "outlier", "positive"))):
        case "zero row":
            dense[0] = 0
        case "outlier":
            dense[-1, -1] *= 1000
        case "positive":
            dense = np.abs(dense)
    return dense


def spread(quantized: Quantized) -> np.ndarray:
    return np.repeat(quantized.scale, quantized.group, axis=1)


@given(matrices(), formats)
def test_a_weight_is_off_by_half_a_scale_at_most_or_beyond_the_last_code(dense: np.ndarray, form: Format) -> None:
    quantized = quantize(dense, form)
    bottom, top = code_range(form.bits)
    assert bottom <= quantized.codes.min() and quantized.codes.max() <= top
    assert (quantized.scale != 0).all() and ((quantized.scale > 0).all() or form.has_sides)
    error = np.abs(dequantize(quantized).astype(np.float64) - dense)
    inner = (quantized.codes > bottom) & (quantized.codes < top) if form.has_sides else np.ones(dense.shape, bool)
    scale = np.abs(spread(quantized)).astype(np.float64)
    assert (error <= scale * (0.5 + 1e-5))[inner].all()


def reaching(parts: np.ndarray, form: Format) -> np.ndarray:
    """Return groups rounded with the least scale of one sign that reaches all weights of a group."""
    scale = np.maximum(parts.max(2) / form.highest, parts.min(2) / form.lowest)[..., None]
    scale = np.where(scale <= 2.0**-100, 1, scale)
    return np.rint(parts / scale) * scale


def weighed(parts: np.ndarray, made: np.ndarray) -> np.ndarray:
    """Return the squared error of groups where a weight counts by its square, all as parts of the largest one."""
    unit = np.maximum(np.abs(parts).max(2, keepdims=True), 2.0**-100)
    return np.square((made - parts) / unit * (parts / unit)).sum(2)


@given(matrices(), plain_formats.filter(lambda form: form.has_sides))
def test_groups_of_few_bits_have_less_error_than_with_a_scale_that_reaches_all(dense: np.ndarray, form: Format) -> None:
    group = fit_group(dense.shape[1], form.group or dense.shape[1])
    parts = by_group(dense, group).astype(np.float64)
    found = by_group(dequantize(quantize(dense, form)), group)
    step = 1.0 / form.highest
    assert (weighed(parts, found) <= 1.2 * weighed(parts, reaching(parts, form)) + 0.3 * step**2).all()


@pytest.mark.parametrize("name", ["int2_g32", "int3_g32", "int4_g64", "int4_g32s8", "int5_g32", "int6_g64"])
def test_the_lowest_code_and_least_squares_win_a_good_part_of_the_error(name: str) -> None:
    dense, form = np.random.default_rng(0).standard_normal((64, 768)).astype(np.float32), INTEGERS[name]
    parts = by_group(dense, form.group).astype(np.float64)
    found = by_group(dequantize(quantize(dense, form)), form.group)
    assert weighed(parts, found).sum() < 0.9 * weighed(parts, reaching(parts, form)).sum()


def test_columns_that_count_more_are_rounded_with_less_error() -> None:
    drawn, form = np.random.default_rng(1), INTEGERS["int4_g32"]
    dense, weight = drawn.standard_normal((40, 96)).astype(np.float32), np.ones(96, np.float32)
    weight[::3] = 30
    plain, counted = (dequantize(nearest(dense, closest_range(dense, form, w))) for w in (None, weight))
    errors = [np.square((found - dense) * dense).sum(0) for found in (plain, counted)]
    assert errors[1] @ weight < 0.9 * errors[0] @ weight
    assert errors[1].sum() > errors[0].sum()


@given(matrices(), formats)
def test_zeros_stay_zero(dense: np.ndarray, form: Format) -> None:
    assert (dequantize(quantize(dense, form))[dense == 0] == 0).all()


@given(st.integers(0, 99), plain_formats, st.sampled_from((1, 7, 65)), st.sampled_from((2, 31, 32, 100, 192)))
def test_representable_weights_are_exact(seed: int, form: Format, rows: int, columns: int) -> None:
    drawn = np.random.default_rng(seed)
    bottom, top = code_range(form.bits)
    if form.bits == 8 and form.symmetric:
        bottom = -top
    codes = drawn.integers(bottom, top + 1, (rows, columns))
    groups = by_group(codes, fit_group(columns, form.group or columns))
    groups[..., 0], groups[..., -1] = bottom, top  # the scale can be found where the whole range is used
    scale = round_up_to_bf16(drawn.uniform(1e-3, 1, (*groups.shape[:2], 1)))
    dense = (groups * scale).reshape(codes.shape).astype(np.float32)
    np.testing.assert_allclose(dequantize(quantize(dense, form)), dense, rtol=1e-6)


def test_rows_of_8_bits_are_those_of_the_kernels() -> None:
    dense = np.random.default_rng(0).standard_normal((65, 100)).astype(np.float32)
    codes, scale = quantize_rows(dense)
    quantized = quantize(dense, INTEGERS["int8"])
    assert np.array_equal(quantized.codes, codes)
    assert np.array_equal(quantized.scale[:, 0], scale)


@pytest.mark.parametrize(
    ("columns", "asked", "fitted"),
    [(256, 128, 128), (704, 128, 64), (576, 128, 64), (192, 128, 64), (100, 32, 100), (24, 32, 8), (7, 64, 7)],
)
def test_a_group_is_halved_until_it_divides_the_row(columns: int, asked: int, fitted: int) -> None:
    assert fit_group(columns, asked) == fitted


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("int8_g32", 8.5),
        ("int7_g64", 7.25),
        ("int6_g32", 6.5),
        ("int5_g64", 5.25),
        ("int3_g32", 3.5),
        ("int2_g64", 2.25),
        ("int4_g32", 4.5),
        ("int4_g128", 4.125),
        ("int4a_g64", 4.375),
        ("q8_0", 8.5),
        ("q4_0", 4.5),
        ("q4_1", 5.0),
    ],
)
def test_bits_per_weight_count_scales_and_zeros(name: str, bits: float) -> None:
    assert quantize(np.ones((64, 256), np.float32), INTEGERS[name]).bits_per_weight == bits == formats_bits(name)


@given(st.integers(0, 99), st.sampled_from((2, 6, 64)))
def test_nibbles_come_back(seed: int, columns: int) -> None:
    codes = np.random.default_rng(seed).integers(-8, 8, (3, columns)).astype(np.int8)
    packed = pack_nibbles(codes)
    assert packed.nbytes * 2 == codes.nbytes
    assert np.array_equal(unpack_nibbles(packed), codes)


def test_rows_are_stacked_as_they_are() -> None:
    drawn, form = np.random.default_rng(1), INTEGERS["int4a_g32"]
    parts = [drawn.standard_normal((n, 64)).astype(np.float32) for n in (3, 5)]
    together = stack([quantize(part, form) for part in parts])
    assert np.array_equal(dequantize(together), np.concatenate([dequantize(quantize(p, form)) for p in parts]))
    with pytest.raises(ValueError, match="different formats"):
        stack([quantize(parts[0], form), quantize(parts[1], INTEGERS["int4_g32"])])
