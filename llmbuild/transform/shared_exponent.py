"""Weights of 12 bits whose rows share an exponent (`f12_e4m7`): rounding, codes, and back.

A code is the sign, four bits `e` and seven bits `m`: `(1 + m / 128) * 2^(e - 15)` times the power of two of its row's
largest weight; 0 where `e` is 0, and then `m` is 0 as well.
"""

from __future__ import annotations

import numpy as np

from llmbuild.kernels.shared_exponent import KEPT, MOVED
from llmbuild.transform.quantized import LEAST_WEIGHT
from llmbuild.transform.weights import Array, from_bf16, to_bf16

TOP = 15
"""The exponent code of a row's largest weight."""
LARGEST = np.float32(2.0**127 * (2 - 2**-7))
"""The largest finite bf16."""
SPARE = np.uint32(~KEPT)
"""Bits of a pair of bf16 that codes leave free: the upper ones of its exponents."""


def nearest(dense: Array) -> Array:
    """Return finite f32[N,K], each weight rounded to the nearest of its row's numbers; once more changes nothing."""
    rounded = from_bf16(to_bf16(np.clip(dense, -LARGEST, LARGEST)))
    size, least = np.abs(rounded), 2.0 ** (1 - TOP) * powers(rounded)[:, None]
    below = np.where(size < least / 2, np.float32(0), least.astype(np.float32))
    kept = np.where(size < least, np.copysign(below, rounded), rounded)
    return np.where(size.max(axis=1, initial=0, keepdims=True) > LEAST_WEIGHT, kept, np.float32(0))


def powers(rounded: Array) -> Array:
    """Return f32[N]: the power of two of each row's largest weight, 1 where that is next to nothing."""
    largest = np.abs(rounded).max(axis=1, initial=0)
    power = np.ldexp(np.float32(1), np.frexp(largest)[1] - 1)
    return np.where(largest > LEAST_WEIGHT, power, np.float32(1)).astype(np.float32)


def codes(rounded: Array) -> Array:
    """Return u16[N,K] of what `nearest` returned: its bf16, with the exponent counted from that of the row."""
    bits = (np.ascontiguousarray(rounded, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    first = (powers(rounded).view(np.uint32) >> 23).astype(np.uint16) - np.uint16(TOP) << np.uint16(7)
    size = bits & np.uint16(0x7FFF)
    found: Array = size - first[:, None] | bits >> np.uint16(15) << np.uint16(11)
    found[size == 0] = 0
    return found


def values(stored: Array) -> Array:
    """Return f32 of codes u16, without the powers of their rows."""
    size = np.ldexp(1 + (stored & 127).astype(np.float32) / 128, (stored >> 7 & 15).astype(np.int32) - TOP)
    return np.where(stored >> 7 & 15, np.where(stored >> 11, -size, size), 0).astype(np.float32)


def pack_codes(stored: Array) -> Array:
    """Return bytes u8[..., K/8, 3, 4] of codes u16[..., K]: what `Layout` says of each row's eight columns."""
    halves = (stored << 4 & 0x8000 | stored & 0x7FF).astype("<u2")
    pairs = np.ascontiguousarray(halves).view("<u4").reshape(*stored.shape[:-1], -1, 4)
    kept, missing = pairs[..., :3], pairs[..., 3] ^ _fourth(pairs[..., :3])
    spare = [_turned(missing, -far) & SPARE for far in MOVED]
    return (kept | np.stack(spare, axis=-1)).astype("<u4")[..., None].view(np.uint8)


def unpack_codes(packed: Array) -> Array:
    """Return codes u16[..., K] of bytes u8[..., K/8, 3, 4]."""
    three = np.ascontiguousarray(packed).view("<u4")[..., 0]
    pairs = np.concatenate([three & ~SPARE, _fourth(three)[..., None]], axis=-1)
    halves = pairs.astype("<u4").view("<u2").reshape(*packed.shape[:-3], -1)
    return (halves >> 4 & 0x800 | halves & 0x7FF).astype(np.uint16)


def _fourth(three: Array) -> Array:
    """Return the fourth pairs u32[...] of bf16 that the stored ones, u32[...,3], have in them."""
    first, second, third = (three[..., i] for i in range(3))
    return (first >> MOVED[0] ^ second >> MOVED[1] ^ _turned(third, MOVED[2])) & ~SPARE


def _turned(pairs: Array, right: int) -> Array:
    """Return u32 rotated to the right."""
    return pairs >> np.uint32(right % 32) | pairs << np.uint32(-right % 32)
