"""Pieces of a decoder but its matrix products: normalize, rotate heads, attend.

Only attention is written for the length of registers: it holds many sums at a time. All else is in vectors of sixteen
lanes, which the compiler splits where registers are shorter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from math import gcd

from llmbuild.kernels.text import F32, VF, Writer

LANES = 16
HALVES = "vector<16xf16>"


Reader = Callable[[str], str]
"""Gives the sixteen f32 values at an element offset (i64)."""


def vectors(w: Writer, pointer: str) -> Reader:
    """Return a reader of f32 values in memory."""
    return lambda i: w.load(w.at(pointer, w.mul(i, 4)), VF)


def inverse_norm(w: Writer, source: Reader, size: int, epsilon: float, width: int = 0) -> str:
    """Return 1 / sqrt(mean of squares + epsilon) as f32, of `size` values; `width` counts the zeros behind them too."""

    def body(i: str, total: str) -> list[str]:
        x = source(i)
        return [w.op("math.fma", x, x, total)]

    (total,) = w.loop(0, width or size, LANES, body, [(w.lanes(0.0), VF)])
    return _inverse_root(w, w.total(total), size, epsilon)


def _inverse_root(w: Writer, total: str, size: int, epsilon: float) -> str:
    mean = w.op("arith.divf", total, w.real(float(size)), kind=F32)
    root = w.op("math.sqrt", w.op("arith.addf", mean, w.real(epsilon), kind=F32), kind=F32)
    return w.op("arith.divf", w.real(1.0), root, kind=F32)


def _sigmoid(w: Writer, gate: str, inner: str) -> str:
    """Return `gate / (1 + exp(-inner))`."""
    grown = w.op("math.exp", w.op("arith.subf", w.lanes(0.0), inner))
    return w.op("arith.divf", gate, w.op("arith.addf", grown, w.lanes(1.0)))


def _gelu(w: Writer, gate: str) -> str:
    """Return `gate * (1 + erf(gate / sqrt(2))) / 2`."""
    error = w.op("math.erf", w.op("arith.mulf", gate, w.lanes(math.sqrt(0.5))))
    return w.op("arith.mulf", gate, w.op("math.fma", error, w.lanes(0.5), w.lanes(0.5)))


def _gelu_tanh(w: Writer, gate: str) -> str:
    """Return `gate * (1 + tanh(u)) / 2` of `u = sqrt(2 / pi) * (gate + 0.044715 * gate^3)`, by a sigmoid of 2u."""
    square = w.op("arith.mulf", gate, gate)
    double = 2 * math.sqrt(2 / math.pi)
    factor = w.op("math.fma", square, w.lanes(0.044715 * double), w.lanes(double))
    return _sigmoid(w, gate, w.op("arith.mulf", gate, factor))


def _relu(w: Writer, gate: str) -> str:
    return w.larger(gate, w.lanes(0.0))


def _relu_squared(w: Writer, gate: str) -> str:
    positive = _relu(w, gate)
    return w.op("arith.mulf", positive, positive)


QUICK = 1.702
"""What a sigmoid's input is multiplied by to be near GELU."""

ACTIVATIONS: dict[str, Callable[[Writer, str], str]] = {
    "silu": lambda w, gate: _sigmoid(w, gate, gate),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "gelu_quick": lambda w, gate: _sigmoid(w, gate, w.op("arith.mulf", gate, w.lanes(QUICK))),
    "relu": _relu,
    "relu_squared": _relu_squared,
}
"""What is done with sixteen values of a gate, before they are multiplied by those of `up`."""


def normal_head(w: Writer, source: str, weight: str, size: int, epsilon: float) -> None:
    """Normalize one head f32[size] in place and multiply it by the weight."""
    lanes = gcd(size, LANES)
    kind, places = vector(lanes), range(0, size, lanes)
    loaded = [w.load(w.at(source, e * 4), kind) for e in places]
    total = w.lanes(0.0, kind)
    for x in loaded:
        total = w.op("math.fma", x, x, total, kind=kind)
    factor = w.splat(_inverse_root(w, w.total(total, kind), size, epsilon), kind)
    for e, x in zip(places, loaded, strict=True):
        normal = w.op("arith.mulf", x, factor, kind=kind)
        w.store(w.op("arith.mulf", normal, w.load(w.at(weight, e * 4), kind), kind=kind), w.at(source, e * 4), kind)


def rotated(w: Writer, source: str, cosine: str, sine: str, size: int) -> list[tuple[int, str]]:
    """Return one head f32[size] rotated, `x * cos + turned(x) * sin`: as many values for each place in it as
    `head_vector` has.
    """
    half, kind, done = size // 2, head_vector(size), []
    for i in range(0, half, gcd(half, LANES)):
        low, high = w.load(w.at(source, i * 4), kind), w.load(w.at(source, (half + i) * 4), kind)
        for place, x, turned in ((i, low, w.op("arith.negf", high, kind=kind)), (half + i, high, low)):
            c, s = w.load(w.at(cosine, place * 4), kind), w.load(w.at(sine, place * 4), kind)
            done.append((place, w.op("math.fma", turned, s, w.op("arith.mulf", x, c, kind=kind), kind=kind)))
    return done


def turned(w: Writer, parts: Sequence[tuple[int, str]], kind: str, count: int) -> list[tuple[int, str]]:
    """Return the Hadamard transform, times `sqrt(count)`, of each `count` numbers of a head, a power of two.

    `parts` are the head's numbers in vectors of the type `kind` and which of them is the first. Sums are made in the
    order of their strides, so that their bits do not depend on the vectors.
    """
    lanes = int(kind.removeprefix("vector<").partition("x")[0])
    vectors = [vector for _, vector in sorted(parts)]
    for stride in (1 << bit for bit in range(count.bit_length() - 1)):
        if stride < lanes:
            vectors = [_folded(w, vector, kind, lanes, stride) for vector in vectors]
            continue
        step, made = stride // lanes, list(vectors)
        for low in (i for i in range(len(vectors)) if not i & step):
            both = vectors[low], vectors[low + step]
            made[low] = w.op("arith.addf", *both, kind=kind)
            made[low + step] = w.op("arith.subf", *both, kind=kind)
        vectors = made
    return [(i * lanes, vector) for i, vector in enumerate(vectors)]


def _folded(w: Writer, vector: str, kind: str, lanes: int, stride: int) -> str:
    """Return the sum of lanes that are `stride` apart in the lower one, and their difference in the upper one."""
    others = [lane ^ stride for lane in range(lanes)]
    signs = w.constant(f"dense<[{', '.join('-1.0' if lane & stride else '1.0' for lane in range(lanes))}]>", kind)
    moved = w.let(f"vector.shuffle {vector}, {vector} {others} : {kind}, {kind}")
    return w.op("math.fma", vector, signs, moved, kind=kind)


def times(w: Writer, parts: Sequence[tuple[int, str]], kind: str, factor: float) -> list[tuple[int, str]]:
    """Return vectors times a factor."""
    return [(first, w.op("arith.mulf", vector, w.lanes(factor, kind), kind=kind)) for first, vector in parts]


def head_vector(size: int) -> str:
    """Return the type of the vectors that half a head is whole ones of."""
    return vector(gcd(size // 2, LANES))


def vector(lanes: int) -> str:
    """Return the type of so many lanes of f32."""
    return f"vector<{lanes}x{F32}>"
