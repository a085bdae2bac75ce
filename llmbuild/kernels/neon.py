"""Products of bytes in registers of 16 bytes: `sdot` of the dot-product extension; `usdot` and `usmmla` of int8 matrix
multiplication.
"""

from __future__ import annotations

from llmbuild.kernels import integers
from llmbuild.kernels.instructions import Sums
from llmbuild.kernels.layouts import PANEL, QUAD, Layout
from llmbuild.kernels.short import LANES as BLOCK
from llmbuild.kernels.short import Registers, joined
from llmbuild.kernels.text import Writer

LANES = 4
INTEGERS, BYTES, EIGHT, REALS = "vector<4xi32>", "vector<16xi8>", "vector<8xi8>", "vector<4xf32>"


def _sdot(w: Writer, total: str, weights: str, four: str) -> str:
    return _call(w, "sdot.v4i32.v16i8", total, weights, four)


def _usdot(w: Writer, total: str, weights: str, four: str) -> str:
    return _call(w, "usdot.v4i32.v16i8", total, weights, four)


def _call(w: Writer, name: str, total: str, left: str, right: str) -> str:
    kinds = f"({INTEGERS}, {BYTES}, {BYTES}) -> {INTEGERS}"
    return w.let(f'llvm.call_intrinsic "llvm.aarch64.neon.{name}"({total}, {left}, {right}) : {kinds}')


DOTPROD = Registers(LANES, False, _sdot, _sdot)
I8MM = Registers(LANES, True, _usdot, _sdot)

_one_row = integers.sums(I8MM)
SHARING = 2
"""Registers of a panel that several rows take at a time: their sums, exact and in f32, stay in registers."""


def int8_sums_i8mm(w: Writer, layout: Layout, data: str, scales: str, rows: list[str], coming: str) -> Sums:
    """Write `Kernel.sums` for int8: one row, or numbers of two bytes, by `usdot`, an even number of rows by `usmmla`.

    That multiplies two outputs of eight columns by two rows of eight; a register of the panel has four outputs of four
    columns, so two of them change halves first.
    """
    if len(rows) == 1 or layout.wide:
        return _one_row(w, layout, data, scales, rows, coming)
    passes = [
        _one_pass(w, layout, data, rows, range(first, first + SHARING)) for first in range(0, PANEL // LANES, SHARING)
    ]
    each = BLOCK // LANES
    flat = [[register for part in passes for register in part[r]] for r in range(len(rows))]
    return [[joined(w, LANES, row[i : i + each]) for i in range(0, len(row), each)] for row in flat]


def _one_pass(w: Writer, layout: Layout, data: str, rows: list[str], registers: range) -> Sums:
    """Return the sums f32[4] of each row with some of a panel's registers."""
    pairs = len(rows) // 2

    def body(index: str, *old: str) -> list[str]:
        stored = w.at(data, w.mul(index, layout.panel_bytes // layout.blocks))
        exact = _exact(w, layout, stored, rows, registers, index)
        new = []
        for p in range(pairs):
            scale = _two(w, [w.at(row, w.mul(index, 4)) for row in rows[2 * p : 2 * p + 2]], REALS)
            mine = slice(2 * p * len(registers), 2 * (p + 1) * len(registers))
            reals = [w.cast("arith.sitofp", total, INTEGERS, REALS) for total in exact[mine]]
            new += [w.op("math.fma", r, scale, total, kind=REALS) for r, total in zip(reals, old[mine], strict=True)]
        return new

    carried = [(w.lanes(0.0, REALS), REALS)] * (2 * pairs * len(registers))
    sums, found = w.loop(0, layout.blocks, 1, body, carried), []
    for p in range(pairs):
        mine = sums[2 * p * len(registers) : 2 * (p + 1) * len(registers)]
        for order in ([0, 2, 4, 6], [1, 3, 5, 7]):
            both = zip(mine[::2], mine[1::2], strict=True)
            found.append([w.let(f"vector.shuffle {one}, {other} {order} : {REALS}, {REALS}") for one, other in both])
    return found


def _exact(w: Writer, layout: Layout, data: str, rows: list[str], registers: range, index: str) -> list[str]:
    """Return the exact sums of a block, two outputs by two rows each, by pairs of rows and then of outputs."""
    pairs, outputs = len(rows) // 2, 2 * len(registers)
    values = [w.at(row, w.add(w.mul(index, layout.block), layout.header_bytes)) for row in rows]
    starts = [w.at(row, layout.factors_bytes, w.mul(index, 4)) for row in rows]
    found = [_two(w, starts[2 * p : 2 * p + 2], INTEGERS) for p in range(pairs) for _ in range(outputs)]
    for column in range(0, layout.block, 2 * QUAD):
        x = [_two_rows(w, [w.at(value, column) for value in values[2 * p : 2 * p + 2]]) for p in range(pairs)]
        for i, register in enumerate(registers):
            places = [(column + side * QUAD) * PANEL + QUAD * LANES * register for side in range(2)]
            quads = [w.load(w.at(data, place), INTEGERS, 16) for place in places]
            for half, order in enumerate(([0, 4, 1, 5], [2, 6, 3, 7])):
                turned = w.let(f"vector.shuffle {quads[0]}, {quads[1]} {order} : {INTEGERS}, {INTEGERS}")
                weights = w.cast("vector.bitcast", turned, INTEGERS, BYTES)
                for p in range(pairs):
                    place = p * outputs + 2 * i + half
                    found[place] = _call(w, "usmmla.v4i32.v16i8", found[place], weights, x[p])
    return found


def _two_rows(w: Writer, pointers: list[str]) -> str:
    """Return eight bytes of one row and eight of another."""
    one, other = (w.load(pointer, EIGHT) for pointer in pointers)
    return w.let(f"vector.shuffle {one}, {other} {list(range(16))} : {EIGHT}, {EIGHT}")


def _two(w: Writer, pointers: list[str], kind: str) -> str:
    """Return the numbers of two rows in turn."""
    one, other = (w.splat(w.load(pointer, kind[-4:-1]), kind) for pointer in pointers)
    return w.let(f"vector.shuffle {one}, {other} [0, 4, 1, 5] : {kind}, {kind}")
