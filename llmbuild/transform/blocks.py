"""Weights in the blocks of GGUF files, rounded as the `gguf` package does it, bit for bit.

Arrays of blocks are `[N, G, 32]`, what there is one of for each block `[N, G]`. Steps are found in f32 and stored in
f16; weights are rounded to codes by the steps as they were found.
"""

from __future__ import annotations

import numpy as np

from llmbuild.spec.formats import Format
from llmbuild.transform.weights import Array

LEAST_STEP = np.finfo(np.float32).tiny
"""What is smaller has no inverse in f32, and is 0 in f16."""

FEW_BITS = 16
"""Multiples of this in the bits of an f16 have significands of 7 bits: f16 holds 15 times the number exactly."""


def halved(x: Array) -> Array:
    """Return f32 rounded to what f16 holds."""
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(np.float32)


def widest(parts: Array, form: Format) -> tuple[Array, Array | None]:
    """Return steps and minima f32 with which the codes reach every weight; minima only for a format that has them."""
    if form.minimum:
        least = parts.min(axis=2)
        return (parts.max(axis=2) - least) / form.highest, least
    if form.bits == 8:
        return np.abs(parts).max(axis=2) / form.highest, None
    place = np.abs(parts).argmax(axis=2)[..., None]  # the weight farthest from 0 gets the code that only one side has
    return np.take_along_axis(parts, place, axis=2)[..., 0] / form.lowest, None


def nearest(parts: Array, form: Format) -> tuple[Array, Array, Array | None]:
    """Return codes int8, and scales and minima as f16 holds them."""
    step, least = widest(parts, form)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(np.abs(step) < LEAST_STEP, np.float32(0), 1 / step)[..., None]
    if least is not None:
        found = np.trunc((parts - least[..., None]) * inverse + np.float32(0.5))
    elif form.bits == 8:
        size = np.abs(parts * inverse)
        whole = np.floor(size)
        found = np.sign(parts) * (whole + (size - whole >= 0.5))
    else:
        found = np.trunc(parts * inverse + np.float32(0.5 - form.lowest)) + form.lowest
    codes = np.clip(found, form.lowest, form.highest).astype(np.int8)
    return codes, halved(step), None if least is None else halved(least)


def steps(parts: Array, form: Format, shrink: float, with_zero: bool) -> tuple[Array, Array | None]:
    """Return scales and minima as f16 holds them; with `shrink` below 1 they reach that part of the weights only.

    With `with_zero`, minima are multiples of the scales, so that a code says exactly 0; without minima, 0 does.
    """
    if form.minimum and with_zero:
        return _steps_with_zero(parts, form, shrink)
    step, least = widest(parts, form)
    return halved(step * np.float32(shrink)), None if least is None else halved(least * np.float32(shrink))


def _steps_with_zero(parts: Array, form: Format, shrink: float) -> tuple[Array, Array]:
    factor = np.float32(shrink)
    high, low = np.maximum(parts.max(axis=2), 0) * factor, np.minimum(parts.min(axis=2), 0) * factor
    bits = ((high - low) / form.highest).astype(np.float16).view(np.uint16)
    scale = (bits // FEW_BITS * FEW_BITS + FEW_BITS).astype(np.uint16).view(np.float16).astype(np.float32)
    return scale, -np.clip(np.rint(-low / scale), form.lowest, form.highest) * scale


def zero_codes(scale: Array, minimum: Array | None) -> Array:
    """Return the codes int8 that say exactly 0.

    Raises:
        ValueError: a block has none.
    """
    if minimum is None:
        return np.zeros(scale.shape, np.int8)
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.where(scale == 0, np.float32(0), np.rint(-minimum / scale))
    if (codes * scale + minimum).any():
        raise ValueError("columns of zeros have no code of their own above a minimum that is no multiple of the scale")
    return codes.astype(np.int8)
