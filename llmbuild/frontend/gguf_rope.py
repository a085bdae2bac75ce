"""Rotary positions of a GGUF file as a config.json says them.

llama.cpp keeps the stretched positions of Llama 3 as one factor for each frequency, `rope_freqs.weight`, and drops the
four numbers that these follow from. They are found again, and taken only if the same factors follow from them.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import pi
from typing import Any

import numpy as np
from numpy.typing import NDArray

FACTORS = "rope_freqs.weight"

_PUBLISHED = (1.0, 4.0, 8192)
"""Low and high factor and context of every Llama 3 that has them."""
_TOLERANCE = 2e-6
"""How far factors may differ, relative: they are stored in f32."""


def scaling_of(factors: NDArray[np.float32], theta: float) -> dict[str, Any] | None:
    """Return the `rope_scaling` from which factors f32[D/2] follow; {} where they change nothing, None without one."""
    most = float(factors.max())
    if bool((factors == 1).all()):
        return {}
    if bool((factors == factors[0]).all()):
        return {"rope_type": "linear", "factor": most} if most > 1 else None
    if most <= 1 or not np.isfinite(factors).all():
        return None
    for low, high, context in _candidates(factors, theta, most):
        if high <= low or context < 1:
            continue
        meant = _factors(theta, len(factors), most, low, high, context)
        if np.allclose(meant, factors, rtol=_TOLERANCE, atol=0):
            return {
                "rope_type": "llama3",
                "factor": most,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": context,
            }
    return None


def _frequencies(theta: float, count: int) -> NDArray[np.float64]:
    steps = np.arange(0, 2 * count, 2, dtype=np.float32) / np.float32(2 * count)
    return np.asarray(1.0 / np.float32(theta) ** steps, np.float64)


def _factors(theta: float, count: int, factor: float, low: float, high: float, context: int) -> NDArray[np.float64]:
    """Return the factors f64[D/2] that these numbers mean."""
    wavelengths = 2 * pi / _frequencies(theta, count)
    smooth = (context / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    return np.where(wavelengths < context / high, 1.0, np.where(wavelengths > context / low, factor, between))


def _candidates(factors: NDArray[np.float32], theta: float, most: float) -> Iterator[tuple[float, float, int]]:
    """Yield what the low and high factor and the context may be.

    Between the two, `smooth` is linear in the frequency: its slope and offset give the high factor and the context for
    a low factor of 1. Other low factors say the same with other numbers.
    """
    yield _PUBLISHED
    known = factors.astype(np.float64)
    between = (known > 1) & (known < most)
    if between.sum() < 2:
        return
    smooth = (1 / known[between] - 1 / most) / (1 - 1 / most)
    slope, offset = np.polyfit(_frequencies(theta, len(known))[between] / (2 * pi), smooth, 1)
    if slope > 0 > offset:
        high = round(float(1 - 1 / offset), 4)
        yield 1.0, high, round(float(slope) * (high - 1))
