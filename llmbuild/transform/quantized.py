"""Weight matrices as small integers with scales: the representation, rounding to nearest, and two codes in one byte."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from llmbuild.spec.formats import Format, Scales, fit_group
from llmbuild.transform import blocks
from llmbuild.transform.scales import stored
from llmbuild.transform.weights import Array, pad_width

SPOTS = (-0.8, 0.0, 0.8)
"""Codes beside the lowest one that the farthest weight of a group is tried at; more of them win next to nothing."""

LEAST_WEIGHT = 2.0**-100
"""A group with nothing larger is zero: scales of it would leave the normal numbers of f32."""


@dataclass(frozen=True)
class Steps:
    """What codes say, `(code - zero) * scale + minimum`, by group: arrays f32[N,K/group], or spread over weights."""

    form: Format
    scale: Array
    zero: Array | None = None
    minimum: Array | None = None

    def each(self, spread: Callable[[Array], Array]) -> Steps:
        """Return the same with something done to each array."""
        zero, minimum = (None if x is None else spread(x) for x in (self.zero, self.minimum))
        return replace(self, scale=spread(self.scale), zero=zero, minimum=minimum)

    def where(self, better: Array, others: Steps) -> Steps:
        """Return these steps where a mask of groups says so, else the others, which are of the same format."""
        pairs = ((self.zero, others.zero), (self.minimum, others.minimum))
        zero, minimum = (None if x is None or y is None else np.where(better, x, y) for x, y in pairs)
        return replace(self, scale=np.where(better, self.scale, others.scale), zero=zero, minimum=minimum)

    def codes(self, weights: Array) -> Array:
        """Return the codes int8 of weights, each rounded to the nearest; the arrays are broadcast against them."""
        bottom = -self.form.highest if self.form.bits == 8 and self.zero is None else self.form.lowest
        scale = np.where(self.scale == 0, np.float32(1), self.scale) if self.form.is_block else self.scale
        found = np.rint((weights if self.minimum is None else weights - self.minimum) / scale)
        return np.clip(found if self.zero is None else found + self.zero, bottom, self.form.highest).astype(np.int8)

    def weights(self, codes: Array) -> Array:
        """Return the weights f32 that codes say; the arrays are broadcast against them."""
        found: Array = (codes if self.zero is None else codes - self.zero) * self.scale
        return found if self.minimum is None else found + self.minimum


@dataclass(frozen=True)
class Quantized:
    """A matrix `[N, K]`: `(codes - zero) * scale + minimum`, with those of the column's group.

    `codes` are int8[N,K], those that the form has; `scale` is f32[N,K/group], not 0, and positive for 8 bits and beside
    zeros. `zero` is f32 of the same shape, integers within the range of the codes, or None where it
    is 0 throughout. Scales of groups smaller than a row, and those beside zeros, are numbers that bf16 holds exactly,
    and are stored so; where `scales` are i8, they are also such bytes times a power of two for each row.

    In the blocks of GGUF, `halves`, the last group may be shorter than the others. Scales, which may be 0 or negative,
    and `minimum`, None where it is 0 throughout, are numbers that f16 holds exactly, and are stored so.
    """

    codes: Array
    scale: Array
    zero: Array | None
    bits: int
    group: int
    minimum: Array | None = None
    scales: Scales = "bf16"
    """How scales of groups are stored."""

    @property
    def halves(self) -> bool:
        """Whether these are the blocks of GGUF."""
        return self.scales == "f16"

    @property
    def bits_per_weight(self) -> float:
        """What one weight takes in the archive, scales, zeros and minima included."""
        rows, columns = self.codes.shape
        by_row = self.group == columns and not self.halves
        scale = 32 if by_row else 8 if self.scales == "i8" else 16
        beside = (0 if self.zero is None else 8) + (0 if self.minimum is None else 16)
        of_rows = 32 * rows if self.scales == "i8" and not by_row else 0
        return float(self.bits + (self.scale.size * (scale + beside) + of_rows) / (rows * columns))

    @property
    def form(self) -> Format:
        """The format of the matrix, with the length that its groups have."""
        return Format(self.bits, self.group, self.zero is None, self.scales, self.minimum is not None)


def code_range(bits: int) -> tuple[int, int]:
    """Return the lowest and the highest code of the formats without a minimum."""
    return Format(bits).lowest, Format(bits).highest


def group_of(columns: int, form: Format) -> int:
    """Return the columns that share a scale in rows of so many."""
    return form.group if form.is_block else fit_group(columns, form.group or columns)


def by_group(dense: Array, group: int) -> Array:
    """Return the view `[N, K/group, group]`; of a copy that ends in zeros where groups do not divide K."""
    return pad_width(dense, -(-dense.shape[1] // group) * group).reshape(len(dense), -1, group)


def _joined(parts: Array, columns: int) -> Array:
    """Return `[N, K]` of what `by_group` made of it."""
    return np.ascontiguousarray(parts.reshape(len(parts), -1)[:, :columns])


def _over_columns(by_groups: Array) -> Array:
    return by_groups[..., None]


def round_up_to_bf16(x: Array) -> Array:
    """Return f32 of which bf16 keeps every bit: the least that is not below `x`, which must not be negative."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)).view(np.float32)


def full_range(dense: Array, form: Format, shrink: float = 1.0) -> Steps:
    """Return steps of 8 bits, with zeros, or of blocks, that reach the largest and the smallest weight of each group.

    With `shrink` below 1 they reach that part of it only, and what lies beyond is clipped. Scales of groups are rounded
    up to bf16, so that rounding them clips nothing; those of blocks to the nearest f16. In a row that ends in a short
    block a code is exactly 0: that of columns which are added.
    """
    group = group_of(dense.shape[1], form)
    parts = by_group(dense, group)
    if form.is_block:
        scale, minimum = blocks.steps(parts, form, shrink, with_zero=_ends_short(dense, form))
        return Steps(form, scale, None, minimum)
    high = np.maximum(parts.max(axis=2), 0).astype(np.float64) * shrink
    low = np.minimum(parts.min(axis=2), 0).astype(np.float64) * shrink
    bottom, top = form.lowest, form.highest
    wanted = np.maximum(high, -low) / top if form.symmetric else (high - low) / (top - bottom)
    empty = np.maximum(high, -low) <= LEAST_WEIGHT
    scale = np.where(empty, 1.0, wanted).astype(np.float32)
    if group < dense.shape[1] or not form.symmetric:
        scale = round_up_to_bf16(scale)
    if form.symmetric:
        return Steps(form, scale)
    return Steps(form, scale, np.clip(np.rint(-low / scale) + bottom, bottom, top).astype(np.float32))


def closest_range(dense: Array, form: Format, weight: Array | None = None, shrinks: Sequence[float] = ()) -> Steps:
    """Return steps of about the least squared error for a format that has sides; column k counts `weight` f32[K] times.

    Weights count by their square besides: models depend on their large weights. Of each group the weight that is
    farthest from 0 is placed at the lowest code or a little beside it, or with `shrinks` as far beyond it, whatever its
    sign: there is no such code on the other side. The other codes follow, and the scale is that of least squares.
    """
    group = group_of(dense.shape[1], form)
    parts = by_group(dense, group)
    farthest = np.take_along_axis(parts, np.abs(parts).argmax(axis=2)[..., None], axis=2)[..., 0]
    unit = np.where(np.abs(farthest) <= LEAST_WEIGHT, np.float32(1), farthest)
    parts = parts / unit[..., None]
    count = np.square(parts)
    if weight is not None:
        count *= by_group(weight[None], group)
    counted, codes = count * parts, np.empty_like(parts)
    most, found = np.zeros_like(unit), np.zeros_like(unit)
    for place in (*(form.lowest + spot for spot in SPOTS), *(form.lowest / shrink for shrink in shrinks)):
        np.multiply(parts, np.float32(place), out=codes)
        np.clip(np.rint(codes, out=codes), form.lowest, form.highest, out=codes)
        product = np.einsum("ngk,ngk->ng", codes, counted)
        square = np.einsum("ngk,ngk->ng", np.square(codes, out=codes), count)
        scale = product / np.maximum(square, np.finfo(np.float32).tiny)
        better = product * scale > most  # what these codes leave of the sum of squares is smaller by that
        most, found = np.where(better, product * scale, most), np.where(better, scale, found)
    if group == dense.shape[1]:
        return Steps(form, np.where(found == 0, np.float32(1), found * unit))
    empty, scale = found == 0, found * unit
    if form.scale == "i8":  # the largest scale of a row decides on all: that of an empty group must not be it
        empty &= (found == 0).all(axis=1, keepdims=True)
    return Steps(form, stored(np.where(empty, np.float32(1), scale), form.scale))


def _ends_short(dense: Array, form: Format) -> bool:
    return bool(dense.shape[1] % form.group)


def matrix(codes: Array, steps: Steps) -> Quantized:
    """Return the matrix of codes int8[N,K] and the steps of its groups."""
    form, group = steps.form, group_of(codes.shape[1], steps.form)
    return Quantized(codes, steps.scale, steps.zero, form.bits, group, steps.minimum, form.scale)


def nearest(dense: Array, steps: Steps) -> Quantized:
    """Return the matrix f32[N,K], each weight rounded to the nearest code of its group."""
    parts = by_group(dense, group_of(dense.shape[1], steps.form))
    return matrix(_joined(steps.each(_over_columns).codes(parts), dense.shape[1]), steps)


def quantize(dense: Array, form: Format) -> Quantized:
    """Return the matrix f32[N,K] with every weight rounded to the nearest code.

    Eight bits and zeros reach every weight, so that none is off by more than half a scale; symmetric formats of fewer
    bits have the scales of `closest_range`. Blocks of GGUF are rounded as its reference does it, unless a row ends in a
    short one that has minima.
    """
    if form.has_sides:
        return nearest(dense, closest_range(dense, form))
    if not form.is_block or (form.minimum and _ends_short(dense, form)):
        return nearest(dense, full_range(dense, form))
    codes, scale, minimum = blocks.nearest(by_group(dense, form.group), form)
    return matrix(_joined(codes, dense.shape[1]), Steps(form, scale, None, minimum))


def dequantize(quantized: Quantized) -> Array:
    """Return f32[N,K]."""
    steps = Steps(quantized.form, quantized.scale, quantized.zero, quantized.minimum).each(_over_columns)
    return _joined(steps.weights(by_group(quantized.codes, quantized.group)), quantized.codes.shape[1])


def pad_columns(quantized: Quantized, columns: int) -> Quantized:
    """Return the matrix with zeros behind its columns, which groups divide; the scale of a whole row goes for them too.

    There must be no zero points, and a code for 0 in a short block.
    """
    rows, own = quantized.codes.shape
    if own == columns:
        return quantized
    if quantized.halves:
        return _pad_blocks(quantized, columns)
    if quantized.zero is not None:
        raise ValueError("columns of zeros have no code of their own where there are zero points")
    codes = np.concatenate([quantized.codes, np.zeros((rows, columns - own), np.int8)], axis=1)
    if quantized.group == own:
        return replace(quantized, codes=codes, group=columns)
    more = columns // quantized.group - quantized.scale.shape[1]
    added = np.ones((rows, more), np.float32)
    if quantized.scales == "i8":  # no other scale may become the largest of its row
        added = np.repeat(quantized.scale[:, -1:], more, axis=1)
    return replace(quantized, codes=codes, scale=np.concatenate([quantized.scale, added], axis=1))


def _pad_blocks(quantized: Quantized, columns: int) -> Quantized:
    """Return the matrix with zeros behind its columns: in its last block if that is short, then in empty blocks."""
    groups, own, last = -(-columns // quantized.group), quantized.codes.shape[1], quantized.scale.shape[1] - 1
    scale = pad_width(quantized.scale, groups)
    minimum = None if quantized.minimum is None else pad_width(quantized.minimum, groups)
    short = own % quantized.group
    codes = pad_width(quantized.codes, columns)
    if short:
        ends = slice(last, last + 1)
        codes[:, own : own - short + quantized.group] = blocks.zero_codes(
            scale[:, ends], None if minimum is None else minimum[:, ends]
        )
    return replace(quantized, codes=codes, scale=scale, minimum=minimum)


def split_groups(quantized: Quantized, group: int) -> Quantized | None:
    """Return the matrix with a scale for each `group` of columns; None where some would need more than one.

    The scale of a whole row is rounded for that, as scales of groups are. Blocks of GGUF are kept as they are.
    """
    if quantized.group % group or quantized.zero is not None:
        return None
    if quantized.group == group:
        return quantized
    if quantized.halves:
        return None
    scale = stored(quantized.scale, quantized.scales)
    return replace(quantized, scale=np.repeat(scale, quantized.group // group, axis=1), group=group)


def rows_of(quantized: Quantized, start: int, stop: int) -> Quantized:
    """Return some rows of a matrix."""
    zero, minimum = (None if x is None else x[start:stop] for x in (quantized.zero, quantized.minimum))
    codes, scale = quantized.codes[start:stop], quantized.scale[start:stop]
    return replace(quantized, codes=codes, scale=scale, zero=zero, minimum=minimum)


def stack(parts: Sequence[Quantized]) -> Quantized:
    """Return the rows of several matrices of one format and width as one."""
    if any(part.form != parts[0].form for part in parts):
        raise ValueError("matrices of different formats cannot be stacked")
    return joined(parts, lambda *arrays: np.concatenate(arrays))


def joined(parts: Sequence[Quantized], join: Callable[..., Array]) -> Quantized:
    """Return matrices of one format and width as one; `join` says in which order their rows come."""
    zeros = [part.zero for part in parts if part.zero is not None]
    minima = [part.minimum for part in parts if part.minimum is not None]
    return replace(
        parts[0],
        codes=join(*[part.codes for part in parts]),
        scale=join(*[part.scale for part in parts]),
        zero=join(*zeros) if zeros else None,
        minimum=join(*minima) if minima else None,
    )


def pack_nibbles(codes: Array) -> Array:
    """Return bytes u8[..., n/2] of codes int8[..., n] in -8..7 or 0..15: the first of two in the low half of a byte.

    Each is kept in two's complement, as a compiler keeps `i4`, or as it is.
    """
    pairs = codes.reshape(*codes.shape[:-1], -1, 2).view(np.uint8)
    return (pairs[..., 0] & 15) | (pairs[..., 1] << 4)


def unpack_nibbles(packed: Array) -> Array:
    """Return the codes int8[..., n] of bytes u8[..., n/2], in -8..7: those in 0..15 are their four bits."""
    unsigned = packed.view(np.uint8)
    pairs = np.stack([unsigned << 4, unsigned & 0xF0], axis=-1).view(np.int8) >> 4
    return pairs.reshape(*packed.shape[:-1], -1)
