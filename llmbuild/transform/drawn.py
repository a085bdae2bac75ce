"""Random weights that are the same on every machine, and the bytes that are stored of a matrix.

They are made of integers alone until one last product, so that no library of mathematics has a say in their bits.
"""

from __future__ import annotations

import hashlib
from math import prod, sqrt

import numpy as np

from llmbuild.spec.formats import INTEGERS
from llmbuild.transform.quantized import pack_nibbles, quantize
from llmbuild.transform.weights import Array, to_bf16

PIECES = 4
"""Numbers of 16 bits that are added up for one weight: enough to be near a normal distribution."""
AT_ONCE = 1 << 18
"""Weights that are drawn at once: what that takes beside them stays in a CPU's cache, whatever the matrix."""
BLOCK = 4
"""Words that the generator makes for each of its counts, by which it is moved on."""
_SPREAD = sqrt(PIECES * (65536**2 - 1) / 12)


def draw(seed: int, name: str, shape: tuple[int, ...], spread: float) -> Array:
    """Return f32 of this shape, about normal around 0 with the standard deviation `spread`."""
    return draw_rows(seed, name, shape, spread, 0, shape[0])


def draw_rows(seed: int, name: str, shape: tuple[int, ...], spread: float, start: int, stop: int) -> Array:
    """Return the same rows f32[stop-start, ...] that `draw` returns, without those before them."""
    width = prod(shape[1:])
    first, last = start * width, stop * width
    begin = first - first % BLOCK
    stream = np.random.Philox(key=_key(seed, name))
    stream.advance(begin // BLOCK)
    drawn = np.empty(last - begin, np.float32)
    for at in range(0, len(drawn), AT_ONCE):
        part = drawn[at : at + AT_ONCE]
        words = stream.random_raw(len(part)).astype("<u8", copy=False)
        pieces = words.view("<i2").reshape(-1, PIECES)
        total = pieces[:, 0].astype(np.int32)
        for each in range(1, PIECES):  # a sum over so short an axis takes three times as long
            total += pieces[:, each]
        np.multiply(total.astype(np.float32), np.float32(spread / _SPREAD), out=part)
    return drawn[first - begin :].reshape(stop - start, *shape[1:])


def _key(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:16], "little")


def stored(dense: Array, form: str) -> dict[str, Array]:
    """Return what an archive holds of a matrix f32[N,K] in a format, row by row: `data`, `scale`, `zero`, `minimum`."""
    if form not in INTEGERS:
        return {"data": to_bf16(dense) if form == "bf16" else dense.astype({"f32": "<f4", "f16": "<f2"}[form])}
    found = quantize(dense, INTEGERS[form])
    data = pack_nibbles(found.codes) if found.bits == 4 else found.codes
    if found.halves:
        minimum = {} if found.minimum is None else {"minimum": found.minimum.astype("<f2")}
        return {"data": data, "scale": found.scale.astype("<f2"), **minimum}
    if found.zero is None and found.scale.shape[1] == 1:
        return {"data": data, "scale": found.scale[:, 0]}
    zero = {} if found.zero is None else {"zero": found.zero.astype(np.int8)}
    return {"data": data, "scale": to_bf16(found.scale), **zero}
