"""Matrix products for AVX-512: prepare rows of activations, multiply them by a panel of weights in each format.

Integers meet in `vpdpbusd`, which adds four products of unsigned weights and signed activations per lane without
saturation: sum(w*x) = sum((w+128)*x) - 128*sum(x). Floating-point weights are widened to f32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llmbuild.kernels import shared_exponent as shared
from llmbuild.kernels.elementwise import HALVES, LANES, Reader
from llmbuild.kernels.instructions import Instructions, Sums
from llmbuild.kernels.layouts import LINE, PANEL, QUAD, Layout
from llmbuild.kernels.text import BYTES, F32, I32, VF, VI, Writer

BLOCKS = PANEL // LANES
ROW_TILE = 6
"""Rows that share one pass over a panel: 6 rows x 4 blocks of accumulators, 4 of weights and 1 of activations fit
32 registers.
"""
ROUNDER, ROUNDER_BITS = 12582912.0, 0x4B400000
"""1.5 * 2^23: added to a small f32 it leaves the nearest integer in the low bits."""
SHORTS = "vector<16xi16>"


@dataclass(frozen=True)
class Panels:
    """A packed matrix: how it lies, and pointers to its data, its scales and f32[64 * panels] biases (or none)."""

    layout: Layout
    data: str
    scales: str
    bias: str | None


def prepare(w: Writer, layout: Layout, source: Reader, row: str) -> None:
    """Write a row of activations as the layout wants it.

    Bytes are `round(x * 127 / max|x|)` and their scale `max|x| / 127`.
    """
    if layout.is_shared:
        shared.prepare(w, layout, source, row)
        return
    if layout.is_half:
        w.loop(0, layout.columns, LANES, lambda i: _copy(w, source, row, i))
        return

    def widest(i: str, most: str) -> list[str]:
        return [w.larger(w.op("math.absf", source(i)), most)]

    (most,) = w.loop(0, layout.columns, LANES, widest, [(w.lanes(0.0), VF)])
    top = w.top(most)
    w.store(w.op("arith.divf", top, w.real(127.0), kind=F32), row, F32)
    safe = w.larger(top, w.real(1e-30), F32)
    factor = w.splat(w.op("arith.divf", w.real(127.0), safe, kind=F32))
    target = w.at(row, LINE + layout.sums_bytes)

    def body(i: str, total: str) -> list[str]:
        shifted = w.op("math.fma", source(i), factor, w.lanes(ROUNDER))
        bits = w.op("arith.subi", w.cast("arith.bitcast", shifted, VF, VI), w.lanes(ROUNDER_BITS, VI), kind=VI)
        w.store(w.cast("arith.trunci", bits, VI, "vector<16xi8>"), w.at(target, i), "vector<16xi8>", 1)
        return [w.op("arith.addi", bits, total, kind=VI)]

    def summed(first: int | str, stop: int | str) -> str:
        (total,) = w.loop(first, stop, LANES, body, [(w.lanes(0, VI), VI)])
        return w.total(total, VI)

    if not layout.is_nibble:
        w.store(summed(0, layout.columns), w.at(row, 4), I32)
        return

    def group(index: str) -> list[str]:
        first = w.mul(index, layout.group)
        total = summed(first, w.add(first, layout.group))
        w.store(w.op("arith.muli", total, w.constant("-8", I32), kind=I32), w.at(row, LINE, w.mul(index, 4)), I32)
        return []

    w.loop(0, layout.groups, 1, group)


def _copy(w: Writer, source: Reader, row: str, index: str) -> list[str]:
    w.store(source(index), w.at(row, w.mul(index, 4)), VF)
    return []


Epilogue = Callable[[str, str, list[str]], None]
"""Takes a row (i64), the panel's first output (i64) and the panel's four vectors of f32."""


def multiply_panel(
    w: Writer, unit: Instructions, panels: Panels, index: str, x: str, rows: str, finish: Epilogue
) -> None:
    """Multiply all prepared rows (a count, i64) by one panel: tiles of `row_tile` rows, then one by one."""
    layout, first = panels.layout, w.mul(index, PANEL)
    data = w.at(panels.data, w.mul(index, layout.panel_bytes))
    scales = w.at(panels.scales, w.mul(index, layout.scale_bytes))
    kernel = unit.kernels[layout.family]

    def tile(start: str, size: int) -> list[str]:
        taken = [w.add(start, r) for r in range(size)]
        pointers = [w.at(x, w.mul(row, layout.prepared_bytes)) for row in taken]
        sums = kernel.sums(w, layout, data, scales, pointers)
        for row, pointer, blocks in zip(taken, pointers, sums, strict=True):
            finish(row, first, _scaled(w, panels, scales, first, pointer, blocks))
        return []

    size = kernel.row_tile
    tiled = w.mul(w.integers("divui", rows, size), size)
    w.loop(0, tiled, size, lambda start: tile(start, size))
    w.loop(tiled, rows, 1, lambda start: tile(start, 1))


def _scaled(w: Writer, panels: Panels, scales: str, first: str, row: str, blocks: list[str]) -> list[str]:
    """Return the sums of one row times what scales are left for the end, plus the biases."""
    layout, reals = panels.layout, []
    whole = None if layout.is_half else w.splat(w.load(row, F32))
    for b, block in enumerate(blocks):
        factor = whole
        if layout.groups == 1:
            own = w.load(w.at(scales, 4 * b * LANES), VF)
            factor = own if whole is None else w.op("arith.mulf", own, whole)
        assert factor is not None
        if panels.bias is None:
            reals.append(w.op("arith.mulf", block, factor))
        else:
            bias = w.load(w.at(panels.bias, w.mul(w.add(first, b * LANES), 4)), VF)
            reals.append(w.op("math.fma", block, factor, bias))
    return reals


def _rows(flat: list[str]) -> Sums:
    return [flat[i : i + BLOCKS] for i in range(0, len(flat), BLOCKS)]


def _dot(w: Writer, total: str, unsigned: str, signed: str) -> str:
    return w.let(
        f'llvm.call_intrinsic "llvm.x86.avx512.vpdpbusd.512"({total}, {unsigned}, {signed}) '
        f": ({VI}, {BYTES}, {BYTES}) -> {VI}"
    )


def _quad(w: Writer, pointer: str) -> str:
    """Return four signed bytes, in every lane."""
    return w.cast("vector.bitcast", w.splat(w.load(pointer, I32, 4), VI), VI, BYTES)


def int8_sums(w: Writer, layout: Layout, data: str, _: str, rows: list[str]) -> Sums:
    """Write `Kernel.sums` for int8."""

    def body(k: str, *sums: str) -> list[str]:
        quad = w.at(data, w.mul(k, PANEL))
        blocks = [w.load(w.at(quad, b * LINE), BYTES, LINE) for b in range(BLOCKS)]
        fours = [_quad(w, w.at(row, w.add(k, LINE))) for row in rows]
        return [_dot(w, sums[r * BLOCKS + b], block, x) for r, x in enumerate(fours) for b, block in enumerate(blocks)]

    flat = w.loop(0, layout.columns, QUAD, body, [(w.lanes(0, VI), VI)] * (len(rows) * BLOCKS))
    reals = []
    for row, blocks in zip(rows, _rows(flat), strict=True):
        total = w.load(w.at(row, 4), I32)
        shift = w.splat(w.op("arith.muli", total, w.constant("128", I32), kind=I32), VI)
        reals.append([w.cast("arith.sitofp", w.op("arith.subi", b, shift, kind=VI), VI, VF) for b in blocks])
    return reals


def int4_sums(w: Writer, layout: Layout, data: str, scales: str, rows: list[str]) -> Sums:
    """Write `Kernel.sums` for int4."""
    low, four = w.constant("dense<15>", BYTES), w.constant("dense<4>", VI)

    def products(group: str) -> list[str]:
        """Return the exact sums of a group: they start from what the codes' offset of 8 adds too much."""
        starts = [w.splat(w.load(w.at(row, LINE, w.mul(group, 4)), I32), VI) for row in rows]

        def body(k: str, *sums: str) -> list[str]:
            pair, new = w.at(data, w.mul(k, PANEL // 2)), list(sums)
            places = [w.at(row, w.add(k, LINE + layout.sums_bytes)) for row in rows]
            loaded = [w.load(w.at(pair, b * LINE), VI, LINE) for b in range(BLOCKS)]
            for half in range(2):
                shifted = [w.op("arith.shrui", block, four, kind=VI) if half else block for block in loaded]
                codes = [w.op("arith.andi", w.cast("vector.bitcast", s, VI, BYTES), low, kind=BYTES) for s in shifted]
                for r, place in enumerate(places):
                    x = _quad(w, w.at(place, half * QUAD))
                    for b, block in enumerate(codes):
                        new[r * BLOCKS + b] = _dot(w, new[r * BLOCKS + b], block, x)
            return new

        first = w.mul(group, layout.group)
        carried = [(start, VI) for start in starts for _ in range(BLOCKS)]
        sums = w.loop(first, w.add(first, layout.group), 2 * QUAD, body, carried)
        return [w.cast("arith.sitofp", s, VI, VF) for s in sums]

    if layout.groups == 1:
        return _rows(products(w.integer(0)))

    def grouped(group: str, *totals: str) -> list[str]:
        exact, at = products(group), w.at(scales, w.mul(group, 2 * PANEL))
        factors = [_widened(w, w.load(w.at(at, 2 * b * LANES), SHORTS, 2 * LANES)) for b in range(BLOCKS)]
        return [w.op("math.fma", s, factors[i % BLOCKS], totals[i]) for i, s in enumerate(exact)]

    return _rows(w.loop(0, layout.groups, 1, grouped, [(w.lanes(0.0), VF)] * (len(rows) * BLOCKS)))


def _widened(w: Writer, shorts: str) -> str:
    """Return bf16 as f32."""
    bits = w.op("arith.shli", w.cast("arith.extui", shorts, SHORTS, VI), w.lanes(16, VI), kind=VI)
    return w.cast("arith.bitcast", bits, VI, VF)


def half_sums(w: Writer, layout: Layout, data: str, _: str, rows: list[str]) -> Sums:
    """Write `Kernel.sums` for floating-point weights, some columns at a time.

    A single row has sums of its own for every other column, so that none waits for another.
    """
    chains = 2 if len(rows) == 1 else 1
    size = len(rows) * BLOCKS
    columns, step = (_eight_columns, shared.STEP) if layout.is_shared else (_two_columns, 2)

    def body(k: str, *sums: str) -> list[str]:
        new, stored = list(sums), w.at(data, w.mul(k, layout.panel_bytes // layout.columns))
        for side, blocks in enumerate(columns(w, layout.form, stored)):
            for r, row in enumerate(rows):
                x = w.splat(w.load(w.at(row, layout.header_bytes, w.mul(w.add(k, side), 4)), F32))
                for b, block in enumerate(blocks):
                    place = side % chains * size + r * BLOCKS + b
                    new[place] = w.op("math.fma", block, x, new[place])
        return new

    flat = w.loop(0, layout.columns, step, body, [(w.lanes(0.0), VF)] * (chains * size))
    if chains == 2:
        flat = [w.op("arith.addf", *both) for both in zip(flat[:size], flat[size:], strict=True)]
    return _rows(flat)


def _eight_columns(w: Writer, _: str, data: str) -> Iterator[list[str]]:
    """Yield the f32 weights of eight columns, four vectors each."""
    for blocks in zip(*[shared.pairs(w, LANES, data, b) for b in range(BLOCKS)], strict=True):
        yield from (list(side) for side in zip(*[shared.split(w, LANES, pair) for pair in blocks], strict=True))


def _two_columns(w: Writer, form: str, data: str) -> Sums:
    """Return the f32 weights of two columns, four vectors each."""
    if form == "f16":
        places = [[w.at(data, 2 * (side * PANEL + b * LANES)) for b in range(BLOCKS)] for side in range(2)]
        return [[w.cast("arith.extf", w.load(p, HALVES, 2 * LANES), HALVES, VF) for p in side] for side in places]
    pairs = [w.load(w.at(data, b * LINE), VI, LINE) for b in range(BLOCKS)]
    return [list(side) for side in zip(*[shared.split(w, LANES, pair) for pair in pairs], strict=True)]
