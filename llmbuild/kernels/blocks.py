"""Products with panels in the blocks of GGUF, in registers of any length: a row's bytes have a scale for each block.

The exact sums of a block's 32 columns, times its scale and that of the row's own, are added up in f32; for `q4_1` also
its minimum times the sum of the row's numbers there. A block is straight code: its sums never wait for a counter.
"""

from __future__ import annotations

from collections.abc import Callable

from llmbuild.kernels.instructions import Sums
from llmbuild.kernels.layouts import PANEL, QUAD, Layout
from llmbuild.kernels.short import LANES, Registers, as_reals, by_row, joined, quad
from llmbuild.kernels.text import F32, I32, Writer

SHARING = 2
"""Registers of a panel that several rows take at a time: their sums, exact and in f32, stay in registers."""
ALONE = 4
"""Registers whose block a single row sums at a time, beside the f32 sums of a whole panel."""

Codes = Callable[[Writer, Registers, str], list[str]]
"""Takes a pointer to a register's part of columns that lie together; returns bytes of four columns each."""
Dot = Callable[[Writer, Registers, str, list[str], list[str]], str]
"""Takes sums, what `Codes` returns, and as many quads of activations; returns the new sums."""


def _byte(w: Writer, unit: Registers, place: str) -> list[str]:
    weights = w.load(place, unit.bytes_, 4 * unit.lanes)
    return [weights if unit.shifted else w.op("arith.xori", weights, w.lanes(-128, unit.bytes_), kind=unit.bytes_)]


def _byte_dot(w: Writer, unit: Registers, total: str, codes: list[str], x: list[str]) -> str:
    return unit.dot(w, total, codes[0], x[0])


def _halves(w: Writer, unit: Registers, place: str) -> list[str]:
    low = w.lanes(15, unit.bytes_)
    pair = w.load(place, unit.integers, 4 * unit.lanes)
    both = pair, w.op("arith.shrui", pair, w.lanes(4, unit.integers), kind=unit.integers)
    return [
        w.op("arith.andi", w.cast("vector.bitcast", half, unit.integers, unit.bytes_), low, kind=unit.bytes_)
        for half in both
    ]


def _halves_dot(w: Writer, unit: Registers, total: str, codes: list[str], x: list[str]) -> str:
    return unit.dot_codes(w, total, codes, x)


def sums(unit: Registers) -> Callable[[Writer, Layout, str, str, list[str]], Sums]:
    """Return `Kernel.sums` for `q8_0`, `q4_0` and `q4_1`."""

    def of_panel(w: Writer, layout: Layout, data: str, scales: str, rows: list[str]) -> Sums:
        count = PANEL // unit.lanes
        each = count if len(rows) == 1 else SHARING
        passes = [range(first, first + each) for first in range(0, count, each)]
        found = [_one_pass(w, unit, layout, data, scales, rows, registers) for registers in passes]
        together = LANES // unit.lanes
        flat = [[register for part in found for register in part[r]] for r in range(len(rows))]
        return [[joined(w, unit.lanes, row[i : i + together]) for i in range(0, count, together)] for row in flat]

    return of_panel


def _one_pass(
    w: Writer, unit: Registers, layout: Layout, data: str, scales: str, rows: list[str], registers: range
) -> Sums:
    """Return sums f32 of some registers of a panel for each row."""
    size = len(registers) if len(rows) > 1 else ALONE
    parts = [registers[i : i + size] for i in range(0, len(registers), size)]

    def body(index: str, *old: str) -> list[str]:
        block = Block(w, unit, layout, data, scales, rows, index)
        totals = dict(zip([(r, register) for r in range(len(rows)) for register in registers], old, strict=True))
        for part in parts:
            for place, exact in block.exact(part).items():
                totals[place] = block.scaled(*place, exact, totals[place])
        return list(totals.values())

    carried = [(w.lanes(0.0, unit.reals), unit.reals)] * (len(rows) * len(registers))
    return by_row(w.loop(0, layout.groups, 1, body, carried), len(registers))


class Block:
    """Writes what becomes of one block of columns, by its number (i64)."""

    def __init__(
        self, w: Writer, unit: Registers, layout: Layout, data: str, scales: str, rows: list[str], index: str
    ) -> None:
        self.w, self.unit, self.layout = w, unit, layout
        self.data = w.at(data, w.mul(index, layout.panel_bytes // layout.groups))
        self.scales = w.at(scales, w.mul(index, layout.scale_bytes // layout.groups))
        self.values = [w.at(row, w.add(w.mul(index, layout.group), layout.header_bytes)) for row in rows]
        self.factors = [w.at(row, w.mul(index, 4)) for row in rows]
        self.sums = [w.at(factor, layout.factors_bytes) for factor in self.factors]
        self.loaded: dict[tuple[str, int], str] = {}

    def exact(self, registers: range) -> dict[tuple[int, int], str]:
        """Return the sums of products of codes, as f32, by row and register."""
        w, unit, layout = self.w, self.unit, self.layout
        codes, dot, step = (_halves, _halves_dot, 2 * QUAD) if layout.is_nibble else (_byte, _byte_dot, QUAD)
        places = [(r, register) for r in range(len(self.values)) for register in registers]
        starts = [self._start(r) for r in range(len(self.values))]
        found = {place: starts[place[0]] for place in places}
        line = layout.panel_bytes // layout.columns
        for column in range(0, layout.group, step):
            taken: dict[int, list[str]] = {}
            quads: dict[int, list[str]] = {}
            for r, register in places:  # codes of a register serve all rows; a row's quads are loaded where it begins
                if r not in quads:
                    quads[r] = [quad(w, unit, w.at(self.values[r], column + i)) for i in range(0, step, QUAD)]
                if register not in taken:
                    taken[register] = codes(w, unit, w.at(self.data, column * line + register * QUAD * unit.lanes))
                found[r, register] = dot(w, unit, found[r, register], taken[register], quads[r])
        return dict(zip(places, as_reals(w, unit, list(found.values())), strict=True))

    def _start(self, row: int) -> str:
        """Return what takes the offset of codes off again, where products are of codes with theirs."""
        signed = not self.layout.is_nibble and not self.unit.shifted
        if signed or not self.layout.offset:
            return self.w.lanes(0, self.unit.integers)
        return self.w.splat(self.w.load(self.sums[row], I32), self.unit.integers)

    def scaled(self, row: int, register: int, exact: str, total: str) -> str:
        """Return a sum plus a block's own, f32."""
        w, kind = self.w, self.unit.reals
        factor = w.op("arith.mulf", self._scale(register), self._of_row(self.factors, row, "scale"), kind=kind)
        total = w.op("math.fma", exact, factor, total, kind=kind)
        if not self.layout.has_minimum:
            return total
        return w.op("math.fma", self._minimum(register), self._of_row(self.sums, row, "sum"), total, kind=kind)

    def _scale(self, register: int) -> str:
        return self._once("scales", register, lambda: self._stored(register * self.unit.lanes))

    def _minimum(self, register: int) -> str:
        return self._once("minima", register, lambda: self._stored(PANEL + register * self.unit.lanes))

    def _of_row(self, places: list[str], row: int, what: str) -> str:
        """Return a row's number, f32, in every lane."""
        w = self.w
        return self._once(what, row, lambda: w.splat(w.load(places[row], F32), self.unit.reals))

    def _once(self, what: str, number: int, load: Callable[[], str]) -> str:
        if (what, number) not in self.loaded:
            self.loaded[what, number] = load()
        return self.loaded[what, number]

    def _stored(self, first: int) -> str:
        """Return numbers of the block's f16 from one on, as f32."""
        w, lanes = self.w, self.unit.lanes
        halves = f"vector<{lanes}xf16>"
        return w.cast("arith.extf", w.load(w.at(self.scales, 2 * first), halves, 2 * lanes), halves, self.unit.reals)
