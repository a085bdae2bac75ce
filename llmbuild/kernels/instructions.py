"""What an instruction set gives our kernels: products of signed rows with panels, and the length of its registers.

Only attention is written for that length: it holds many sums at a time. All else is in vectors of sixteen lanes,
which the compiler splits where registers are shorter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llmbuild.kernels.text import Writer


@dataclass(frozen=True)
class Instructions:
    """Products with int8 panels on one instruction set.

    `products(w, panel, rows, columns)` writes the sums i32[16] of each row (a pointer to signed bytes) with each of a
    panel's four blocks; with `shifted` they are sums over w + 128, else over w. `row_tile` rows share one pass. A
    register has `lanes` lanes of 32 bits; a weighted sum of values keeps `mix_chains` sums side by side, as many as
    there are registers for.
    """

    name: str
    features: tuple[str, ...]
    row_tile: int
    shifted: bool
    lanes: int
    mix_chains: int
    products: Callable[[Writer, str, list[str], int], list[list[str]]]
