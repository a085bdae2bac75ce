"""Keys and values as our kernels keep them in a cache, in NumPy: `kernels/kept.py` says how they lie there."""

from __future__ import annotations

import numpy as np

from llmbuild.kernels.cache import LEAST
from llmbuild.kernels.kept import Kept
from llmbuild.transform.weights import Array, from_bf16, to_bf16


def packed(kept: Kept, rows: Array) -> Array:
    """Return what a cache holds of f32[...,size]: [...,elements]."""
    if not kept.is_integer:
        return rows.astype(kept.dtype)
    codes, scales = _codes(kept, turned(rows.astype(np.float32), kept.turned))
    if kept.bits == 4:
        low, high = np.split(codes, 2, axis=-1)
        codes = (low & 15) | (high << 4)
    found = np.zeros((*rows.shape[:-1], kept.bytes), np.int8)
    found[..., : codes.shape[-1]] = codes.astype(np.int8)
    found[..., kept.code_bytes :] = to_bf16(scales).view(np.int8)
    return found


def unpacked(kept: Kept, stored: Array) -> Array:
    """Return f32[...,size] of what a cache holds, [...,elements]."""
    if not kept.is_integer:
        return stored.astype(np.float32)
    scales = from_bf16(np.ascontiguousarray(stored[..., kept.code_bytes :]).view(np.uint16))
    codes = stored[..., : kept.size * kept.bits // 8]
    if kept.bits == 4:
        codes = np.concatenate([(codes << 4) >> 4, codes >> 4], axis=-1)
    halves = codes.reshape(*codes.shape[:-1], 2, -1) * scales[..., None]
    return turned(halves.reshape(codes.shape), kept.turned) / np.float32(kept.turned)


def rounded(kept: Kept, rows: Array) -> Array:
    """Return f32[...,size] as what is read of it from a cache."""
    return unpacked(kept, packed(kept, rows))


def turned(rows: Array, count: int) -> Array:
    """Return the Hadamard transform, times `sqrt(count)`, of each `count` numbers of f32[...,size], a power of two."""
    found, stride = rows, 1
    while stride < count:
        low, high = np.moveaxis(found.reshape(*rows.shape[:-1], -1, 2, stride), -2, 0)
        found, stride = np.stack([low + high, low - high], axis=-2).reshape(rows.shape), 2 * stride
    return found


def _codes(kept: Kept, rows: Array) -> tuple[Array, Array]:
    """Return codes [...,size] as integers, and the scale f32[...,2] of each half."""
    halves = rows.reshape(*rows.shape[:-1], 2, -1)
    high, low = halves.max(axis=-1, keepdims=True), -halves.min(axis=-1, keepdims=True)
    scales = np.maximum(np.maximum(high, low), np.float32(LEAST)) / np.float32(kept.most)
    scales = ((scales.view(np.uint32) + (1 << 15)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    if kept.bits == 4:
        scales = np.where(high >= low, -scales, scales)
    codes = np.rint(halves.astype(np.float64) * (np.float32(1) / scales)).astype(np.int64)  # as fused, rounded once
    most = 127 if kept.bits == 8 else kept.most - 1
    return np.minimum(codes, most).reshape(rows.shape), scales[..., 0]
