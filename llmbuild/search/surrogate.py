"""Predicts the losses of unmeasured points: a Gaussian process over choices, one per loss.

The covariance of two points depends on the knobs on which they differ: each weakens it by its own fitted factor.
Choices need no order and no distance for that, and an inactive knob (which keeps its default) agrees with itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Codes = NDArray[np.int64]

STEPS, RATE = 60, 0.1
"""Steps of Adam on the marginal likelihood, and their size; all parameters are logarithms."""

PRIOR = (np.log(0.5), np.log(1e-2))
"""Means of the logarithms of the factors' exponents and of the noise, normal with the spreads below."""

SPREADS = (1.3, 1.0)
JITTER = 1e-8


@dataclass(frozen=True)
class Process:
    """A fitted process: its measurements and points, and the matrices for predictions."""

    codes: Codes
    exponents: Array
    root: Array
    weights: Array
    centre: float
    scale: float

    def predict(self, codes: Codes) -> tuple[Array, Array]:
        """Return mean and standard deviation f64[P] at points i64[P,K]."""
        across = _covariance(codes, self.codes, self.exponents)
        half = np.linalg.solve(self.root, across.T)
        spread = np.sqrt(np.maximum(1.0 - (half * half).sum(0), 1e-9))
        return self.centre + self.scale * (across @ self.weights), self.scale * spread


def fit(codes: Codes, values: Array, start: Array | None = None) -> tuple[Process, Array]:
    """Return the process that best fits `values` f64[N] at points i64[N,K], and its parameters for a next start."""
    centre, scale = float(values.mean()), float(values.std()) or 1.0
    target = (values - centre) / scale
    differ = (codes[:, None, :] != codes[None, :, :]).astype(np.float64)
    used = differ.any((0, 1))
    middle = np.append(np.full(codes.shape[1], PRIOR[0]), PRIOR[1])
    width = np.append(np.full(codes.shape[1], SPREADS[0]), SPREADS[1])
    parameters = middle.copy() if start is None else start.copy()
    first, second = np.zeros_like(parameters), np.zeros_like(parameters)
    for step in range(1, STEPS + 1):
        slope = _slope(parameters, differ, target) - (parameters - middle) / width**2
        slope[:-1][~used] = 0.0
        first = 0.9 * first + 0.1 * slope
        second = 0.99 * second + 0.01 * slope * slope
        parameters = parameters + RATE * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.99**step)) + 1e-8)
    exponents, noise = np.exp(parameters[:-1]), np.exp(parameters[-1])
    covariance = np.exp(-(differ @ exponents)) + (noise + JITTER) * np.eye(len(codes))
    root = np.linalg.cholesky(covariance)
    weights = np.linalg.solve(root.T, np.linalg.solve(root, target))
    return Process(codes, exponents, root, weights, centre, scale), parameters


def _covariance(a: Codes, b: Codes, exponents: Array) -> Array:
    return np.asarray(np.exp(-((a[:, None, :] != b[None, :, :]) @ exponents)))


def _slope(parameters: Array, differ: Array, target: Array) -> Array:
    """Return the gradient of the log marginal likelihood by the logarithms of exponents and noise."""
    exponents, noise = np.exp(parameters[:-1]), np.exp(parameters[-1])
    kernel = np.exp(-(differ @ exponents))
    inverse = np.linalg.inv(kernel + (noise + JITTER) * np.eye(len(target)))
    weights = inverse @ target
    outer = np.outer(weights, weights) - inverse
    by_exponent = -0.5 * np.einsum("ij,ijk->k", outer * kernel, differ) * exponents
    return np.append(by_exponent, 0.5 * noise * np.trace(outer))
