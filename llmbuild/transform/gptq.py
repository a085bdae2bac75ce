"""Round a matrix so that its outputs stay near on typical inputs, not its weights: GPTQ (Frantar et al., 2022).

Columns are rounded one after another, those with the largest inputs first, and what rounding one of them changes in the
output is made good in those that are still to come.
"""

from __future__ import annotations

from operator import itemgetter

import numpy as np

from llmbuild.spec.formats import Format
from llmbuild.transform.quantized import Quantized, Steps, by_group, closest_range, full_range, group_of, matrix
from llmbuild.transform.quantized import nearest as nearest_codes
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
    weight = np.maximum(np.diag(hessian).astype(np.float32), 0)
    steps = fitting_range(dense, weight, form)
    order = np.argsort(-weight, kind="stable")
    of_column = order // group_of(dense.shape[1], form)
    codes = _rounded(
        np.ascontiguousarray(dense.T[order]),
        inverse_factor(hessian[np.ix_(order, order)], damping),
        steps.each(lambda by_groups: np.ascontiguousarray(by_groups.T)[of_column]),
    )
    placed = np.empty_like(codes)
    placed[order] = codes
    return matrix(np.ascontiguousarray(placed.T), steps)


def nearest(dense: Array, weight: Array, form: Format) -> Quantized:
    """Return the matrix f32[N,K], each weight rounded to the nearest code of the range that `fitting_range` finds."""
    return nearest_codes(dense, fitting_range(dense, weight, form))


def fitting_range(dense: Array, weight: Array, form: Format) -> Steps:
    """Return the steps of the least squared error, where column k counts `weight` f32[K] times."""
    if form.has_sides:
        return closest_range(dense, form, weight, SHRINKS[1:])
    found = full_range(dense, form)
    group = group_of(dense.shape[1], form)
    parts, shares = by_group(dense, group), by_group(weight[None], group)
    least = _error(parts, shares, found)
    for shrink in SHRINKS[1:]:
        tried = full_range(dense, form, shrink)
        error = _error(parts, shares, tried)
        better = error < least
        least, found = np.where(better, error, least), tried.where(better, found)
    return found


def _error(parts: Array, shares: Array, steps: Steps) -> Array:
    spread = steps.each(lambda by_groups: by_groups[..., None])
    return np.asarray((np.square(spread.weights(spread.codes(parts)) - parts) * shares).sum(axis=2))


def inverse_factor(hessian: Array, damping: float = DAMPING) -> Array:
    """Return f32[K,K], the upper Cholesky factor of the damped Hessian's inverse."""
    damped = hessian.astype(np.float64)
    mean = float(np.diag(damped).mean()) or 1.0
    damped[np.diag_indices_from(damped)] += damping * mean
    return np.asarray(np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32))


def _rounded(rows: Array, factor: Array, steps: Steps) -> Array:
    """Return codes int8[K,N] of weights [K,N], which are used up, in the order of the rows; steps are of rows too."""
    codes = np.empty(rows.shape, np.int8)
    for start in range(0, len(rows), BLOCK):
        block = slice(start, min(start + BLOCK, len(rows)))
        errors = np.empty_like(rows[block])
        for k in range(block.start, block.stop):
            own = steps.each(itemgetter(k))
            codes[k] = own.codes(rows[k])
            error = (rows[k] - own.weights(codes[k])) / factor[k, k]
            errors[k - start] = error
            rows[k + 1 : block.stop] -= factor[k, k + 1 : block.stop, None] * error
        rows[block.stop :] -= factor[block, block.stop :].T @ errors
    return codes
