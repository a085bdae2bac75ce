"""How a weight matrix is quantized and laid out. Matrices are `[N, K]`: N outputs, K inputs, as torch keeps a
linear layer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

PANEL = 64
"""Rows of one panel: four AVX-512 registers of f32, so that a row of a panel is whole cache lines in every format."""

Array = NDArray[Any]


def quantize_rows(weights: Array) -> tuple[Array, Array]:
    """Return int8[N,K] in -127..127 and scales f32[N] with `weights ≈ int8 * scale`; a row of zeros has the scale 1."""
    largest = np.abs(weights).max(axis=1)
    scale = np.where(largest > 0, largest / np.float32(127), np.float32(1)).astype(np.float32)
    return np.clip(np.rint(weights / scale[:, None]), -127, 127).astype(np.int8), scale


def pad_rows(weights: Array, multiple: int = PANEL) -> Array:
    """Return the array with zero rows added until their number is a multiple."""
    missing = -len(weights) % multiple
    return np.concatenate([weights, np.zeros((missing, *weights.shape[1:]), weights.dtype)]) if missing else weights


def pad_width(array: Array, size: int) -> Array:
    """Return the array with zeros behind its last axis until that is so long."""
    missing = size - array.shape[-1]
    return np.concatenate([array, np.zeros((*array.shape[:-1], missing), array.dtype)], -1) if missing else array


def pack_panels(weights: Array) -> Array:
    """Return `[ceil(N/64), K, 64]`: what one step over K needs lies together, and one panel is one contiguous
    stream.
    """
    padded = pad_rows(weights)
    return np.ascontiguousarray(padded.reshape(-1, PANEL, weights.shape[1]).transpose(0, 2, 1))


def interleave(gate: Array, up: Array) -> Array:
    """Return rows of both in turns of 32, so that one panel has a gate row and its up row in the same lane.

    Both get zero rows until their number is a multiple of 32.
    """
    half = PANEL // 2
    pair = np.stack([pad_rows(part, half).reshape(-1, half, *part.shape[1:]) for part in (gate, up)], axis=1)
    return np.ascontiguousarray(pair.reshape(-1, *gate.shape[1:]))


def to_bf16(x: Array) -> Array:
    """Return finite f32 rounded to the nearest bf16, as u16."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(short: Array) -> Array:
    """Return f32 of bf16 given as u16."""
    return (short.astype(np.uint32) << 16).view(np.float32)
