"""Weight matrices as small integers with scales: the representation, rounding to nearest, and two codes in one byte."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from llmbuild.spec.formats import Format, fit_group
from llmbuild.transform.weights import Array, from_bf16, to_bf16

LEAST_WEIGHT = 2.0**-100
"""A group with nothing larger is zero: scales of it would leave the normal numbers of f32."""


@dataclass(frozen=True)
class Quantized:
    """A matrix `[N, K]`: `(codes - zero) * scale`, with scale and zero of the column's group.

    `codes` are int8[N,K] in -8..7 for 4 bits and in -128..127 for 8; `scale` is f32[N,K/group], positive. `zero` is f32
    of the same shape, integers within the range of the codes, or None where it is 0 throughout. Scales of groups
    smaller than a row, and those beside zeros, are numbers that bf16 holds exactly, and are stored so.
    """

    codes: Array
    scale: Array
    zero: Array | None
    bits: int
    group: int

    @property
    def bits_per_weight(self) -> float:
        """What one weight takes in the archive, scales and zeros included."""
        rows, columns = self.codes.shape
        scale = 16 if self.group < columns else 32
        zero = 0 if self.zero is None else 8
        return float(self.bits + self.scale.size * (scale + zero) / (rows * columns))


def code_range(bits: int) -> tuple[int, int]:
    """Return the lowest and the highest code."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def by_group(dense: Array, group: int) -> Array:
    """Return the view `[N, K/group, group]`."""
    return dense.reshape(len(dense), -1, group)


def round_up_to_bf16(x: Array) -> Array:
    """Return f32 of which bf16 keeps every bit: the least that is not below `x`, which must not be negative."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)).view(np.float32)


def full_range(dense: Array, form: Format, shrink: float = 1.0) -> tuple[Array, Array | None]:
    """Return scale and zero f32[N,K/group] that reach the largest and the smallest weight of each group.

    With `shrink` below 1 they reach that part of it only, and what lies beyond is clipped. Scales of groups are rounded
    up to bf16, so that rounding them clips nothing.
    """
    group = fit_group(dense.shape[1], form.group or dense.shape[1])
    parts = by_group(dense, group)
    high = np.maximum(parts.max(axis=2), 0).astype(np.float64) * shrink
    low = np.minimum(parts.min(axis=2), 0).astype(np.float64) * shrink
    bottom, top = code_range(form.bits)
    if not form.symmetric:
        wanted = (high - low) / (top - bottom)
    elif form.bits == 8:
        wanted = np.maximum(high, -low) / top
    else:  # with so few codes, the one that only negative numbers have counts
        wanted = np.maximum(high / top, low / bottom)
    empty = np.maximum(high, -low) <= LEAST_WEIGHT
    scale = np.where(empty, 1.0, wanted).astype(np.float32)
    if group < dense.shape[1] or not form.symmetric:
        scale = round_up_to_bf16(scale)
    if form.symmetric:
        return scale, None
    return scale, np.clip(np.rint(-low / scale) + bottom, bottom, top).astype(np.float32)


def encode(parts: Array, scale: Array, zero: Array | None, bits: int) -> Array:
    """Return the codes int8 of weights, each rounded to the nearest; scale and zero are broadcast against them."""
    bottom, top = code_range(bits)
    if bits == 8 and zero is None:
        bottom = -top
    codes = np.rint(parts / scale)
    return np.clip(codes if zero is None else codes + zero, bottom, top).astype(np.int8)


def quantize(dense: Array, form: Format) -> Quantized:
    """Return the matrix f32[N,K] with every weight rounded to the nearest code: off by half a scale at most."""
    scale, zero = full_range(dense, form)
    group = dense.shape[1] // scale.shape[1]
    spread_zero = None if zero is None else zero[..., None]
    codes = encode(by_group(dense, group), scale[..., None], spread_zero, form.bits)
    return Quantized(codes.reshape(dense.shape), scale, zero, form.bits, group)


def dequantize(quantized: Quantized) -> Array:
    """Return f32[N,K]."""
    parts = by_group(quantized.codes, quantized.group).astype(np.float32)
    if quantized.zero is not None:
        parts -= quantized.zero[..., None]
    return (parts * quantized.scale[..., None]).reshape(quantized.codes.shape)


def pad_columns(quantized: Quantized, columns: int) -> Quantized:
    """Return the matrix with zeros behind its columns, which groups divide; the scale of a whole row goes for them too.

    There must be no zero points.
    """
    rows, own = quantized.codes.shape
    if own == columns:
        return quantized
    if quantized.zero is not None:
        raise ValueError("columns of zeros have no code of their own where there are zero points")
    codes = np.concatenate([quantized.codes, np.zeros((rows, columns - own), np.int8)], axis=1)
    if quantized.group == own:
        return replace(quantized, codes=codes, group=columns)
    added = np.ones((rows, columns // quantized.group - quantized.scale.shape[1]), np.float32)
    return replace(quantized, codes=codes, scale=np.concatenate([quantized.scale, added], axis=1))


def split_groups(quantized: Quantized, group: int) -> Quantized | None:
    """Return the matrix with a scale for each `group` of columns; None where some would need more than one.

    The scale of a whole row is rounded to bf16 for that.
    """
    if quantized.group % group or quantized.zero is not None:
        return None
    if quantized.group == group:
        return quantized
    scale = from_bf16(to_bf16(quantized.scale))
    return replace(quantized, scale=np.repeat(scale, quantized.group // group, axis=1), group=group)


def rows_of(quantized: Quantized, start: int, stop: int) -> Quantized:
    """Return some rows of a matrix."""
    zero = None if quantized.zero is None else quantized.zero[start:stop]
    return replace(quantized, codes=quantized.codes[start:stop], scale=quantized.scale[start:stop], zero=zero)


def stack(parts: Sequence[Quantized]) -> Quantized:
    """Return the rows of several matrices of one format and width as one."""
    first = parts[0]
    if any((p.bits, p.group, p.zero is None) != (first.bits, first.group, first.zero is None) for p in parts):
        raise ValueError("matrices of different formats cannot be stacked")
    zeros = [p.zero for p in parts if p.zero is not None]
    return Quantized(
        np.concatenate([p.codes for p in parts]),
        np.concatenate([p.scale for p in parts]),
        np.concatenate(zeros) if zeros else None,
        first.bits,
        first.group,
    )


def pack_nibbles(codes: Array) -> Array:
    """Return bytes u8[..., n/2] of codes int8[..., n] in -8..7: the first of two in the low half of a byte.

    Each is kept in two's complement, as a compiler keeps `i4`.
    """
    pairs = codes.reshape(*codes.shape[:-1], -1, 2).view(np.uint8)
    return (pairs[..., 0] & 15) | (pairs[..., 1] << 4)


def unpack_nibbles(packed: Array) -> Array:
    """Return the codes int8[..., n] of bytes u8[..., n/2]."""
    unsigned = packed.view(np.uint8)
    pairs = np.stack([unsigned << 4, unsigned & 0xF0], axis=-1).view(np.int8) >> 4
    return pairs.reshape(*packed.shape[:-1], -1)
