"""What an instruction set gives our kernels: products with panels in each format, and the length of its registers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from llmbuild.kernels.layouts import Layout
from llmbuild.kernels.text import Writer

Sums = list[list[str]]
"""For each row, a panel's four vectors of sixteen lanes."""


@dataclass(frozen=True)
class Kernel:
    """Products with panels of one format on one instruction set; `features` are all it needs, by LLVM's names.

    `sums(w, layout, data, scales, rows, coming)` writes the sums f32[16] of each row with each of a panel's four
    blocks, with the scales of groups but not those of whole rows; `rows` point at what `Layout` prepares. It is called
    for `row_tile` rows, which share one pass over the panel, or for one. `narrow` says that it takes layouts that are.
    Where `ahead` is not 0, it asks for the weights at `coming` as fast as it reads its own: the next panel where rows
    are several, else this one from `ahead` bytes on.
    `spread(w, layout, data, room)` writes a panel's codes with a byte each, for layouts whose codes share bytes:
    then `sums` takes tiles of rows with such a layout.
    """

    features: tuple[str, ...]
    row_tile: int
    sums: Callable[[Writer, Layout, str, str, list[str], str], Sums]
    narrow: bool = False
    spread: Callable[[Writer, Layout, str, str], None] | None = None
    ahead: int = 0
    """Bytes; 0: what the CPU guesses itself is not known to be too little."""


@dataclass(frozen=True)
class Instructions:
    """An instruction set. `kernels` are by `Layout.family`.

    A register has `lanes` lanes of 32 bits; a weighted sum of values keeps `mix_chains` sums side by side, as many as
    there are registers for: one alone would wait for its own result. `pause` is the operation that tells the CPU that
    it waits for another.
    """

    name: str
    lanes: int
    mix_chains: int
    pause: str
    kernels: Mapping[str, Kernel]
