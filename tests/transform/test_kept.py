"""Keys and values as integers in NumPy: where their bytes lie, how far they are rounded, and what turning them is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmbuild.kernels.kept import CACHES, Kept, keys_and_values
from llmbuild.transform.kept import packed, rounded, turned, unpacked

SIZES = st.integers(1, 64).map(lambda half: 2 * half)


def drawn(size: int, seed: int) -> np.ndarray:
    """Return rows f32[3,2,size]: one of zeros, one with a number much larger than the others."""
    rows = np.random.default_rng(seed).standard_normal((3, 2, size)).astype(np.float32)
    rows[0, 0] = 0
    rows[1, 0, size // 3] = 1e4
    return rows


@pytest.mark.parametrize(
    ("kind", "size", "taken"),
    [("f32", 64, 256), ("f16", 64, 128), ("int8", 64, 68), ("int4", 64, 36), ("int8", 10, 16), ("int4", 10, 12)],
)
def test_a_head_takes_its_codes_rounded_up_to_words_and_one_word_of_scales(kind: str, size: int, taken: int) -> None:
    kept = Kept(kind, size)
    assert kept.bytes == taken
    stored = packed(kept, drawn(size, 0))
    assert (stored.shape, stored.dtype) == ((3, 2, kept.elements), np.dtype(kept.dtype))
    assert stored[0, 0].nbytes == taken


def test_keys_have_more_bits_than_values_in_k8v4_alone() -> None:
    bits = {cache: tuple(kept.bits for kept in keys_and_values(cache, 64)) for cache in CACHES}
    assert bits == {"f32": (32, 32), "f16": (16, 16), "int8": (8, 8), "k8v4": (8, 4), "int4": (4, 4)}


def test_bytes_lie_as_the_kernels_read_them() -> None:
    """Numbers that turning makes 0, 8, 8, 0 and 0, -4, -4, 0 of: the largest of a half has the last code."""
    rows = turned(np.array([0, 8, 8, 0, 0, -4, -4, 0], np.float32), 8) / 8
    one, four = 0x3F80, 0xBF80  # 1 and -1 as bf16
    stored = packed(Kept("int4", 8), rows)
    both = np.int8(-120)  # -8 in either half of a byte
    assert stored[:4].tolist() == [0, both, both, 0]
    assert stored[4:].view(np.uint16).tolist() == [four, 0x3F00]
    stored = packed(Kept("int8", 8), rows * (127 / 8))
    assert stored[:8].tolist() == [0, 127, 127, 0, 0, -127, -127, 0]
    assert stored[8:].view(np.uint16).tolist() == [one, 0x3F00]


@given(SIZES, st.integers(0, 9), st.sampled_from(("int8", "int4")))
def test_no_turned_number_is_off_by_more_than_its_halfs_rounding(size: int, seed: int, kind: str) -> None:
    kept, rows = Kept(kind, size), drawn(size, seed)
    before, after = (turned(part, kept.turned).reshape(3, 2, 2, -1) for part in (rows, rounded(kept, rows)))
    # half a step; of int4 a whole one at the end without the lowest code; scales are rounded by 2^-8 at most
    step = np.abs(before).max(axis=-1, keepdims=True) / kept.most * (1 + 2**-8)
    allowed = step * (0.5 if kind == "int8" else 1.0) + np.abs(before).max(axis=-1, keepdims=True) * 2**-8
    assert (np.abs(after - before) <= allowed + 1e-12).all()
    assert not rounded(kept, rows)[0, 0].any()


@given(SIZES, st.integers(0, 9))
def test_turning_twice_is_a_factor_and_keeps_products(size: int, seed: int) -> None:
    count = Kept("int8", size).turned
    rows, others = drawn(size, seed), drawn(size, seed + 1)
    assert size % count == 0 and size // count % 2
    assert np.allclose(turned(turned(rows, count), count), count * rows, rtol=1e-4, atol=count * 1e-2)
    products = (turned(rows, count).astype(np.float64) * turned(others, count)).sum(-1)
    assert np.allclose(products, count * (rows.astype(np.float64) * others).sum(-1), rtol=1e-4, atol=count)


def test_a_large_number_costs_the_others_less_once_it_is_turned() -> None:
    """What turning is for: 4 bits keep the small numbers beside one that is a hundred times as large."""
    rows = np.random.default_rng(0).standard_normal((100, 64)).astype(np.float32)
    rows[:, 5] = 100
    plain = np.rint(rows * (7 / 100)) * (100 / 7)
    small = np.arange(64) != 5
    errors = [np.square(found - rows)[:, small].mean() for found in (rounded(Kept("int4", 64), rows), plain)]
    assert errors[0] < 0.5 * np.square(rows[:, small]).mean() < 0.51 * errors[1]


@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_numbers_are_kept_as_they_are(kind: str) -> None:
    rows = drawn(8, 0)
    assert np.array_equal(unpacked(Kept(kind, 8), packed(Kept(kind, 8), rows)), rows.astype(Kept(kind, 8).dtype))
