"""How a weight matrix is quantized and laid out. Matrices are `[N, K]`: N outputs, K inputs, as torch keeps a linear layer."""

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


def pack_panels(weights: Array) -> Array:
    """Return `[ceil(N/64), K, 64]`: what one step over K needs lies together, and one panel is one contiguous stream."""
    padded = pad_rows(weights)
    return np.ascontiguousarray(padded.reshape(-1, PANEL, weights.shape[1]).transpose(0, 2, 1))
