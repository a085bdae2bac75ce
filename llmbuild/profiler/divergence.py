"""Held-out text scored against the f32 model: the reference in place of a copy, and divergence, agreement and loss."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

ROWS = 4
"""Rows of logits that are worked on together: few enough for the cache, enough to hide the cost of a call."""


class Divergence:
    """Sums over scored tokens: KL divergence from the f32 model, agreement of the most likely token, and the loss."""

    def __init__(self) -> None:
        self._kl, self._agree, self._loss, self._tokens = 0.0, 0, 0.0, 0

    def add(self, expected: NDArray[np.float32], actual: NDArray[np.float32], tokens: NDArray[np.int64]) -> None:
        """Add logits f32[R,V] of both models, and the text's next tokens i64[R]."""
        for first in range(0, len(tokens), ROWS):
            rows = slice(first, first + ROWS)
            self._add(np.asarray(expected[rows], np.float32), np.asarray(actual[rows], np.float32), tokens[rows])

    def _add(self, expected: NDArray[np.float32], actual: NDArray[np.float32], tokens: NDArray[np.int64]) -> None:
        """Exponentials are f32, sums f64: errors of 1e-8 are far below what a text resolves."""
        weights, total, wanted = _exponentials(expected)
        _, _, found = _exponentials(actual)
        apart = np.subtract(expected, actual)
        np.multiply(apart, weights, out=apart)
        self._kl += float(np.sum(apart.sum(-1, dtype=np.float64) / total - (wanted - found)))
        self._agree += int(np.sum(expected.argmax(-1) == actual.argmax(-1)))
        self._loss += float(np.sum(found - actual[np.arange(len(tokens)), tokens]))
        self._tokens += len(tokens)

    def readings(self) -> dict[str, float]:
        """Return the means over all tokens, as a variant's quality."""
        return {
            "quality_kl": max(0.0, self._kl / self._tokens),
            "quality_top1": self._agree / self._tokens,
            "quality_perplexity": float(np.exp(self._loss / self._tokens)),
        }


def _exponentials(
    logits: NDArray[np.float32],
) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.float64]]:
    """Return exp(logits - largest) f32[R,V], its sums f64[R], and the logarithms f64[R] of the sums of exp(logits)."""
    largest = logits.max(-1, keepdims=True)
    weights = np.subtract(logits, largest)
    np.exp(weights, out=weights)
    total = weights.sum(-1, dtype=np.float64)
    return weights, total, largest[:, 0] + np.log(total)


def mapped(path: Path) -> dict[str, NDArray[np.generic]]:
    """Return the arrays of an uncompressed `.npz`, mapped: what is not read of hundreds of MB costs nothing.

    Their bytes are not checked here; a store checks its files.
    """
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        return {info.filename.removesuffix(".npy"): _array(archive, info, file, path) for info in archive.infolist()}


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, file: BinaryIO, path: Path) -> NDArray[np.generic]:
    file.seek(info.header_offset)
    local = file.read(30)
    file.seek(int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little"), 1)
    if info.compress_type == zipfile.ZIP_STORED and np.lib.format.read_magic(file) == (1, 0):
        shape, fortran, kind = np.lib.format.read_array_header_1_0(file)
        if np.prod(shape):
            return np.memmap(path, kind, "r", file.tell(), shape, "F" if fortran else "C")
    with archive.open(info) as member:
        read: NDArray[np.generic] = np.lib.format.read_array(member)
        return read
