"""Pieces of a decoder for AVX-512 but its matrix products: normalize, rotate heads, attend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llmbuild.kernels.text import F32, I32, I64, VF, VI, Writer

LANES = 16
HALVES = "vector<16xf16>"
MASKED = -1e30
MIX_STEP, MIX_CHAINS = 4, 2
"""Positions per turn of the weighted sum of values, and sums side by side: one alone would wait for its own result."""


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

    def load(self, w: Writer, position: str, element: int) -> str:
        """Return sixteen values of a position as f32."""
        place = w.at(self.base, w.add(w.mul(position, self.stride), element * (2 if self.half else 4)))
        if not self.half:
            return w.load(place, VF)
        return w.cast("arith.extf", w.load(place, HALVES, 2), HALVES, VF)


def store_cached(w: Writer, vector: str, pointer: str, half: bool) -> None:
    """Write sixteen f32 values to a cache, rounded to f16 if that is its type."""
    if half:
        w.store(w.cast("arith.truncf", vector, VF, HALVES), pointer, HALVES, 2)
    else:
        w.store(vector, pointer, VF)


def attend(
    w: Writer, query: str, keys: Cache, values: Cache, visible: str, size: int, scale: float, scores: str, out: str
) -> None:
    """Attend with one head's query f32[size] to `visible` positions (i64); `scores` is room for them, rounded up
    to 16.
    """
    parts = range(0, size, LANES)
    loaded = [w.op("arith.mulf", w.load(w.at(query, e * 4), VF), w.lanes(scale)) for e in parts]
    last = w.add(visible, -1)
    order = w.constant(f"dense<[{', '.join(str(lane) for lane in range(LANES))}]>", VI)

    def score(first: str) -> list[str]:
        sums = []
        for lane in range(LANES):
            position = w.integers("minsi", w.add(first, lane), last)
            total = w.op("arith.mulf", loaded[0], keys.load(w, position, 0))
            for e, part in zip(parts[1:], loaded[1:], strict=True):
                total = w.op("math.fma", part, keys.load(w, position, e), total)
            sums.append(total)
        left = w.splat(w.cast("arith.trunci", w.integers("subi", visible, first), I64, I32), VI)
        seen = w.let(f"arith.cmpi slt, {order}, {left} : {VI}")
        values = w.let(f"arith.select {seen}, {_lane_sums(w, sums)}, {w.lanes(MASKED)} : vector<16xi1>, {VF}")
        w.store(values, w.at(scores, w.mul(first, 4)), VF)
        return []

    w.loop(0, visible, LANES, score)
    total = _softmax(w, scores, visible)

    def mix(first: str, *sums: str) -> list[str]:
        new = list(sums)
        for step in range(MIX_STEP):
            place, chain = w.add(first, step), step % MIX_CHAINS * len(parts)
            weight = w.splat(w.load(w.at(scores, w.mul(place, 4)), F32))
            position = w.integers("minsi", place, last)
            for i, e in enumerate(parts):
                new[chain + i] = w.op("math.fma", weight, values.load(w, position, e), new[chain + i])
        return new

    mixed = w.loop(0, visible, MIX_STEP, mix, [(w.lanes(0.0), VF)] * len(parts) * MIX_CHAINS)
    inverse = w.splat(w.op("arith.divf", w.real(1.0), total, kind=F32))
    for i, e in enumerate(parts):
        both = w.op("arith.addf", mixed[i], mixed[len(parts) + i])
        w.store(w.op("arith.mulf", both, inverse), w.at(out, e * 4), VF)


def _lane_sums(w: Writer, vectors_: list[str]) -> str:
    """Return the sums of sixteen vectors, one in each lane: pairs are folded into one vector until one is left."""
    width, left = LANES // 2, vectors_
    while len(left) > 1:
        blocks = range(0, LANES, 2 * width)
        low = [lane + side for block in blocks for side in (0, LANES) for lane in range(block, block + width)]
        high = [lane + width for lane in low]
        kinds = f"{VF}, {VF}"
        left = [
            w.op(
                "arith.addf",
                *(w.let(f"vector.shuffle {one}, {other} {lanes} : {kinds}") for lanes in (low, high)),
            )
            for one, other in zip(left[:width], left[width:], strict=True)
        ]
        width //= 2
    return left[0]


def _softmax(w: Writer, scores: str, visible: str) -> str:
    """Replace scores by exp(score - largest) and return their sum f32; lanes past the end hold `MASKED`."""
    at = vectors(w, scores)
    (most,) = w.loop(0, visible, LANES, lambda i, m: [w.larger(at(i), m)], [(w.lanes(MASKED), VF)])
    top = w.splat(w.top(most))

    def body(i: str, total: str) -> list[str]:
        grown = w.op("math.exp", w.op("arith.subf", at(i), top))
        w.store(grown, w.at(scores, w.mul(i, 4)), VF)
        return [w.op("arith.addf", grown, total)]

    (total,) = w.loop(0, visible, LANES, body, [(w.lanes(0.0), VF)])
    return w.total(total)
