"""Pieces of a decoder but its matrix products: normalize, rotate heads, attend.

Only attention is written for the length of registers: it holds many sums at a time. All else is in vectors of sixteen
lanes, which the compiler splits where registers are shorter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llmbuild.kernels.instructions import Instructions
from llmbuild.kernels.text import F32, I32, I64, VF, Writer

LANES = 16
HALVES = "vector<16xf16>"
MASKED = -1e30
MIX_STEP = 4
"""Positions per turn of the weighted sum of values."""


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


@dataclass(frozen=True)
class Cache:
    """One head's keys or values in a cache `[context, kv_heads, head_dim]`: pointer to its first row, bytes to the
    next.
    """

    base: str
    stride: int
    half: bool

    def load(self, w: Writer, position: str, element: int, kind: str = VF) -> str:
        """Return as many values of a position as the vector type takes, as f32."""
        place = w.at(self.base, w.add(w.mul(position, self.stride), element * (2 if self.half else 4)))
        if not self.half:
            return w.load(place, kind)
        halves = kind.replace(F32, "f16")
        return w.cast("arith.extf", w.load(place, halves, 2), halves, kind)


def store_cached(w: Writer, vector: str, pointer: str, half: bool) -> None:
    """Write sixteen f32 values to a cache, rounded to f16 if that is its type."""
    if half:
        w.store(w.cast("arith.truncf", vector, VF, HALVES), pointer, HALVES, 2)
    else:
        w.store(vector, pointer, VF)


def attend(
    w: Writer,
    unit: Instructions,
    query: str,
    keys: Cache,
    values: Cache,
    visible: str,
    size: int,
    scale: float,
    scores: str,
    out: str,
) -> None:
    """Attend with one head's query f32[size] to `visible` positions (i64); `scores` is room for them, rounded up
    to 16.
    """
    lanes, chains, vf, vi = unit.lanes, unit.mix_chains, f"vector<{unit.lanes}xf32>", f"vector<{unit.lanes}xi32>"
    parts = range(0, size, lanes)
    loaded = [w.op("arith.mulf", w.load(w.at(query, e * 4), vf), w.lanes(scale, vf), kind=vf) for e in parts]
    last = w.add(visible, -1)
    order = w.constant(f"dense<[{', '.join(str(lane) for lane in range(lanes))}]>", vi)

    def score(first: str) -> list[str]:
        sums = []
        for lane in range(lanes):
            position = w.integers("minsi", w.add(first, lane), last)
            total = w.op("arith.mulf", loaded[0], keys.load(w, position, 0, vf), kind=vf)
            for e, part in zip(parts[1:], loaded[1:], strict=True):
                total = w.op("math.fma", part, keys.load(w, position, e, vf), total, kind=vf)
            sums.append(total)
        left = w.splat(w.cast("arith.trunci", w.integers("subi", visible, first), I64, I32), vi)
        seen = w.let(f"arith.cmpi slt, {order}, {left} : {vi}")
        masked = w.lanes(MASKED, vf)
        values = w.let(f"arith.select {seen}, {_lane_sums(w, sums)}, {masked} : vector<{lanes}xi1>, {vf}")
        w.store(values, w.at(scores, w.mul(first, 4)), vf)
        return []

    w.loop(0, visible, lanes, score)
    total = _softmax(w, scores, visible, lanes)

    def mix(first: str, *sums: str) -> list[str]:
        new = list(sums)
        for step in range(MIX_STEP):
            place, chain = w.add(first, step), step % chains * len(parts)
            weight = w.splat(w.load(w.at(scores, w.mul(place, 4)), F32), vf)
            position = w.integers("minsi", place, last)
            for i, e in enumerate(parts):
                value = values.load(w, position, e, vf)
                new[chain + i] = w.op("math.fma", weight, value, new[chain + i], kind=vf)
        return new

    mixed = w.loop(0, visible, MIX_STEP, mix, [(w.lanes(0.0, vf), vf)] * len(parts) * chains)
    inverse = w.splat(w.op("arith.divf", w.real(1.0), total, kind=F32), vf)
    for i, e in enumerate(parts):
        whole = mixed[i]
        for chain in range(1, chains):
            whole = w.op("arith.addf", whole, mixed[chain * len(parts) + i], kind=vf)
        w.store(w.op("arith.mulf", whole, inverse, kind=vf), w.at(out, e * 4), vf)


def _lane_sums(w: Writer, vectors_: list[str]) -> str:
    """Return the sums of as many vectors as each has lanes, one in each lane: pairs are folded into one vector until
    one is left.
    """
    lanes, left = len(vectors_), vectors_
    kind, width = f"vector<{lanes}xf32>", lanes // 2
    while len(left) > 1:
        blocks = range(0, lanes, 2 * width)
        low = [lane + side for block in blocks for side in (0, lanes) for lane in range(block, block + width)]
        high = [lane + width for lane in low]
        left = [
            w.op(
                "arith.addf",
                *(w.let(f"vector.shuffle {one}, {other} {taken} : {kind}, {kind}") for taken in (low, high)),
                kind=kind,
            )
            for one, other in zip(left[:width], left[width:], strict=True)
        ]
        width //= 2
    return left[0]


def _softmax(w: Writer, scores: str, visible: str, lanes: int) -> str:
    """Replace scores by exp(score - largest) and return their sum f32; lanes past the end hold `MASKED`."""
    vf = f"vector<{lanes}xf32>"

    def at(i: str) -> str:
        return w.load(w.at(scores, w.mul(i, 4)), vf)

    (most,) = w.loop(0, visible, lanes, lambda i, m: [w.larger(at(i), m, vf)], [(w.lanes(MASKED, vf), vf)])
    top = w.splat(w.top(most, vf), vf)

    def body(i: str, total: str) -> list[str]:
        grown = w.op("math.exp", w.op("arith.subf", at(i), top, kind=vf), kind=vf)
        w.store(grown, w.at(scores, w.mul(i, 4)), vf)
        return [w.op("arith.addf", grown, total, kind=vf)]

    (total,) = w.loop(0, visible, lanes, body, [(w.lanes(0.0, vf), vf)])
    return w.total(total, vf)
