"""Registers shorter than a block: one row takes a panel of floating-point weights in one stream, several take it block
by block, so that their sums stay in registers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llmbuild.kernels import shared_exponent as shared
from llmbuild.kernels.instructions import Sums
from llmbuild.kernels.layouts import LINE, PANEL, Layout
from llmbuild.kernels.text import F32, I32, Writer

LANES = 16
SumsOf = Callable[[Writer, Layout, str, str, list[str], str], Sums]
"""The type of `Kernel.sums`."""


Dot = Callable[[Writer, str, str, str], str]
"""Takes sums, weights and activations; returns the sums with four products more in each lane."""


@dataclass(frozen=True)
class Pairs:
    """Products of bytes that meet in lanes of 16 bits, two in each, before they are added to lanes of 32 bits.

    `multiply(w, codes, activations)` makes them, `add(w, pairs, pairs)` adds them to each other, `widen(w, sums,
    pairs)` to lanes of 32 bits.
    """

    kind: str
    multiply: Callable[[Writer, str, str], str]
    add: Callable[[Writer, str, str], str]
    widen: Callable[[Writer, str, str], str]

    @staticmethod
    def together(bits: int) -> int:
        """Return how many pairs of codes of so many bits, times activations of -127..127, sixteen bits hold."""
        return 32767 // (2 * 127 * ((1 << bits) - 1))


@dataclass(frozen=True)
class Registers:
    """Registers of so many lanes of 32 bits, and what adds products of bytes to them.

    `dot` takes weights of 8 bits: weights + 128, unsigned, where `shifted`, else signed ones. What takes codes of
    fewer bits, which are not negative, is `dot_codes`, or `pairs` where that is how they are added up.
    """

    lanes: int
    shifted: bool
    dot: Dot
    dot_codes: Dot
    pairs: Pairs | None = None
    ahead: int = 0
    """`Kernel.ahead`."""
    pinned: str = ""
    """LLVM's constraint for a register; with it, sums are computed in the order in which they are written: in its own
    order LLVM keeps more values than there are registers for.
    """

    @property
    def many(self) -> bool:
        """Whether there are 32 registers, not 16: all but AVX2, whose registers have 8 lanes."""
        return self.lanes != 8

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


def half_sums(lanes: int, ahead: int = 0) -> SumsOf:
    """Return `Kernel.sums` for floating-point weights: two columns at a time, or the eight that lie together.

    `ahead` is `Kernel.ahead`.
    """
    reals = f"vector<{lanes}xf32>"

    def sums(w: Writer, layout: Layout, data: str, _: str, rows: list[str], coming: str) -> Sums:
        count = shared.STEP if layout.is_shared else 2
        size = layout.panel_bytes // layout.columns

        def one_pass(registers: range) -> Sums:
            def body(k: str, *old: str) -> list[str]:
                step, new = w.at(data, w.mul(k, size)), list(old)
                if ahead:
                    share(w, w.at(coming, w.mul(k, size)), count * size, registers, lanes)
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


def share(w: Writer, coming: str, size: int, registers: range, lanes: int) -> None:
    """Ask for some registers' share of so many bytes."""
    share_of = size * lanes // PANEL
    first = registers[0] * share_of
    for line in range(first, first + len(registers) * share_of, LINE):
        w.prefetch(w.at(coming, line))


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


def as_reals(w: Writer, unit: Registers, registers: list[str]) -> list[str]:
    """Return registers of i32 as f32."""
    return [w.cast("arith.sitofp", register, unit.integers, unit.reals) for register in registers]


def by_row(flat: list[str], each: int) -> Sums:
    """Return so many of a list for each row."""
    return [flat[i : i + each] for i in range(0, len(flat), each)]
