"""Matrix products: prepare rows of activations, multiply them by a panel of weights; sums for AVX-512.

Integers meet in `vpdpbusd`, which adds four products of unsigned weights and signed activations per lane without
saturation: sum(w*x) = sum((w+128)*x) - 128*sum(x). Floating-point weights are widened to f32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from llmbuild.kernels import shared_exponent as shared
from llmbuild.kernels.elementwise import HALVES, LANES, Reader
from llmbuild.kernels.instructions import Instructions, Kernel, Sums
from llmbuild.kernels.layouts import LINE, LOW, LOW_BITS, PANEL, QUAD, Layout
from llmbuild.kernels.short import Registers
from llmbuild.kernels.text import BYTES, F32, I32, I64, PTR, VF, VI, Writer

BLOCKS = PANEL // LANES
ROW_TILE = 6
"""Rows that share one pass over a panel: 6 rows x 4 blocks of accumulators, 4 of weights and 1 of activations fit
32 registers.
"""
ROUNDER, ROUNDER_BITS = 12582912.0, 0x4B400000
"""1.5 * 2^23: added to a small f32 it leaves the nearest integer in the low bits."""
BRAINS = "vector<32xbf16>"
"""Pairs of bf16."""


@dataclass(frozen=True)
class Panels:
    """A packed matrix: how it lies, and pointers to its data, its scales and f32[64 * panels] biases (or none)."""

    layout: Layout
    data: str
    scales: str
    bias: str | None


def prepare(w: Writer, layout: Layout, source: Reader, row: str) -> None:
    """Write a row of activations as the layout wants it.

    Numbers are `round(x * most / max|x|)` and their scale `max|x| / most`, of the block of columns.
    """
    if layout.is_shared:
        shared.prepare(w, layout, source, row)
        return
    if layout.is_half:
        w.loop(0, layout.columns, LANES, lambda i: _copy(w, layout, source, row, i))
        return

    def block(index: str) -> list[str]:
        first = w.mul(index, layout.block)
        last = w.add(first, layout.block)
        factor = _factor(w, source, first, last, layout.most, w.at(row, w.mul(index, 4)))
        total = _rounded(w, layout, source, first, last, factor, row)
        _store_start(w, layout, total, row, index)
        return []

    w.loop(0, layout.blocks, 1, block)


def _factor(w: Writer, source: Reader, first: int | str, stop: int | str, highest: float, target: str) -> str:
    """Store the scale of some columns' numbers; return what to multiply the columns by, in every lane."""

    def widest(i: str, most: str) -> list[str]:
        return [w.larger(w.op("math.absf", source(i)), most)]

    (most,) = w.loop(first, stop, LANES, widest, [(w.lanes(0.0), VF)])
    top = w.top(most)
    w.store(w.op("arith.divf", top, w.real(highest), kind=F32), target, F32)
    return w.splat(w.op("arith.divf", w.real(highest), w.larger(top, w.real(1e-30), F32), kind=F32))


def _rounded(
    w: Writer, layout: Layout, source: Reader, first: int | str, stop: int | str, factor: str, row: str
) -> str:
    """Write some columns as integers; return their sum, i32."""
    target = w.at(row, layout.header_bytes)

    def store(numbers: str, place: str) -> None:
        w.store(w.cast("arith.trunci", numbers, VI, "vector<16xi8>"), place, "vector<16xi8>", 1)

    def body(i: str, total: str) -> list[str]:
        shifted = w.op("math.fma", source(i), factor, w.lanes(ROUNDER))
        bits = w.op("arith.subi", w.cast("arith.bitcast", shifted, VF, VI), w.lanes(ROUNDER_BITS, VI), kind=VI)
        if layout.wide:
            shift = w.lanes(LOW_BITS, VI)
            high = w.op("arith.shrsi", w.op("arith.addi", bits, w.lanes(LOW // 2, VI), kind=VI), shift, kind=VI)
            store(high, w.at(target, i))
            low = w.op("arith.subi", bits, w.op("arith.shli", high, shift, kind=VI), kind=VI)
            store(low, w.at(target, i, layout.plane_bytes))
        else:
            store(bits, w.at(target, i))
        return [w.op("arith.addi", bits, total, kind=VI)]

    (total,) = w.loop(first, stop, LANES, body, [(w.lanes(0, VI), VI)])
    return w.total(total, VI)


def _store_start(w: Writer, layout: Layout, total: str, row: str, block: str) -> None:
    """Store what takes the offset of a block's codes off again, or what the group's minimum is multiplied by."""
    place = w.at(row, layout.factors_bytes, w.mul(block, 4))
    if layout.has_minimum:
        scale = w.load(w.at(row, w.mul(block, 4)), F32)
        w.store(w.op("arith.mulf", w.cast("arith.sitofp", total, I32, F32), scale, kind=F32), place, F32)
        return
    w.store(w.op("arith.muli", total, w.constant(str(-layout.offset), I32), kind=I32), place, I32)


def _copy(w: Writer, layout: Layout, source: Reader, row: str, index: str) -> list[str]:
    shared.store(w, layout, source(index), row, index)
    return []


Epilogue = Callable[[str, str, list[str]], None]
"""Takes a row (i64), the panel's first output (i64) and the panel's four vectors of f32; perhaps more than once."""
LEAST = 3
"""Rows from which on a tile is better than one after the other: each of these reads the panel."""


def multiply_panel(
    w: Writer, unit: Instructions, panels: Panels, index: str, x: str, rows: str, finish: Epilogue, room: str = ""
) -> None:
    """Multiply all prepared rows (a count, i64) by one panel: tiles of `row_tile` rows, then one by one.

    `LEAST` rows or more that are left are a tile too, in which the last one is there several times: `finish` must not
    mind. With `room` for `Layout.spread_bytes`, codes that share bytes are taken apart once for all tiles.
    """
    layout, first = panels.layout, w.mul(index, PANEL)
    data = w.at(panels.data, w.mul(index, layout.panel_bytes))
    scales = w.at(panels.scales, w.mul(index, layout.scale_bytes))
    kernel = unit.kernels[layout.family]

    def tile(start: str, size: int, lies: Layout, data: str, coming: str) -> list[str]:
        taken = [w.integers("minsi", w.add(start, r), w.add(rows, -1)) if r else start for r in range(size)]
        pointers = [w.at(x, w.mul(row, layout.prepared_bytes)) for row in taken]
        sums = _sums(w, kernel, lies, data, scales, pointers, coming)
        for row, pointer, blocks in zip(taken, pointers, sums, strict=True):
            finish(row, first, _scaled(w, panels, scales, first, pointer, blocks))
        return []

    size = kernel.row_tile
    behind = w.at(data, layout.panel_bytes)
    whole = w.mul(w.integers("divui", rows, size), size)
    few = w.below(w.integers("subi", rows, whole), LEAST)
    tiled = w.let(f"arith.select {few}, {whole}, {rows} : {I64}")
    if kernel.spread is not None and layout.spread_bytes and room:
        with w.when(w.below(0, tiled)):
            kernel.spread(w, layout, data, room)
        w.loop(0, tiled, size, lambda start: tile(start, size, replace(layout, spread=True), room, behind))
    else:
        w.loop(0, tiled, size, lambda start: tile(start, size, layout, data, behind))
    soon = w.at(data, unit.kernels[layout.family].ahead)
    w.loop(tiled, rows, 1, lambda start: tile(start, 1, layout, data, soon))


def _sums(w: Writer, kernel: Kernel, layout: Layout, data: str, scales: str, rows: list[str], coming: str) -> Sums:
    """Return the sums of rows by a function of their own, which all matrices that lie alike share: they are most of a
    kernel's text, and the compiler takes long over it.
    """
    names = ["%data", "%scales", "%out", "%coming", *(f"%row{r}" for r in range(len(rows)))]
    places = [[(r * BLOCKS + b) * LINE for b in range(BLOCKS)] for r in range(len(rows))]

    def body(own: Writer) -> None:
        for row, blocks in zip(places, kernel.sums(own, layout, names[0], names[1], names[4:], names[3]), strict=True):
            for place, block in zip(row, blocks, strict=True):
                own.store(block, own.at(names[2], place), VF, LINE)

    out = w.room(len(rows) * BLOCKS * LINE)
    function = w.function((layout, len(rows)), names, body)
    w.call(function, *((pointer, PTR) for pointer in (data, scales, out, coming, *rows)))
    return [[w.load(w.at(out, place), VF, LINE) for place in row] for row in places]


def _scaled(w: Writer, panels: Panels, scales: str, first: str, row: str, blocks: list[str]) -> list[str]:
    """Return the sums of one row times what scales are left for the end, plus the biases."""
    layout, reals = panels.layout, []
    whole = w.splat(w.load(row, F32)) if layout.is_shared else None
    for b, block in enumerate(blocks):
        factor = whole
        if layout.row_scales is not None:
            own = w.load(w.at(scales, layout.row_scales + 4 * b * LANES), VF)
            factor = own if whole is None else w.op("arith.mulf", own, whole)
        if panels.bias is None:
            reals.append(block if factor is None else w.op("arith.mulf", block, factor))
        else:
            bias = w.load(w.at(panels.bias, w.mul(w.add(first, b * LANES), 4)), VF)
            terms = (block, bias) if factor is None else (block, factor, bias)
            reals.append(w.op("arith.addf" if factor is None else "math.fma", *terms))
    return reals


def _rows(flat: list[str]) -> Sums:
    return [flat[i : i + BLOCKS] for i in range(0, len(flat), BLOCKS)]


def _dot(w: Writer, total: str, unsigned: str, signed: str) -> str:
    return w.let(
        f'llvm.call_intrinsic "llvm.x86.avx512.vpdpbusd.512"({total}, {unsigned}, {signed}) '
        f": ({VI}, {BYTES}, {BYTES}) -> {VI}"
    )


AVX512 = Registers(LANES, True, _dot, _dot)


def half_sums(w: Writer, layout: Layout, data: str, _: str, rows: list[str], __: str) -> Sums:
    """Write `Kernel.sums` for floating-point weights, some columns at a time: a row is summed as it is in a tile."""
    columns, step = (_eight_columns, shared.STEP) if layout.is_shared else (_two_columns, 2)

    def body(k: str, *sums: str) -> list[str]:
        new, stored = list(sums), w.at(data, w.mul(k, layout.panel_bytes // layout.columns))
        for side, blocks in enumerate(columns(w, layout.form, stored)):
            for r, row in enumerate(rows):
                x = w.splat(w.load(w.at(row, layout.header_bytes, w.mul(w.add(k, side), 4)), F32))
                for b, block in enumerate(blocks):
                    place = r * BLOCKS + b
                    new[place] = w.op("math.fma", block, x, new[place])
        return new

    return _rows(w.loop(0, layout.columns, step, body, [(w.lanes(0.0), VF)] * (len(rows) * BLOCKS)))


def pair_sums(w: Writer, layout: Layout, data: str, _: str, rows: list[str], __: str) -> Sums:
    """Write `Kernel.sums` for pairs of bf16, which `vdpbf16ps` multiplies by pairs of activations and adds in f32."""
    step = shared.STEP if layout.is_shared else 4

    def body(k: str, *sums: str) -> list[str]:
        new, stored = list(sums), w.at(data, w.mul(k, layout.panel_bytes // layout.columns))
        for place, blocks in enumerate(_pairs(w, layout, stored)):
            for r, row in enumerate(rows):
                x = w.splat(w.load(w.at(row, layout.header_bytes, w.mul(w.add(k, 2 * place), 2)), I32), VI)
                for b, block in enumerate(blocks):
                    at = r * BLOCKS + b
                    new[at] = _dot_pairs(w, new[at], block, x)
        return new

    return _rows(w.loop(0, layout.columns, step, body, [(w.lanes(0.0), VF)] * (len(rows) * BLOCKS)))


def _pairs(w: Writer, layout: Layout, data: str) -> Iterator[list[str]]:
    """Yield pairs of bf16 of columns that lie together, four vectors each."""
    if layout.is_shared:
        loaded = shared.loaded(w, LANES, data, range(BLOCKS))
        yield from (list(blocks) for blocks in zip(*[shared.pairs(w, LANES, part) for part in loaded], strict=True))
    else:
        for pair in range(2):
            yield [w.load(w.at(data, pair * QUAD * PANEL + b * LINE), VI, LINE) for b in range(BLOCKS)]


def _dot_pairs(w: Writer, total: str, weights: str, activations: str) -> str:
    left, right = (w.cast("vector.bitcast", pairs, VI, BRAINS) for pairs in (weights, activations))
    return w.let(
        f'llvm.call_intrinsic "llvm.x86.avx512bf16.dpbf16ps.512"({total}, {left}, {right}) '
        f": ({VF}, {BRAINS}, {BRAINS}) -> {VF}"
    )


def _eight_columns(w: Writer, _: str, data: str) -> Iterator[list[str]]:
    """Yield the f32 weights of eight columns, four vectors each."""
    loaded = shared.loaded(w, LANES, data, range(BLOCKS))
    for blocks in zip(*[shared.pairs(w, LANES, part) for part in loaded], strict=True):
        yield from (list(side) for side in zip(*[shared.split(w, LANES, pair) for pair in blocks], strict=True))


def _two_columns(w: Writer, form: str, data: str) -> Sums:
    """Return the f32 weights of two columns, four vectors each."""
    if form == "f16":
        places = [[w.at(data, 2 * (side * PANEL + b * LANES)) for b in range(BLOCKS)] for side in range(2)]
        return [[w.cast("arith.extf", w.load(p, HALVES, 2 * LANES), HALVES, VF) for p in side] for side in places]
    pairs = [w.load(w.at(data, b * LINE), VI, LINE) for b in range(BLOCKS)]
    return [list(side) for side in zip(*[shared.split(w, LANES, pair) for pair in pairs], strict=True)]
