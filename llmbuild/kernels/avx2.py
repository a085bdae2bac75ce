"""Products of rows with a panel in registers of 32 bytes: AVX-VNNI, and AVX2 alone.

`vpmaddubsw` adds two products of an unsigned and a signed byte and saturates at sixteen bits: 255 * 127 * 2 is too
much. So weights become signed again, then their magnitude, and activations take over their signs: 128 * 127 * 2 = 32512
fits, and the sum is exact. An activation is never -128, which has no opposite; a weight may be.
"""

from __future__ import annotations

from collections.abc import Callable

from llmbuild.kernels.instructions import Sums
from llmbuild.kernels.layouts import LINE, PANEL, QUAD, Layout
from llmbuild.kernels.text import I32, VF, VI, Writer

BLOCKS = 4
HALF, HALF_LINE, PAIRS = "vector<8xi32>", "vector<32xi8>", "vector<16xi16>"
HALVES, HALF_BYTES = 2, 32
"""Registers of one block, and bytes of one."""

Dot = Callable[[Writer, str, str, str], str]
"""Adds four products to each lane: takes the sums so far, weights, and one row's four activations in every lane."""


def _dot_vnni(w: Writer, total: str, weights: str, four: str) -> str:
    return w.let(
        f'llvm.call_intrinsic "llvm.x86.avx512.vpdpbusd.256"({total}, {weights}, {four}) '
        f": ({HALF}, {HALF_LINE}, {HALF_LINE}) -> {HALF}"
    )


def _dot_avx2(w: Writer, total: str, weights: str, four: str) -> str:
    size = _call(w, "psign.b", weights, weights, HALF_LINE, HALF_LINE)
    turned = _call(w, "psign.b", four, weights, HALF_LINE, HALF_LINE)
    pairs = _call(w, "pmadd.ub.sw", size, turned, HALF_LINE, PAIRS)
    return w.op("arith.addi", _call(w, "pmadd.wd", pairs, w.lanes(1, PAIRS), PAIRS, HALF), total, kind=HALF)


def _call(w: Writer, name: str, left: str, right: str, taken: str, result: str) -> str:
    return w.let(f'llvm.call_intrinsic "llvm.x86.avx2.{name}"({left}, {right}) : ({taken}, {taken}) -> {result}')


def int8_sums_vnni(w: Writer, layout: Layout, data: str, _: str, rows: list[str]) -> Sums:
    """Write `Kernel.sums` for int8 on AVX-VNNI."""
    sums = _exact(w, _dot_vnni, False, data, rows, layout.columns)
    for row, blocks in zip(rows, sums, strict=True):
        shift = w.splat(w.op("arith.muli", w.load(w.at(row, 4), I32), w.constant("128", I32), kind=I32), VI)
        blocks[:] = [w.op("arith.subi", block, shift, kind=VI) for block in blocks]
    return _reals(w, sums)


def int8_sums(w: Writer, layout: Layout, data: str, _: str, rows: list[str]) -> Sums:
    """Write `Kernel.sums` for int8 on AVX2."""
    return _reals(w, _exact(w, _dot_avx2, True, data, rows, layout.columns))


def _reals(w: Writer, sums: Sums) -> Sums:
    return [[w.cast("arith.sitofp", block, VI, VF) for block in blocks] for blocks in sums]


def _exact(w: Writer, dot: Dot, signed: bool, panel: str, rows: list[str], columns: int) -> Sums:
    """Return the sums i32[16]: one row takes the panel in one stream, several take it block by block."""
    bytes_ = [w.at(row, LINE) for row in rows]
    if len(rows) == 1:
        return _pass(w, dot, signed, panel, bytes_, columns, BLOCKS)
    parts = [_pass(w, dot, signed, w.at(panel, b * LINE), bytes_, columns, 1) for b in range(BLOCKS)]
    return [[part[r][0] for part in parts] for r in range(len(rows))]


def _pass(w: Writer, dot: Dot, signed: bool, panel: str, rows: list[str], columns: int, blocks: int) -> Sums:
    """Return the sums i32[16] of rows with so many blocks: `rows * blocks * 2` registers hold them."""
    count = blocks * HALVES

    def body(k: str, *sums: str) -> list[str]:
        quad = w.at(panel, w.mul(k, PANEL))
        fours = [w.cast("vector.broadcast", w.load(w.at(row, k), I32, 4), I32, HALF) for row in rows]
        fours = [w.cast("vector.bitcast", four, HALF, HALF_LINE) for four in fours]
        new = list(sums)
        for i in range(count):
            weights = w.load(w.at(quad, i * HALF_BYTES), HALF_LINE, HALF_BYTES)
            if signed:
                weights = w.op("arith.xori", weights, w.lanes(-128, HALF_LINE), kind=HALF_LINE)
            for r, four in enumerate(fours):
                new[r * count + i] = dot(w, sums[r * count + i], weights, four)
        return new

    flat = w.loop(0, columns, QUAD, body, [(w.lanes(0, HALF), HALF)] * (len(rows) * count))
    return [[_whole(w, *flat[i : i + HALVES]) for i in range(r * count, (r + 1) * count, HALVES)]
            for r in range(len(rows))]  # fmt: skip


def _whole(w: Writer, low: str, high: str) -> str:
    return w.let(f"vector.shuffle {low}, {high} {list(range(16))} : {HALF}, {HALF}")
