"""Attention of one head to its cache, and how results of parts of the positions become one.

Written for the length of registers: it holds many sums at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

from llmbuild.kernels.instructions import Instructions
from llmbuild.kernels.layouts import LINE, up_to
from llmbuild.kernels.text import F32, I32, I64, VF, Writer

MASKED = -1e30
MIX_STEP = 4
"""Positions per turn of the weighted sum of values, at most."""


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


def store_cached(w: Writer, values: str, pointer: str, half: bool, kind: str) -> None:
    """Write a vector of f32 to a cache, rounded to f16 if that is its type."""
    if half:
        halves = kind.replace(F32, "f16")
        w.store(w.cast("arith.truncf", values, kind, halves), pointer, halves, 2)
    else:
        w.store(values, pointer, kind)


def lanes_of(unit: Instructions, size: int) -> int:
    """Return how many values of a head are taken at a time: a register of them, or the most that divide it."""
    return gcd(unit.lanes, size)


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
    outcome: str,
) -> None:
    """Attend with one head's query f32[size] to `visible` positions (i64, more than none); `scores` is room for them,
    rounded up to 16. At `outcome` the largest score and the sum of exponentials below it are left, f32 each.
    """
    lanes = lanes_of(unit, size)
    chains = unit.mix_chains if lanes == unit.lanes else 1  # shorter vectors are more sums as they are
    vf, vi = f"vector<{lanes}xf32>", f"vector<{lanes}xi32>"
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
    top, total = _softmax(w, scores, visible, lanes)

    def mix(first: str, *sums: str) -> list[str]:
        new = list(sums)
        for step in range(turn):
            place, chain = w.add(first, step), step % chains * len(parts)
            weight = w.splat(w.load(w.at(scores, w.mul(place, 4)), F32), vf)
            position = w.integers("minsi", place, last)
            for i, e in enumerate(parts):
                value = values.load(w, position, e, vf)
                new[chain + i] = w.op("math.fma", weight, value, new[chain + i], kind=vf)
        return new

    turn = min(MIX_STEP, lanes)  # scores are known up to a multiple of the lanes
    mixed = w.loop(0, visible, turn, mix, [(w.lanes(0.0, vf), vf)] * len(parts) * chains)
    _store_mean(w, [mixed[i :: len(parts)] for i in range(len(parts))], total, out, lanes)
    w.store(top, outcome, F32)
    w.store(total, w.at(outcome, 4), F32)


def _store_mean(w: Writer, sums: Sequence[Sequence[str]], total: str, out: str, lanes: int) -> None:
    """Write weighted sums over their total weight; those of one place are added up in order."""
    kind = f"vector<{lanes}xf32>"
    inverse = w.splat(w.op("arith.divf", w.real(1.0), total, kind=F32), kind)
    for i, (whole, *more) in enumerate(sums):
        for value in more:
            whole = w.op("arith.addf", whole, value, kind=kind)
        w.store(w.op("arith.mulf", whole, inverse, kind=kind), w.at(out, i * lanes * 4), kind)


@dataclass(frozen=True)
class Parts:
    """What attention to parts of the positions came to, for one head: `count` (i64) times a result f32[size] and a
    line with its largest score and its sum.
    """

    base: str
    count: str
    size: int

    @staticmethod
    def stride(size: int) -> int:
        """Return the bytes from one part to the next."""
        return up_to(4 * size, LINE) + LINE

    def outcome(self, w: Writer, part: str) -> str:
        """Return the pointer to a part's largest score."""
        return w.at(self.base, w.mul(part, self.stride(self.size)), up_to(4 * self.size, LINE))

    def join(self, w: Writer, lanes: int, out: str) -> None:
        """Write the f32[size] that attention to all positions at once would have come to."""
        vf, places = f"vector<{lanes}xf32>", range(0, self.size, lanes)

        def larger(part: str, most: str) -> list[str]:
            return [w.larger(w.load(self.outcome(w, part), F32), most, F32)]

        (most,) = w.loop(0, self.count, 1, larger, [(w.real(MASKED), F32)])

        def body(part: str, total: str, *sums: str) -> list[str]:
            at = self.outcome(w, part)
            lower = w.op("arith.subf", w.load(at, F32), most, kind=F32)
            weight = w.op(
                "arith.mulf",
                w.op("math.exp", w.splat(lower, vf), kind=vf),
                w.splat(w.load(w.at(at, 4), F32), vf),
                kind=vf,
            )
            of = w.at(self.base, w.mul(part, self.stride(self.size)))
            grown = [
                w.op("math.fma", weight, w.load(w.at(of, e * 4), vf), s, kind=vf)
                for e, s in zip(places, sums, strict=True)
            ]
            return [w.op("arith.addf", total, weight, kind=vf), *grown]

        zero = (w.lanes(0.0, vf), vf)
        total, *sums = w.loop(0, self.count, 1, body, [zero] * (1 + len(places)))
        for e, whole in zip(places, sums, strict=True):
            w.store(w.op("arith.divf", whole, total, kind=vf), w.at(out, e * 4), vf)


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


def _softmax(w: Writer, scores: str, visible: str, lanes: int) -> tuple[str, str]:
    """Replace scores by exp(score - largest) and return the largest and their sum, f32; lanes past the end hold
    `MASKED`.
    """
    vf = f"vector<{lanes}xf32>"

    def at(i: str) -> str:
        return w.load(w.at(scores, w.mul(i, 4)), vf)

    (most,) = w.loop(0, visible, lanes, lambda i, m: [w.larger(at(i), m, vf)], [(w.lanes(MASKED, vf), vf)])
    highest = w.top(most, vf)
    top = w.splat(highest, vf)

    def body(i: str, total: str) -> list[str]:
        grown = w.op("math.exp", w.op("arith.subf", at(i), top, kind=vf), kind=vf)
        w.store(grown, w.at(scores, w.mul(i, 4)), vf)
        return [w.op("arith.addf", grown, total, kind=vf)]

    (total,) = w.loop(0, visible, lanes, body, [(w.lanes(0.0, vf), vf)])
    return highest, w.total(total, vf)
