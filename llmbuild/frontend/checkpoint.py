"""How an import reads weights: by the library's names, some rows at a time, whatever file they lie in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Blocks:
    """Rows as a file stores them: in blocks of 32 weights along a row, each with a scale and maybe a minimum.

    A weight is `code * scale`, plus `minimum` where there is one, computed in f32.
    """

    codes: NDArray[np.int8]
    """i8[n,K]: -8..7 of q4_0, 0..15 of q4_1, -128..127 of q8_0."""
    scale: NDArray[np.float16]
    """f16[n,K/32]."""
    minimum: NDArray[np.float16] | None = None
    """f16[n,K/32] of q4_1."""


class Checkpoint(Protocol):
    """The weights of a model, read by rows; nothing is held."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of each tensor by the library's name (`model.norm.weight`); matrices are [N,K]."""
        ...

    def rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Return rows `start` to `stop` of a matrix, f32[n,K], or entries of a vector, f32[n]."""
        ...

    def blocks(self, name: str) -> str:
        """Return the block format of a tensor (`q4_1`, `q8_0`, `q6_k`), or '' for plain numbers."""
        ...

    def quantized(self, name: str, start: int, stop: int) -> Blocks:
        """Return rows as they are stored, for `q4_0`, `q4_1` and `q8_0`."""
        ...
