"""Writes and reads the keys and values of a head in a cache; `kept` says how they lie there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llmbuild.kernels import elementwise as k
from llmbuild.kernels.kept import Kept
from llmbuild.kernels.products import ROUNDER, ROUNDER_BITS
from llmbuild.kernels.text import F32, I32, Writer

Part = tuple[int, str]
"""Some numbers of a head in a vector, and which of them is the first."""
LEAST = 1e-30
"""The least magnitude that a scale is made for."""
UPPER = -1 << 16
"""The bits of f32 that bf16 has."""


@dataclass(frozen=True)
class Cache:
    """One head's keys or values in a cache: pointer to its first place, bytes to the next."""

    base: str
    stride: int
    kept: Kept

    def moved(self, w: Writer, places: str) -> Cache:
        """Return the cache from so many places further on."""
        return Cache(self.place(w, places), self.stride, self.kept)

    def place(self, w: Writer, number: str) -> str:
        """Return the pointer to a place."""
        return w.at(self.base, w.mul(number, self.stride))

    def numbers(self, w: Writer, place: str, lanes: int) -> Iterator[tuple[int, str]]:
        """Yield all numbers at the pointer to a place as vectors f32, without their scales, and which vector it is.

        They are written one after the other, as they are asked for: registers are few.
        """
        vf, bits = f"vector<{lanes}x{F32}>", self.kept.bits
        if bits == 4:
            yield from self._nibbles(w, place, lanes)
            return
        for index in range(self.kept.size // lanes):
            pointer = w.at(place, index * lanes * bits // 8)
            if bits == 32:
                yield index, w.load(pointer, vf)
            elif bits == 16:
                halves = f"vector<{lanes}xf16>"
                yield index, w.cast("arith.extf", w.load(pointer, halves, 2), halves, vf)
            else:
                yield index, w.cast("arith.sitofp", _extended(w, pointer, lanes), _words(vf), vf)

    def _nibbles(self, w: Writer, place: str, lanes: int) -> Iterator[tuple[int, str]]:
        vf, half = f"vector<{lanes}x{F32}>", self.kept.size // 2 // lanes
        vi = _words(vf)
        for index in range(half):
            both = _extended(w, w.at(place, index * lanes), lanes)
            lower = w.op("arith.shli", both, w.lanes(28, vi), kind=vi)
            yield index, w.cast("arith.sitofp", w.op("arith.shrsi", lower, w.lanes(28, vi), kind=vi), vi, vf)
            yield index + half, w.cast("arith.sitofp", w.op("arith.shrsi", both, w.lanes(4, vi), kind=vi), vi, vf)

    def product(self, w: Writer, place: str, query: Sequence[str], lanes: int) -> str:
        """Return a vector whose lanes add up to the product of a query, in vectors, and the numbers at a place."""
        vf, sums = f"vector<{lanes}x{F32}>", dict[int, str]()
        for index, numbers in self.numbers(w, place, lanes):
            half = self._half(index, lanes)
            if half in sums:
                sums[half] = w.op("math.fma", query[index], numbers, sums[half], kind=vf)
            else:
                sums[half] = w.op("arith.mulf", query[index], numbers, kind=vf)
        if not self.kept.is_integer:
            return sums[0]
        low, high = self._scales(w, place, lanes)
        return w.op("math.fma", sums[1], high, w.op("arith.mulf", sums[0], low, kind=vf), kind=vf)

    def scaled(self, w: Writer, place: str, weight: str, lanes: int) -> list[str]:
        """Return what each vector of numbers at a place is to be multiplied by: a weight, in every lane, by a scale."""
        vf, count = f"vector<{lanes}x{F32}>", self.kept.size // lanes
        if not self.kept.is_integer:
            return [weight] * count
        weights = [w.op("arith.mulf", weight, scale, kind=vf) for scale in self._scales(w, place, lanes)]
        return [weights[self._half(index, lanes)] for index in range(count)]

    def _half(self, index: int, lanes: int) -> int:
        """Return which scale a vector has; numbers without one are all alike."""
        return 2 * index * lanes // self.kept.size if self.kept.is_integer else 0

    def _scales(self, w: Writer, place: str, lanes: int) -> list[str]:
        """Return the scales of both halves, each in every lane."""
        vf = f"vector<{lanes}x{F32}>"
        vi = _words(vf)
        both = w.splat(w.load(w.at(place, self.kept.code_bytes), I32), vi)
        low = w.op("arith.shli", both, w.lanes(16, vi), kind=vi)
        high = w.op("arith.andi", both, w.lanes(UPPER, vi), kind=vi)
        return [w.cast("arith.bitcast", scale, vi, vf) for scale in (low, high)]


def _words(kind: str) -> str:
    return kind.replace(F32, I32)


def _extended(w: Writer, pointer: str, lanes: int) -> str:
    """Return signed bytes as i32."""
    kind = f"vector<{lanes}xi8>"
    return w.cast("arith.extsi", w.load(pointer, kind, 1), kind, f"vector<{lanes}x{I32}>")


def store(w: Writer, kept: Kept, parts: Sequence[Part], kind: str, pointer: str) -> None:
    """Write a head's keys or values, in vectors f32 of the type `kind`, to their place."""
    if kept.is_integer:
        _store_codes(w, kept, parts, kind, pointer)
        return
    for first, vector in parts:
        at = w.at(pointer, first * kept.bits // 8)
        if kept.bits == 16:
            halves = kind.replace(F32, "f16")
            w.store(w.cast("arith.truncf", vector, kind, halves), at, halves, 2)
        else:
            w.store(vector, at, kind)


def _store_codes(w: Writer, kept: Kept, parts: Sequence[Part], kind: str, pointer: str) -> None:
    vectors = dict(k.turned(w, parts, kind, kept.turned))
    words, stored, middle = _words(kind), kind.replace(F32, "i8"), kept.size // 2
    halves = [[vector for first, vector in vectors.items() if (first >= middle) == upper] for upper in (False, True)]
    scales = [_scale(w, kept, half, kind) for half in halves]
    low, high = (w.cast("arith.bitcast", scale, F32, I32) for scale in scales)
    both = w.op("arith.ori", w.op("arith.shrui", low, w.constant("16", I32), kind=I32), high, kind=I32)
    w.store(both, w.at(pointer, kept.code_bytes), I32)
    factors = [w.splat(_inverse(w, scale), kind) for scale in scales]
    codes = {first: _codes(w, kept, v, factors[first >= middle], kind) for first, v in vectors.items()}
    if kept.bits == 4:
        codes = {
            first: _paired(w, code, codes[first + middle], words) for first, code in codes.items() if first < middle
        }
    for first, code in codes.items():
        w.store(w.cast("arith.trunci", code, words, stored), w.at(pointer, first), stored, 1)


def _paired(w: Writer, low: str, high: str, kind: str) -> str:
    """Return codes of four bits, two in each byte."""
    upper = w.op("arith.shli", high, w.lanes(4, kind), kind=kind)
    return w.op("arith.ori", w.op("arith.andi", low, w.lanes(15, kind), kind=kind), upper, kind=kind)


def _scale(w: Writer, kept: Kept, vectors: Sequence[str], kind: str) -> str:
    """Return the scale of numbers: f32, rounded to bf16."""
    high, low = _top(w, vectors, kind), _top(w, [w.op("arith.negf", v, kind=kind) for v in vectors], kind)
    top = w.larger(w.larger(high, low, F32), w.real(LEAST), F32)
    scale = w.op("arith.divf", top, w.real(kept.most), kind=F32)
    bits = w.cast("arith.bitcast", scale, F32, I32)
    raised = w.op("arith.addi", bits, w.constant(str(1 << 15), I32), kind=I32)
    kept_bits = w.op("arith.andi", raised, w.constant(str(UPPER), I32), kind=I32)
    rounded = w.cast("arith.bitcast", kept_bits, I32, F32)
    if kept.bits == 8:
        return rounded
    above = w.let(f"arith.cmpf oge, {high}, {low} : {F32}")
    return w.let(f"arith.select {above}, {w.op('arith.negf', rounded, kind=F32)}, {rounded} : {F32}")


def _inverse(w: Writer, scale: str) -> str:
    return w.op("arith.divf", w.real(1.0), scale, kind=F32)


def _top(w: Writer, vectors: Sequence[str], kind: str) -> str:
    most, *others = vectors
    for other in others:
        most = w.larger(other, most, kind)
    return w.top(most, kind)


def _codes(w: Writer, kept: Kept, vector: str, factor: str, kind: str) -> str:
    """Return vectors as integers i32."""
    words = _words(kind)
    shifted = w.op("math.fma", vector, factor, w.lanes(ROUNDER, kind), kind=kind)
    bits = w.cast("arith.bitcast", shifted, kind, words)
    code = w.op("arith.subi", bits, w.lanes(ROUNDER_BITS, words), kind=words)
    return w.op("arith.minsi", code, w.lanes(kept.most - 1, words), kind=words) if kept.bits == 4 else code
