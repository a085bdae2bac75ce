"""Weights of 12 bits that share the exponent of their row, rebuilt in registers of any length.

Eight columns of a row are four pairs of bf16 whose exponents are 112 too small, so that the upper four bits of each
exponent are 0. Three pairs lie as they are but for these bits, which a mask makes 0. The fourth is the exclusive or of
the three under the same mask, each moved so that its eight spare bits come to a third of the fourth's: the spare bits
are chosen for that, and what is moved along with them needs no mask of its own. These are eight operations for four
registers, where the CPU rotates and has logic with three operands.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llmbuild.kernels.elementwise import Reader
from llmbuild.kernels.layouts import LIFT, PANEL, QUAD, Layout
from llmbuild.kernels.text import F32, I32, VF, Writer

STEP = 2 * QUAD
"""Columns that lie together."""
LANES = 16
LEAST = 2.0**-100
"""A row of activations with nothing larger is divided by this instead: its own power of two may be zero."""
KEPT = -2013296641
"""Bits of a pair of bf16 that weights have, 0x87FF87FF as i32."""
MOVED = (4, 8, 12)
"""How far each stored pair is moved to the right for the fourth: the last goes round, as signs come from its bits."""


def loaded(w: Writer, lanes: int, step: str, registers: Sequence[int]) -> list[list[str]]:
    """Return the three stored pairs of each register's rows, read in the order of memory."""
    integers, line = f"vector<{lanes}xi32>", QUAD * PANEL
    parts = [
        [w.load(w.at(step, i * line + r * QUAD * lanes), integers, QUAD * lanes) for r in registers]
        for i in range(len(MOVED))
    ]
    return [list(part) for part in zip(*parts, strict=True)]


def pairs(w: Writer, lanes: int, parts: list[str]) -> Iterator[str]:
    """Yield bf16 of columns 0 and 1, 2 and 3, 4 and 5, 6 and 7 in lanes of 32 bits, of what is `loaded`."""
    integers = f"vector<{lanes}xi32>"
    kept = w.lanes(KEPT, integers)
    for part in parts:
        yield w.op("arith.andi", part, kept, kind=integers)
    first, second, third = (
        w.op("arith.shrui", part, w.lanes(far, integers), kind=integers) for part, far in zip(parts, MOVED, strict=True)
    )
    round_ = w.op("arith.shli", parts[-1], w.lanes(32 - MOVED[-1], integers), kind=integers)
    both = w.op("arith.xori", first, second, kind=integers)
    all_ = w.op("arith.xori", both, w.op("arith.ori", third, round_, kind=integers), kind=integers)
    yield w.op("arith.andi", all_, kept, kind=integers)


def split(w: Writer, lanes: int, pair: str) -> list[str]:
    """Return both bf16 of each lane of 32 bits as f32."""
    reals, integers = f"vector<{lanes}xf32>", f"vector<{lanes}xi32>"
    low = w.op("arith.shli", pair, w.lanes(16, integers), kind=integers)
    high = w.op("arith.andi", pair, w.lanes(-65536, integers), kind=integers)
    return [w.cast("arith.bitcast", bits, integers, reals) for bits in (low, high)]


def prepare(w: Writer, layout: Layout, source: Reader, row: str) -> None:
    """Write a row of activations divided by the power of two of its largest, after that, and multiplied by `LIFT`.

    Both are exact: products stay in the middle of f32 whatever the size of the activations.
    """

    def widest(i: str, most: str) -> list[str]:
        return [w.larger(w.op("math.absf", source(i)), most)]

    (most,) = w.loop(0, layout.columns, LANES, widest, [(w.lanes(0.0), VF)])
    top = w.larger(w.top(most), w.real(LEAST), F32)
    exponent = w.op("arith.andi", w.cast("arith.bitcast", top, F32, I32), w.constant("2139095040", I32), kind=I32)
    power = w.cast("arith.bitcast", exponent, I32, F32)
    w.store(power, row, F32)
    inverse = w.splat(w.op("arith.divf", w.real(1.0), power, kind=F32))

    def body(i: str) -> list[str]:
        lifted = w.op("arith.mulf", w.op("arith.mulf", source(i), inverse), w.lanes(LIFT))
        store(w, layout, lifted, row, i)
        return []

    w.loop(0, layout.columns, LANES, body)


def store(w: Writer, layout: Layout, values: str, row: str, index: str) -> None:
    """Store sixteen f32 at their place in a prepared row, as they are or rounded to bf16."""
    place = w.at(row, w.add(w.mul(index, 2 if layout.narrow else 4), layout.header_bytes))
    if not layout.narrow:
        w.store(values, place, VF)
        return
    brain = "vector<16xbf16>"
    name = "llvm.x86.avx512bf16.cvtneps2bf16.512"
    w.store(w.let(f'llvm.call_intrinsic "{name}"({values}) : ({VF}) -> {brain}'), place, brain, 2)
