"""Pieces of a decoder but its matrix products: normalize, rotate heads, attend.

Only attention is written for the length of registers: it holds many sums at a time. All else is in vectors of sixteen
lanes, which the compiler splits where registers are shorter.
"""

from __future__ import annotations

from collections.abc import Callable

from llmbuild.kernels.text import F32, VF, Writer

LANES = 16
HALVES = "vector<16xf16>"


Reader = Callable[[str], str]
"""Gives the sixteen f32 values at an element offset (i64)."""


def vectors(w: Writer, pointer: str) -> Reader:
    """Return a reader of f32 values in memory."""
    return lambda i: w.load(w.at(pointer, w.mul(i, 4)), VF)


def inverse_norm(w: Writer, source: Reader, size: int, epsilon: float) -> str:
    """Return 1 / sqrt(mean of squares + epsilon) as f32."""

    def body(i: str, total: str) -> list[str]:
        x = source(i)
        return [w.op("math.fma", x, x, total)]

    (total,) = w.loop(0, size, LANES, body, [(w.lanes(0.0), VF)])
    mean = w.op("arith.divf", w.total(total), w.real(float(size)), kind=F32)
    root = w.op("math.sqrt", w.op("arith.addf", mean, w.real(epsilon), kind=F32), kind=F32)
    return w.op("arith.divf", w.real(1.0), root, kind=F32)


def sigmoid_gate(w: Writer, gate: str, up: str) -> str:
    """Return `gate / (1 + exp(-gate)) * up`."""
    grown = w.op("math.exp", w.op("arith.subf", w.lanes(0.0), gate))
    return w.op("arith.mulf", w.op("arith.divf", gate, w.op("arith.addf", grown, w.lanes(1.0))), up)


def rotated(w: Writer, source: str, cosine: str, sine: str, size: int) -> list[tuple[int, str]]:
    """Return one head f32[size] rotated, `x * cos + turned(x) * sin`: sixteen values for each place in it."""
    half, done = size // 2, []
    for i in range(0, half, LANES):
        low, high = w.load(w.at(source, i * 4), VF), w.load(w.at(source, (half + i) * 4), VF)
        for place, x, turned in ((i, low, w.op("arith.negf", high)), (half + i, high, low)):
            c, s = w.load(w.at(cosine, place * 4), VF), w.load(w.at(sine, place * 4), VF)
            done.append((place, w.op("math.fma", turned, s, w.op("arith.mulf", x, c))))
    return done
