"""How scales of groups are stored: as bf16, or as bytes times a power of two that the groups of a row share."""

from __future__ import annotations

import numpy as np

from llmbuild.spec.formats import Scales
from llmbuild.transform.weights import Array, from_bf16, to_bf16

MOST = 127
"""The largest of a row's bytes is 64 to 127."""
LEAST_POWER = -126
"""That of the smallest normal f32."""


def stored(scale: Array, kind: Scales) -> Array:
    """Return scales of groups f32[N,G] as they are once they were stored; bytes are never 0, whatever the scale."""
    if kind == "i8":
        codes, power = in_bytes(scale)
        return codes * power[:, None]
    return from_bf16(to_bf16(scale)) if kind == "bf16" else scale.astype(np.float16).astype(np.float32)


def in_bytes(scale: Array) -> tuple[Array, Array]:
    """Return int8[N,G] and powers of two f32[N] whose products are about the scales f32[N,G], and these very ones if
    they are such products.

    A scale is off by 2^-7 of the largest of its row at most, or by 2^-6 where it was next to 0, which no byte is.
    """
    largest = np.abs(scale).max(axis=1)
    power = np.ldexp(np.float32(1), np.maximum(np.frexp(largest)[1] - 7, LEAST_POWER)).astype(np.float32)
    codes = np.clip(np.rint(scale / power[:, None]), -MOST, MOST)
    return np.where(codes == 0, np.copysign(1, scale), codes).astype(np.int8), power
