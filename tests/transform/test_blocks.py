"""The blocks of GGUF files: rounded as the `gguf` package rounds them, bit for bit, and kept so by whatever is done."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmbuild.kernels.layouts import Layout
from llmbuild.spec.formats import BLOCKS, INTEGERS
from llmbuild.transform.drawn import stored
from llmbuild.transform.gptq import gptq
from llmbuild.transform.panels import encode_for, pack, unpack
from llmbuild.transform.quantized import (
    Quantized,
    dequantize,
    pack_nibbles,
    pad_columns,
    quantize,
    split_groups,
    stack,
    unpack_nibbles,
)

BLOCK = 32
forms = st.sampled_from(BLOCKS)


@st.composite
def matrices(draw: st.DrawFn, columns: st.SearchStrategy[int]) -> np.ndarray:
    """Return weights of any size that f16 holds scales for, with blocks of one number and of none."""
    drawn = np.random.default_rng(draw(st.integers(0, 999)))
    size = draw(st.sampled_from((1, 3, 66))), draw(columns)
    dense = drawn.standard_normal(size) * draw(st.sampled_from((1e-30, 1e-7, 1e-5, 0.02, 1.0, 1e3)))
    if draw(st.booleans()):
        dense = np.abs(dense)
    if draw(st.booleans()):
        dense = np.rint(dense * 8) / 8  # halves between codes
    dense[0] = draw(st.sampled_from((0.0, -0.0, 0.02, -0.375, 1e-7)))
    return dense.astype(np.float32)


whole = matrices(st.sampled_from((32, 64, 96)))


@given(whole, forms)
def test_weights_are_rounded_and_read_as_the_reference_does(dense: np.ndarray, name: str) -> None:
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType[name.upper()]
    raw = gguf.quants.quantize(dense, kind)
    found, rows = quantize(dense, INTEGERS[name]), len(dense)
    blocks = raw.reshape(rows, dense.shape[1] // BLOCK, -1)
    numbers = blocks[..., : 4 if name == "q4_1" else 2].copy().view(np.float16).astype(np.float32)
    assert same_bits(found.scale, numbers[..., 0])
    assert (found.minimum is not None) == (name == "q4_1")
    if found.minimum is not None:
        assert same_bits(found.minimum, numbers[..., 1])
    data = blocks[..., 4 if name == "q4_1" else 2 :]
    if name == "q8_0":
        codes = data.view(np.int8)
    else:
        codes = np.concatenate([data & 15, data >> 4], axis=-1).astype(np.int8) + INTEGERS[name].lowest
    assert np.array_equal(found.codes, codes.reshape(dense.shape))
    assert same_bits(dequantize(found), gguf.quants.dequantize(raw, kind))


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    assert one.dtype == other.dtype == np.float32
    return np.array_equal(np.ascontiguousarray(one).view(np.uint32), np.ascontiguousarray(other).view(np.uint32))


@given(whole, forms)
def test_panels_keep_every_bit(dense: np.ndarray, name: str) -> None:
    quantized, layout = quantize(dense, INTEGERS[name]), Layout(name, dense.shape[1])
    data, scales = pack(layout, quantized)
    panels = -(-len(dense) // 64)
    assert (data.nbytes, scales.nbytes) == (panels * layout.panel_bytes, panels * layout.scale_bytes)
    assert scales.dtype == np.float16
    values, factors = unpack(layout, data.view(np.uint8), scales.view(np.uint8))
    assert np.array_equal(values[: len(dense)], dequantize(quantized))
    assert not values[len(dense) :].any()
    assert (factors == 1).all()


def test_panels_lie_as_their_layout_says() -> None:
    drawn = np.random.default_rng(0)
    for name in BLOCKS:
        quantized, layout = (
            quantize(drawn.standard_normal((128, 64)).astype(np.float32), INTEGERS[name]),
            Layout(name, 64),
        )
        data, scales = (part.reshape(2, -1)[1] for part in pack(layout, quantized))  # the second panel
        bytes_, codes = data.view(np.uint8), quantized.codes[64:].astype(np.int16) + layout.offset
        halves = scales.reshape(2, -1, 64)
        for row, column in ((0, 0), (5, 3), (63, 31), (17, 36), (1, 63)):
            if name == "q8_0":
                found = bytes_.reshape(16, 64, 4)[column // 4, row, column % 4]
            else:
                found = bytes_.reshape(8, 64, 4)[column // 8, row, column % 4] >> 4 * (column // 4 % 2) & 15
            assert found == codes[row, column]
            assert halves[column // 32, 0, row] == quantized.scale[64 + row, column // 32]
            if quantized.minimum is not None:
                assert halves[column // 32, 1, row] == quantized.minimum[64 + row, column // 32]


odd = matrices(st.integers(1, 100))


@given(odd, forms)
def test_a_weight_of_any_width_is_off_by_half_a_step_and_what_f16_leaves(dense: np.ndarray, name: str) -> None:
    quantized = quantize(dense, INTEGERS[name])
    assert quantized.codes.shape == dense.shape
    assert quantized.scale.shape == (len(dense), -(-dense.shape[1] // BLOCK))
    step = np.repeat(np.abs(quantized.scale), BLOCK, axis=1)[:, : dense.shape[1]]
    whole_step = 1.0 if name == "q4_0" else 0.5  # its largest weight has no code on the other side of 0
    lost = 2.0**-11 * np.abs(dense).max() + 2.0**-24 * 128
    assert (np.abs(dequantize(quantized) - dense) <= step * (whole_step + 1e-3) + 2 * lost).all()


@given(odd, forms, st.sampled_from((128, 160)))
def test_columns_that_are_added_are_exactly_zero(dense: np.ndarray, name: str, width: int) -> None:
    quantized = quantize(dense, INTEGERS[name])
    padded = pad_columns(quantized, width)
    assert np.array_equal(dequantize(padded)[:, : dense.shape[1]], dequantize(quantized))
    assert not dequantize(padded)[:, dense.shape[1] :].any()
    assert split_groups(padded, BLOCK) is padded
    kept, made = (encode_for(Layout(name, width), dense, ready) for ready in (quantized, None))
    assert isinstance(kept, Quantized) and isinstance(made, Quantized)
    assert np.array_equal(kept.codes, padded.codes)
    assert np.array_equal(dequantize(kept), dequantize(made))


def test_a_short_block_without_a_code_for_zero_is_told() -> None:
    weights = Quantized(np.ones((1, 8), np.int8), np.ones((1, 1), np.float32), None, 4, 32, np.full((1, 1), 0.3), "f16")
    with pytest.raises(ValueError, match="no code of their own above a minimum"):
        pad_columns(weights, 32)


def test_rows_are_stacked_as_they_are_and_only_with_their_like() -> None:
    drawn = np.random.default_rng(1)
    parts = [drawn.standard_normal((rows, 64)).astype(np.float32) for rows in (3, 5)]
    for name in BLOCKS:
        together = stack([quantize(part, INTEGERS[name]) for part in parts])
        assert np.array_equal(
            dequantize(together), np.concatenate([dequantize(quantize(p, INTEGERS[name])) for p in parts])
        )
        for other in {"q8_0": "int8_g32", "q4_0": "int4_g32", "q4_1": "q4_0"}[name], "int4a_g32":
            with pytest.raises(ValueError, match="different formats"):
                stack([quantize(parts[0], INTEGERS[name]), quantize(parts[1], INTEGERS[other])])


@pytest.mark.parametrize(("name", "other"), [("q8_0", "int8_g32"), ("q4_0", "int4_g32"), ("q4_1", "q4_0")])
def test_a_layout_takes_no_weights_with_other_scales(name: str, other: str) -> None:
    weights = quantize(np.random.default_rng(2).standard_normal((4, 64)).astype(np.float32), INTEGERS[other])
    with pytest.raises(ValueError, match=f"{name}: weights have other scales or minima"):
        pack(Layout(name, 64), weights)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("columns", [64, 84])
def test_outputs_are_nearer_with_steps_and_codes_fitted_to_inputs(name: str, columns: int) -> None:
    drawn = np.random.default_rng(3)
    dense = drawn.standard_normal((96, columns)).astype(np.float32)
    inputs = (drawn.standard_normal((500, 12)) @ drawn.standard_normal((12, columns))).astype(np.float32)
    form = INTEGERS[name]
    fitted, nearest = gptq(dense, inputs.T @ inputs, form), quantize(dense, form)
    error = [np.square(inputs @ (dequantize(q) - dense).T).sum() for q in (fitted, nearest)]
    assert error[0] < 0.5 * error[1]
    for numbers in (fitted.scale, fitted.scale if fitted.minimum is None else fitted.minimum):
        assert same_bits(numbers, numbers.astype(np.float16).astype(np.float32))
    assert form.lowest <= fitted.codes.min() and fitted.codes.max() <= form.highest
    assert not dequantize(pad_columns(fitted, 96))[:, columns:].any()


@pytest.mark.parametrize("name", BLOCKS)
def test_row_by_row_an_archive_holds_the_numbers_of_the_blocks(name: str) -> None:
    dense = np.random.default_rng(4).standard_normal((6, 64)).astype(np.float32)
    quantized, found = quantize(dense, INTEGERS[name]), stored(dense, name)
    codes = found["data"] if name == "q8_0" else unpack_nibbles(found["data"])
    assert np.array_equal(codes & 15 if name == "q4_1" else codes, quantized.codes)
    assert name == "q8_0" or np.array_equal(pack_nibbles(quantized.codes), found["data"])
    assert found["scale"].dtype == np.float16
    assert np.array_equal(found["scale"], quantized.scale)
    assert ("minimum" in found) == (name == "q4_1")
    if quantized.minimum is not None:
        assert np.array_equal(found["minimum"], quantized.minimum)
