"""Products with panels in registers shorter than a block: one row takes a panel in one stream, several take it block
by block, so that their sums stay in registers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llmbuild.kernels import shared_exponent as shared
from llmbuild.kernels.instructions import Sums
from llmbuild.kernels.layouts import LINE, PANEL, PERIOD, QUAD, Layout
from llmbuild.kernels.text import F32, I32, Writer

LANES = 16
CODE_REGISTERS = 8
"""Registers of int4 that one row takes at a time: with more, taking codes apart would leave none for the sums."""

SumsOf = Callable[[Writer, Layout, str, str, list[str]], Sums]
"""The type of `Kernel.sums`."""


@dataclass(frozen=True)
class Registers:
    """Registers of so many lanes of 32 bits, and what adds products of bytes to them.

    `dot(w, sums, weights, activations)` adds four products to each lane; it takes weights + 128, unsigned, where
    `shifted`, else signed ones. `dot_codes(w, sums, codes, activations)` does so for each of two: codes are 0..15.
    `dot_code` takes one, 0..127.
    """

    lanes: int
    shifted: bool
    dot: Callable[[Writer, str, str, str], str]
    dot_codes: Callable[[Writer, str, list[str], list[str]], str]
    dot_code: Callable[[Writer, str, str, str], str]

    @property
    def integers(self) -> str:
        """Type of a register of i32."""
        return f"vector<{self.lanes}xi32>"

    @property
    def reals(self) -> str:
        """Type of a register of f32."""
        return f"vector<{self.lanes}xf32>"

    @property
    def bytes_(self) -> str:
        """Type of a register of bytes."""
        return f"vector<{4 * self.lanes}xi8>"


Pass = Callable[[range], Sums]
"""Takes registers of a panel by number; returns theirs of f32 for each row."""


def by_blocks(w: Writer, lanes: int, rows: list[str], one_pass: Pass) -> Sums:
    """Return the sums f32[16] of all blocks from passes over some of a panel's registers."""
    each, count = LANES // lanes, PANEL // lanes
    if len(rows) == 1:
        found = one_pass(range(count))
    else:
        parts = [one_pass(range(first, first + each)) for first in range(0, count, each)]
        found = [[register for part in parts for register in part[r]] for r in range(len(rows))]
    return [[joined(w, lanes, row[i : i + each]) for i in range(0, count, each)] for row in found]


def joined(w: Writer, lanes: int, registers: list[str]) -> str:
    """Return one vector of registers of f32."""
    while len(registers) > 1:
        pairs = zip(registers[::2], registers[1::2], strict=True)
        kind, order = f"vector<{lanes}xf32>", list(range(2 * lanes))
        registers = [w.let(f"vector.shuffle {one}, {other} {order} : {kind}, {kind}") for one, other in pairs]
        lanes *= 2
    return registers[0]


def int8_sums(unit: Registers) -> SumsOf:
    """Return `Kernel.sums` for int8."""

    def sums(w: Writer, layout: Layout, data: str, _: str, rows: list[str]) -> Sums:
        def one_pass(registers: range) -> Sums:
            def body(k: str, *old: str) -> list[str]:
                step, new = w.at(data, w.mul(k, PANEL)), list(old)
                fours = [quad(w, unit, w.at(row, w.add(k, LINE))) for row in rows]
                for i, register in enumerate(registers):
                    weights = w.load(w.at(step, register * 4 * unit.lanes), unit.bytes_, 4 * unit.lanes)
                    if not unit.shifted:
                        weights = w.op("arith.xori", weights, w.lanes(-128, unit.bytes_), kind=unit.bytes_)
                    for r, four in enumerate(fours):
                        place = r * len(registers) + i
                        new[place] = unit.dot(w, old[place], weights, four)
                return new

            carried = [(_start(w, unit, row), unit.integers) for row in rows for _ in registers]
            return by_row(as_reals(w, unit, w.loop(0, layout.columns, QUAD, body, carried)), len(registers))

        return by_blocks(w, unit.lanes, rows, one_pass)

    return sums


def _start(w: Writer, unit: Registers, row: str) -> str:
    """Return what takes the 128 off again that were added to the weights."""
    if not unit.shifted:
        return w.lanes(0, unit.integers)
    return w.splat(w.op("arith.muli", w.load(w.at(row, 4), I32), w.constant("-128", I32), kind=I32), unit.integers)


Products = Callable[[Writer, Registers, str, list[str], list[list[str]]], list[str]]
"""Takes a pointer to a register's part of the columns that lie together, the sums of each row, and each row's quads of
activations for these columns; returns the new sums.
"""


def int4_sums(unit: Registers) -> SumsOf:
    """Return `Kernel.sums` for int4."""
    return _group_sums(unit, 2 * QUAD, _two_quads)


def int7_sums(unit: Registers) -> SumsOf:
    """Return `Kernel.sums` for int7."""
    return _group_sums(unit, PERIOD, _eight_quads)


def _two_quads(w: Writer, unit: Registers, place: str, sums: list[str], rows: list[list[str]]) -> list[str]:
    low, four = w.lanes(15, unit.bytes_), w.lanes(4, unit.integers)
    pair = w.load(place, unit.integers, 4 * unit.lanes)
    both = [pair, w.op("arith.shrui", pair, four, kind=unit.integers)]
    codes = [
        w.op("arith.andi", w.cast("vector.bitcast", half, unit.integers, unit.bytes_), low, kind=unit.bytes_)
        for half in both
    ]
    return [unit.dot_codes(w, total, codes, x) for total, x in zip(sums, rows, strict=True)]


def _eight_quads(w: Writer, unit: Registers, place: str, sums: list[str], rows: list[list[str]]) -> list[str]:
    last = w.lanes(0, unit.bytes_)
    for i in range(PERIOD // QUAD - 1):
        stored = w.load(w.at(place, i * QUAD * PANEL), unit.integers, 4 * unit.lanes)
        moved = w.op("arith.shrui", stored, w.lanes(7 - i, unit.integers), kind=unit.integers)
        own, bit = (
            w.op("arith.andi", w.cast("vector.bitcast", s, unit.integers, unit.bytes_), mask, kind=unit.bytes_)
            for s, mask in ((stored, w.lanes(127, unit.bytes_)), (moved, w.lanes(1 << i, unit.bytes_)))
        )
        sums = [unit.dot_code(w, total, own, x[i]) for total, x in zip(sums, rows, strict=True)]
        last = w.op("arith.ori", last, bit, kind=unit.bytes_)
    return [unit.dot_code(w, total, last, x[-1]) for total, x in zip(sums, rows, strict=True)]


def _group_sums(unit: Registers, step: int, products: Products) -> SumsOf:
    def sums(w: Writer, layout: Layout, data: str, scales: str, rows: list[str]) -> Sums:
        def one_pass(registers: range) -> Sums:
            parts = [registers[i : i + CODE_REGISTERS] for i in range(0, len(registers), CODE_REGISTERS)]

            def exact_sums(group: str) -> list[str]:
                return [s for part in parts for s in _group(w, unit, layout, data, rows, part, group, step, products)]

            if layout.groups == 1:
                return by_row(exact_sums(w.integer(0)), len(registers))

            def body(group: str, *totals: str) -> list[str]:
                exact = exact_sums(group)
                at = w.at(scales, w.mul(group, 2 * PANEL))
                factors = [_scales(w, unit.lanes, w.at(at, 2 * unit.lanes * register)) for register in registers]
                terms = zip(exact, _of_rows(w, unit, layout, rows, group, factors), totals, strict=True)
                return [w.op("math.fma", *term, kind=unit.reals) for term in terms]

            carried = [(w.lanes(0.0, unit.reals), unit.reals)] * (len(rows) * len(registers))
            return by_row(w.loop(0, layout.groups, 1, body, carried), len(registers))

        return by_blocks(w, unit.lanes, rows, one_pass)

    return sums


def _of_rows(w: Writer, unit: Registers, layout: Layout, rows: list[str], group: str, factors: list[str]) -> list[str]:
    """Return the scales of a group's weights for each row, times that of the row's group where there is one."""
    if not layout.in_groups:
        return factors * len(rows)
    own = [w.splat(w.load(w.at(row, w.mul(group, 4)), F32), unit.reals) for row in rows]
    return [w.op("arith.mulf", factor, scale, kind=unit.reals) for scale in own for factor in factors]


def _group(
    w: Writer,
    unit: Registers,
    layout: Layout,
    data: str,
    rows: list[str],
    registers: range,
    group: str,
    step: int,
    products: Products,
) -> list[str]:
    """Return a group's exact sums, as f32: they start from what the codes' offset adds too much."""
    starts = [w.splat(w.load(w.at(row, layout.factors_bytes, w.mul(group, 4)), I32), unit.integers) for row in rows]

    def body(k: str, *old: str) -> list[str]:
        stored, new = w.at(data, w.mul(k, layout.panel_bytes // layout.columns)), list(old)
        places = [w.at(row, w.add(k, layout.header_bytes)) for row in rows]
        quads = [[quad(w, unit, w.at(place, i)) for i in range(0, step, QUAD)] for place in places]
        for i, register in enumerate(registers):
            mine = slice(i, None, len(registers))
            new[mine] = products(w, unit, w.at(stored, register * 4 * unit.lanes), new[mine], quads)
        return new

    first = w.mul(group, layout.group)
    carried = [(start, unit.integers) for start in starts for _ in registers]
    return as_reals(w, unit, w.loop(first, w.add(first, layout.group), step, body, carried))


def half_sums(lanes: int) -> SumsOf:
    """Return `Kernel.sums` for floating-point weights: two columns at a time, or the eight that lie together."""
    reals = f"vector<{lanes}xf32>"

    def sums(w: Writer, layout: Layout, data: str, _: str, rows: list[str]) -> Sums:
        count = shared.STEP if layout.is_shared else 2

        def one_pass(registers: range) -> Sums:
            def body(k: str, *old: str) -> list[str]:
                step, new = w.at(data, w.mul(k, layout.panel_bytes // layout.columns)), list(old)
                places = [[w.at(row, layout.header_bytes, w.mul(w.add(k, c), 4)) for row in rows] for c in range(count)]
                splats = [[w.splat(w.load(place, F32), reals) for place in side] for side in places]
                for i, register in enumerate(registers):
                    for side, weights in enumerate(_columns(w, layout, step, lanes, register)):
                        for r, x in enumerate(splats[side]):
                            place = r * len(registers) + i
                            new[place] = w.op("math.fma", weights, x, new[place], kind=reals)
                return new

            carried = [(w.lanes(0.0, reals), reals)] * (len(rows) * len(registers))
            return by_row(w.loop(0, layout.columns, count, body, carried), len(registers))

        return by_blocks(w, lanes, rows, one_pass)

    return sums


def _columns(w: Writer, layout: Layout, step: str, lanes: int, register: int) -> list[str]:
    """Return a register's f32 weights of the columns that are taken at a time."""
    reals, integers, halves = f"vector<{lanes}xf32>", f"vector<{lanes}xi32>", f"vector<{lanes}xf16>"
    if layout.is_shared:
        (parts,) = shared.loaded(w, lanes, step, [register])
        return [side for pair in shared.pairs(w, lanes, parts) for side in shared.split(w, lanes, pair)]
    if layout.form == "f16":
        places = [w.at(step, 2 * (side * PANEL + register * lanes)) for side in range(2)]
        return [w.cast("arith.extf", w.load(place, halves, 2 * lanes), halves, reals) for place in places]
    return shared.split(w, lanes, w.load(w.at(step, 4 * register * lanes), integers, 4 * lanes))


def quad(w: Writer, unit: Registers, pointer: str) -> str:
    """Return four signed bytes, in every lane."""
    return w.cast("vector.bitcast", w.splat(w.load(pointer, I32, 4), unit.integers), unit.integers, unit.bytes_)


def _scales(w: Writer, lanes: int, pointer: str) -> str:
    """Return scales, stored as bf16, as f32."""
    shorts, integers = f"vector<{lanes}xi16>", f"vector<{lanes}xi32>"
    wide = w.cast("arith.extui", w.load(pointer, shorts, 2 * lanes), shorts, integers)
    bits = w.op("arith.shli", wide, w.lanes(16, integers), kind=integers)
    return w.cast("arith.bitcast", bits, integers, f"vector<{lanes}xf32>")


def as_reals(w: Writer, unit: Registers, registers: list[str]) -> list[str]:
    """Return registers of i32 as f32."""
    return [w.cast("arith.sitofp", register, unit.integers, unit.reals) for register in registers]


def by_row(flat: list[str], each: int) -> Sums:
    """Return so many of a list for each row."""
    return [flat[i : i + each] for i in range(0, len(flat), each)]
