"""Round a matrix so that its outputs stay near on typical inputs, not its weights: GPTQ (Frantar et al., 2022).

Columns are rounded one after another, those with the largest inputs first, and what rounding one of them changes in the
output is made good in those that are still to come.
"""

from __future__ import annotations

import numpy as np

from llmbuild.spec.formats import Format, fit_group
from llmbuild.transform.quantized import Quantized, by_group, encode, full_range
from llmbuild.transform.weights import Array

DAMPING = 0.01
"""Part of the mean of the diagonal that is added to it: inputs that hardly occur must not decide."""

SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""Parts of the full range that are tried for a scale: clipping a few weights may serve the many."""

BLOCK = 64
"""Columns after which what is still to come is corrected at once."""


def gptq(dense: Array, hessian: Array, form: Format, damping: float = DAMPING) -> Quantized:
    """Return the matrix f32[N,K] for inputs whose products sum to `hessian`, the sum of `x x^T`, f32 or f64[K,K].

    Scales are chosen before any column is rounded, so that columns may be taken in any order.
    """
    columns = dense.shape[1]
    group = fit_group(columns, form.group or columns)
    weight = np.maximum(np.diag(hessian).astype(np.float32), 0)
    scale, zero = fitting_range(dense, weight, form)
    order = np.argsort(-weight, kind="stable")
    of_column = order // group
    codes = _rounded(
        np.ascontiguousarray(dense.T[order]),
        inverse_factor(hessian[np.ix_(order, order)], damping),
        np.ascontiguousarray(scale.T)[of_column],
        None if zero is None else np.ascontiguousarray(zero.T)[of_column],
        form.bits,
    )
    placed = np.empty_like(codes)
    placed[order] = codes
    return Quantized(np.ascontiguousarray(placed.T), scale, zero, form.bits, group)


def nearest(dense: Array, weight: Array, form: Format) -> Quantized:
    """Return the matrix f32[N,K], each weight rounded to the nearest code of the range that `fitting_range` finds."""
    scale, zero = fitting_range(dense, weight, form)
    group = dense.shape[1] // scale.shape[1]
    codes = encode(by_group(dense, group), scale[..., None], None if zero is None else zero[..., None], form.bits)
    return Quantized(codes.reshape(dense.shape), scale, zero, form.bits, group)


def fitting_range(dense: Array, weight: Array, form: Format) -> tuple[Array, Array | None]:
    """Return scale and zero f32[N,K/group] of the least squared error, where column k counts `weight` f32[K] times."""
    scale, zero = full_range(dense, form)
    parts = by_group(dense, dense.shape[1] // scale.shape[1])
    shares = weight.reshape(1, scale.shape[1], -1)
    least = _error(parts, shares, scale, zero, form.bits)
    for shrink in SHRINKS[1:]:
        tried, tried_zero = full_range(dense, form, shrink)
        error = _error(parts, shares, tried, tried_zero, form.bits)
        better = error < least
        least, scale = np.where(better, error, least), np.where(better, tried, scale)
        if zero is not None and tried_zero is not None:
            zero = np.where(better, tried_zero, zero)
    return scale, zero


def _error(parts: Array, shares: Array, scale: Array, zero: Array | None, bits: int) -> Array:
    steps, origin = scale[..., None], None if zero is None else zero[..., None]
    codes = encode(parts, steps, origin, bits).astype(np.float32)
    back = (codes if origin is None else codes - origin) * steps
    return np.asarray((np.square(back - parts) * shares).sum(axis=2))


def inverse_factor(hessian: Array, damping: float = DAMPING) -> Array:
    """Return f32[K,K], the upper Cholesky factor of the damped Hessian's inverse."""
    damped = hessian.astype(np.float64)
    mean = float(np.diag(damped).mean()) or 1.0
    damped[np.diag_indices_from(damped)] += damping * mean
    return np.asarray(np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32))


def _rounded(rows: Array, factor: Array, scale: Array, zero: Array | None, bits: int) -> Array:
    """Return codes int8[K,N] of weights [K,N], which are used up, in the order of the rows."""
    codes = np.empty(rows.shape, np.int8)
    for start in range(0, len(rows), BLOCK):
        block = slice(start, min(start + BLOCK, len(rows)))
        errors = np.empty_like(rows[block])
        for k in range(block.start, block.stop):
            origin = None if zero is None else zero[k]
            codes[k] = encode(rows[k], scale[k], origin, bits)
            back = (codes[k] if origin is None else codes[k] - origin) * scale[k]
            error = (rows[k] - back) / factor[k, k]
            errors[k - start] = error
            rows[k + 1 : block.stop] -= factor[k, k + 1 : block.stop, None] * error
        rows[block.stop :] -= factor[block, block.stop :].T @ errors
    return codes
