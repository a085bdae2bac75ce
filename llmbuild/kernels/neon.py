"""Products of bytes in registers of 16 bytes: `sdot` of the dot-product extension; `usdot` and `usmmla` of int8 matrix
multiplication.
"""

from __future__ import annotations

from llmbuild.kernels.instructions import Sums
from llmbuild.kernels.layouts import LINE, PANEL, QUAD, Layout
from llmbuild.kernels.short import LANES as BLOCK
from llmbuild.kernels.short import Registers, int8_sums, joined
from llmbuild.kernels.text import I32, Writer

LANES = 4
INTEGERS, BYTES, EIGHT, REALS = "vector<4xi32>", "vector<16xi8>", "vector<8xi8>", "vector<4xf32>"


def _sdot(w: Writer, total: str, weights: str, four: str) -> str:
    return _call(w, "sdot.v4i32.v16i8", total, weights, four)


def _usdot(w: Writer, total: str, weights: str, four: str) -> str:
    return _call(w, "usdot.v4i32.v16i8", total, weights, four)


def _sdot_codes(w: Writer, total: str, codes: list[str], fours: list[str]) -> str:
    for both in zip(codes, fours, strict=True):
        total = _sdot(w, total, *both)
    return total


def _call(w: Writer, name: str, total: str, left: str, right: str) -> str:
    kinds = f"({INTEGERS}, {BYTES}, {BYTES}) -> {INTEGERS}"
    return w.let(f'llvm.call_intrinsic "llvm.aarch64.neon.{name}"({total}, {left}, {right}) : {kinds}')


DOTPROD = Registers(LANES, False, _sdot, _sdot_codes, _sdot)
I8MM = Registers(LANES, True, _usdot, _sdot_codes, _sdot)

_one_row = int8_sums(I8MM)


def int8_sums_i8mm(w: Writer, layout: Layout, data: str, scales: str, rows: list[str]) -> Sums:
    """Write `Kernel.sums` for int8: one row by `usdot`, an even number of rows by `usmmla`.

    That multiplies two outputs of eight columns by two rows of eight; a register of the panel has four outputs of four
    columns, so two of them change halves first.
    """
    if len(rows) == 1:
        return _one_row(w, layout, data, scales, rows)
    blocks = [_block(w, layout, w.at(data, LINE * b), rows) for b in range(PANEL // BLOCK)]
    return [[block[r] for block in blocks] for r in range(len(rows))]


def _block(w: Writer, layout: Layout, data: str, rows: list[str]) -> list[str]:
    """Return the sums f32[16] of each row with one block."""
    pairs, outputs = len(rows) // 2, BLOCK // 2

    def body(k: str, *old: str) -> list[str]:
        step, new = w.at(data, w.mul(k, PANEL)), list(old)
        x = [_two_rows(w, [w.at(row, w.add(k, LINE)) for row in rows[2 * p : 2 * p + 2]]) for p in range(pairs)]
        for i in range(0, outputs, 2):
            quads = [w.load(w.at(step, side * QUAD * PANEL + 8 * i), INTEGERS, 16) for side in range(2)]
            for half, order in enumerate(([0, 4, 1, 5], [2, 6, 3, 7])):
                turned = w.let(f"vector.shuffle {quads[0]}, {quads[1]} {order} : {INTEGERS}, {INTEGERS}")
                weights = w.cast("vector.bitcast", turned, INTEGERS, BYTES)
                for p in range(pairs):
                    place = p * outputs + i + half
                    new[place] = _call(w, "usmmla.v4i32.v16i8", old[place], weights, x[p])
        return new

    starts = [_two_starts(w, rows[2 * p : 2 * p + 2]) for p in range(pairs)]
    sums = w.loop(0, layout.columns, 2 * QUAD, body, [(start, INTEGERS) for start in starts for _ in range(outputs)])
    found = []
    for p in range(pairs):
        reals = [w.cast("arith.sitofp", s, INTEGERS, REALS) for s in sums[p * outputs : (p + 1) * outputs]]
        for order in ([0, 2, 4, 6], [1, 3, 5, 7]):
            both = zip(reals[::2], reals[1::2], strict=True)
            parts = [w.let(f"vector.shuffle {one}, {other} {order} : {REALS}, {REALS}") for one, other in both]
            found.append(joined(w, LANES, parts))
    return found


def _two_rows(w: Writer, pointers: list[str]) -> str:
    """Return eight bytes of one row and eight of another."""
    one, other = (w.load(pointer, EIGHT) for pointer in pointers)
    return w.let(f"vector.shuffle {one}, {other} {list(range(16))} : {EIGHT}, {EIGHT}")


def _two_starts(w: Writer, rows: list[str]) -> str:
    """Return what takes the 128 off again that were added to the weights: two rows in turn."""
    one, other = (w.op("arith.muli", w.load(w.at(row, 4), I32), w.constant("-128", I32), kind=I32) for row in rows)
    wide = w.splat(one, INTEGERS), w.splat(other, INTEGERS)
    return w.let(f"vector.shuffle {wide[0]}, {wide[1]} [0, 4, 1, 5] : {INTEGERS}, {INTEGERS}")
