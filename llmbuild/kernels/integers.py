"""Products with panels of integers, in registers of any length: each block of a row's columns has a scale of its own.

The exact sums of a block, times the scale of the row's block and that of the weights' group, are added up in f32; where
groups have a minimum, also that times the sum of the row's numbers there. Scales of whole rows of weights are left for
the end, and so is what a row's scales in bytes are multiplied by. A block is straight code: its sums never wait for a
counter.
"""

from __future__ import annotations

from collections.abc import Callable

from llmbuild.kernels.instructions import Sums
from llmbuild.kernels.layouts import LOW_BITS, PANEL, QUAD, Codes, Layout
from llmbuild.kernels.short import LANES, Pairs, Registers, SumsOf, as_reals, by_row, joined, quad, share
from llmbuild.kernels.text import F32, I32, Writer

SHARING = 2
"""Registers of a panel that several rows take at a time: their sums, exact and in f32, stay in registers."""
ALONE = 4
"""Registers whose block a single row sums at a time, beside the f32 sums of a whole panel; half as many for two bytes
where registers are few. Fewer at a time are slower: panels are read in pieces that lie apart."""
Place = tuple[int, int, int]
"""Where a sum belongs: which byte of activations (0 counts 1), row, register of the panel."""


def sums(unit: Registers) -> SumsOf:
    """Return `Kernel.sums` for all formats of integers."""

    def of_panel(w: Writer, layout: Layout, data: str, scales: str, rows: list[str], coming: str) -> Sums:
        count = PANEL // unit.lanes
        each = count if len(rows) == 1 else SHARING
        passes = [range(first, first + each) for first in range(0, count, each)]
        found = [_one_pass(w, unit, layout, data, scales, rows, registers, coming) for registers in passes]
        together = LANES // unit.lanes
        flat = [[register for part in found for register in part[r]] for r in range(len(rows))]
        return [[joined(w, unit.lanes, row[i : i + together]) for i in range(0, count, together)] for row in flat]

    return of_panel


def _one_pass(
    w: Writer,
    unit: Registers,
    layout: Layout,
    data: str,
    scales: str,
    rows: list[str],
    registers: range,
    coming: str,
) -> Sums:
    """Return sums f32 of some registers of a panel for each row; ask for weights to come as fast as they are read."""
    size = len(registers) if len(rows) > 1 else ALONE if unit.many else ALONE // layout.planes
    parts = [registers[i : i + size] for i in range(0, len(registers), size)]

    asked = layout.block * PANEL * layout.bits // 8

    def body(index: str, *old: str) -> list[str]:
        if unit.ahead:
            share(w, w.at(coming, w.mul(index, asked)), asked, registers, unit.lanes)
        block, group = Block(w, unit, layout, data, rows, index), Group(w, unit, layout, scales, index)
        totals = dict(zip([(r, register) for r in range(len(rows)) for register in registers], old, strict=True))
        for part in parts:
            for place, exact in block.exact(part).items():
                totals[place] = block.scaled(group, *place, exact, totals[place])
        return list(totals.values())

    carried = [(w.lanes(0.0, unit.reals), unit.reals)] * (len(rows) * len(registers))
    return by_row(w.loop(0, layout.blocks, 1, body, carried), len(registers))


def spread(unit: Registers) -> Callable[[Writer, Layout, str, str], None]:
    """Return `Kernel.spread` for all formats of integers that share bytes."""

    def of_panel(w: Writer, layout: Layout, data: str, room: str) -> None:
        codes, line = layout.codes, QUAD * PANEL

        def body(turn: str) -> list[str]:
            stored, place = (
                w.at(base, w.mul(turn, n * line)) for base, n in ((data, codes.bytes_), (room, codes.quads))
            )
            for register in range(PANEL // unit.lanes):
                first = register * QUAD * unit.lanes
                for number, code in enumerate(stored_codes(w, unit, codes, w.at(stored, first))):
                    w.store(code, w.at(place, number * line + first), unit.bytes_, QUAD * unit.lanes)
            return []

        w.loop(0, layout.columns // codes.columns, 1, body)

    return of_panel


def stored_codes(w: Writer, unit: Registers, codes: Codes, place: str) -> list[str]:
    """Return bytes of four columns each, those of the quads that lie together from a place on."""
    kind = unit.bytes_ if codes.bits == 8 else unit.integers
    stored = [w.load(w.at(place, i * QUAD * PANEL), kind, QUAD * unit.lanes) for i in range(codes.bytes_)]
    return stored if codes.bits == 8 else [_quad_codes(w, unit, codes, stored, i) for i in range(codes.quads)]


def _quad_codes(w: Writer, unit: Registers, codes: Codes, stored: list[str], number: int) -> str:
    """Return the codes of one quad, put together from the bits of bytes."""
    found = ""
    for piece in codes.pieces(number):
        moved, far = stored[piece.byte], piece.start - piece.place
        if far:
            operation = "arith.shrui" if far > 0 else "arith.shli"
            moved = w.op(operation, moved, w.lanes(abs(far), unit.integers), kind=unit.integers)
        mask = w.lanes(piece.mask << piece.place, unit.bytes_)
        part = w.op("arith.andi", w.cast("vector.bitcast", moved, unit.integers, unit.bytes_), mask, kind=unit.bytes_)
        found = w.op("arith.ori", found, part, kind=unit.bytes_) if found else part
    return found


class Group:
    """Loads the scales and minima of the group of weights that a block (i64) is part of, each once."""

    def __init__(self, w: Writer, unit: Registers, layout: Layout, scales: str, block: str) -> None:
        self.w, self.unit, self.layout = w, unit, layout
        self._scales, self._loaded = "", dict[int, str]()
        if not layout.by_row:
            each = layout.group // layout.block
            number = block if each == 1 else w.integers("divui", block, each)
            of_group = layout.scale_size * PANEL * layout.scales // layout.groups
            self._scales = w.at(scales, w.mul(number, of_group))

    def scale(self, register: int) -> str:
        """Return the scales of a register's rows, f32."""
        return self._stored(register * self.unit.lanes)

    def minimum(self, register: int) -> str:
        """Return the minima of a register's rows, f32."""
        return self._stored(PANEL + register * self.unit.lanes)

    def _stored(self, first: int) -> str:
        """Return numbers of the group from one on, as f32."""
        if first not in self._loaded:
            place = self.w.at(self._scales, self.layout.scale_size * first)
            load = {"f16": self._half, "bf16": self._brain, "i8": self._byte}[self.layout.scale_element]
            self._loaded[first] = load(place)
        return self._loaded[first]

    def _half(self, place: str) -> str:
        w, lanes = self.w, self.unit.lanes
        halves = f"vector<{lanes}xf16>"
        return w.cast("arith.extf", w.load(place, halves, 2 * lanes), halves, self.unit.reals)

    def _brain(self, place: str) -> str:
        w, lanes, integers = self.w, self.unit.lanes, self.unit.integers
        shorts = f"vector<{lanes}xi16>"
        wide = w.cast("arith.extui", w.load(place, shorts, 2 * lanes), shorts, integers)
        bits = w.op("arith.shli", wide, w.lanes(16, integers), kind=integers)
        return w.cast("arith.bitcast", bits, integers, self.unit.reals)

    def _byte(self, place: str) -> str:
        w, lanes, integers = self.w, self.unit.lanes, self.unit.integers
        bytes_ = f"vector<{lanes}xi8>"
        wide = w.cast("arith.extsi", w.load(place, bytes_, lanes), bytes_, integers)
        return w.cast("arith.sitofp", wide, integers, self.unit.reals)


class Exact:
    """Sums of products by place, in lanes of 32 bits; products of codes are added up in 16 bits as long as they fit."""

    def __init__(self, w: Writer, unit: Registers, bits: int, sums: dict[Place, str]) -> None:
        self._w, self._unit, self._bits, self._sums = w, unit, bits, dict(sums)
        self._pairs = unit.pairs if bits < 8 else None
        self._waiting: dict[Place, tuple[int, str]] = {}
        """Sums in lanes of 16 bits, and how many products they are of."""

    def add(self, place: Place, codes: list[str], x: list[str]) -> None:
        """Add products of codes, or of weights of 8 bits, and activations to the sums of a place."""
        for both in zip(codes, x, strict=True):
            if self._pairs is None:
                dot = self._unit.dot if self._bits == 8 else self._unit.dot_codes
                self._sums[place] = self._kept(dot(self._w, self._sums[place], *both), self._unit.integers)
            else:
                self._add_pairs(self._pairs, place, self._pairs.multiply(self._w, *both))

    def sums(self) -> dict[Place, str]:
        """Return all sums."""
        for place in list(self._waiting):
            self._widen(place)
        return self._sums

    def _add_pairs(self, pairs: Pairs, place: Place, product: str) -> None:
        count, sums = self._waiting.get(place, (0, ""))
        added = pairs.add(self._w, sums, product) if count else product
        self._waiting[place] = count + 1, self._kept(added, pairs.kind)
        if count + 1 == pairs.together(self._bits):
            self._widen(place)

    def _kept(self, sums: str, kind: str) -> str:
        """Return sums that are there before what is written behind them is computed, where registers are few."""
        if not self._unit.pinned:
            return sums
        constraint = f"={self._unit.pinned},0"
        return self._w.let(f'llvm.inline_asm has_side_effects "", "{constraint}" {sums} : ({kind}) -> {kind}')

    def _widen(self, place: Place) -> None:
        _, sums = self._waiting.pop(place)
        if self._pairs is not None:
            self._sums[place] = self._pairs.widen(self._w, self._sums[place], sums)


class Block:
    """Writes what becomes of one block of columns, by its number (i64)."""

    def __init__(self, w: Writer, unit: Registers, layout: Layout, data: str, rows: list[str], index: str) -> None:
        self.w, self.unit, self.layout = w, unit, layout
        self.data = w.at(data, w.mul(index, layout.block * PANEL * layout.codes.bits // 8))
        self.values = [w.at(row, w.add(w.mul(index, layout.block), layout.header_bytes)) for row in rows]
        self.factors = [w.at(row, w.mul(index, 4)) for row in rows]
        self.sums = [w.at(factor, layout.factors_bytes) for factor in self.factors]
        self._of_rows: dict[tuple[str, int], str] = {}

    def exact(self, registers: range) -> dict[tuple[int, int], str]:
        """Return the sums of products of codes, as f32, by row and register."""
        places = [(r, register) for r in range(len(self.values)) for register in registers]
        starts = [self._start(r) for r in range(len(self.values))]
        first = {(0, *place): starts[place[0]] for place in places}
        if not self.layout.wide:
            found = self._with_products(first)
        elif len(self.values) == 1:  # both bytes at a time: codes are taken apart once
            none = self.w.lanes(0, self.unit.integers)
            both = self._with_products(first | {(1, *place): none for place in places})
            found = {(0, *place): self._both(both[1, *place], both[0, *place]) for place in places}
        else:  # one byte after the other: sums of several rows stay in registers
            none = self.w.lanes(0, self.unit.integers)
            high = self._with_products({(1, *place): none for place in places})
            found = self._with_products(
                {(0, *place): self._both(high[1, *place], first[0, *place]) for place in places}
            )
        return dict(zip(places, as_reals(self.w, self.unit, list(found.values())), strict=True))

    def _with_products(self, sums: dict[Place, str]) -> dict[Place, str]:
        """Return sums and the products of a block's codes that belong to each."""
        w, unit, codes = self.w, self.unit, self.layout.codes
        found = Exact(w, unit, self.layout.bits, sums)
        for turn in range(self.layout.block // codes.columns):
            taken: dict[int, list[str]] = {}
            quads: dict[tuple[int, int], list[str]] = {}
            for byte, r, register in sums:  # codes of a register serve all rows; quads are loaded where a row begins
                if (byte, r) not in quads:
                    values = w.at(self.values[r], turn * codes.columns + self._plane(byte))
                    quads[byte, r] = [quad(w, unit, w.at(values, QUAD * i)) for i in range(codes.quads)]
                if register not in taken:
                    first = turn * codes.bytes_ * QUAD * PANEL + register * QUAD * unit.lanes
                    taken[register] = self._codes(codes, w.at(self.data, first))
                place = byte, r, register
                found.add(place, taken[register], quads[byte, r])
        return found.sums()

    def _plane(self, byte: int) -> int:
        """Return how far from a row's first bytes those are that count 1 (0), or more (1)."""
        return self.layout.plane_bytes if self.layout.wide and byte == 0 else 0

    def _both(self, high: str, low: str) -> str:
        """Return the sum of products of two bytes from those of each."""
        w, kind = self.w, self.unit.integers
        return w.op("arith.addi", w.op("arith.shli", high, w.lanes(LOW_BITS, kind), kind=kind), low, kind=kind)

    def _codes(self, codes: Codes, place: str) -> list[str]:
        """Return bytes of four columns each, as products take them."""
        w, unit = self.w, self.unit
        found = stored_codes(w, unit, codes, place)
        if self.layout.bits < 8 or unit.shifted:
            return found
        return [w.op("arith.xori", found[0], w.lanes(-128, unit.bytes_), kind=unit.bytes_)]

    def _start(self, row: int) -> str:
        """Return what takes the offset of codes off again, where products are of codes with theirs."""
        signed = self.layout.bits == 8 and not self.unit.shifted
        if signed or not self.layout.offset:
            return self.w.lanes(0, self.unit.integers)
        return self.w.splat(self.w.load(self.sums[row], I32), self.unit.integers)

    def scaled(self, group: Group, row: int, register: int, exact: str, total: str) -> str:
        """Return a sum plus a block's own, f32."""
        w, kind = self.w, self.unit.reals
        factor = self._of_row(self.factors, row, "scale")
        if not self.layout.by_row:
            factor = w.op("arith.mulf", group.scale(register), factor, kind=kind)
        total = w.op("math.fma", exact, factor, total, kind=kind)
        if not self.layout.has_minimum:
            return total
        return w.op("math.fma", group.minimum(register), self._of_row(self.sums, row, "sum"), total, kind=kind)

    def _of_row(self, places: list[str], row: int, what: str) -> str:
        """Return a row's number, f32, in every lane."""
        if (what, row) not in self._of_rows:
            self._of_rows[what, row] = self.w.splat(self.w.load(places[row], F32), self.unit.reals)
        return self._of_rows[what, row]
