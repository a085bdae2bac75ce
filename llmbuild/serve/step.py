"""One device step over a mix of sequences: the interface between the engine and a device.

A step takes rows of several sequences: the prompts of some, one token of others. A step that packs all rows into one
call of the device implements it as well as one that calls the device for each sequence: the engine does not know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from llmbuild.serve.blocks import Names

Logits = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Rows:
    """Tokens of one sequence, at positions from `start` on; `slot` is where its keys and values are kept."""

    slot: int
    tokens: Sequence[int]
    start: int
    logits: bool
    """Whether the logits behind the last token are read; else the device's own choice is."""
    drafts: Sequence[int] = ()
    """Guesses of the tokens behind those: computed with them, and kept only as far as `Step.keep` says."""


@dataclass(frozen=True, slots=True)
class Output:
    """What a device says behind the last token of some rows: its most likely token, and f32[V] logits if asked for.

    The logits are valid until the next step.
    """

    token: int
    logits: Logits | None = None
    drafts: tuple[Output, ...] = ()
    """The same behind each draft, as if it and those before it were right."""


class Step(Protocol):
    """What runs rows on a device. A sequence's outputs depend on its own tokens alone, bit for bit."""

    @property
    def slots(self) -> int:
        """How many sequences can be kept at a time."""

    @property
    def context(self) -> int:
        """Positions of a slot."""

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""

    @property
    def room(self) -> int:
        """What all sequences that have a slot may take together, in parts of memory."""

    def takes(self, positions: int) -> int:
        """Return how many parts a sequence of so many positions takes at most, for any thread."""

    @property
    def ends(self) -> tuple[int, ...]:
        """The model's end tokens."""

    @property
    def drafts(self) -> bool:
        """Whether rows may have drafts."""

    @property
    def cut(self) -> int:
        """Multiple of which a prompt may be cut without a change of any bit; 0: it must run whole."""

    def names(self, tokens: Sequence[int], salt: bytes) -> Names:
        """Return by what the beginning of a prompt is known, for any thread; no two salts have a name in common."""

    def known(self, names: Names) -> int:
        """Return how many tokens of a prompt are there from sequences before: at most all but the last."""

    def begin(self, slot: int, tokens: Sequence[int], names: Names, salt: bytes) -> int:
        """Give a free slot to a sequence with this prompt, and return how many of its tokens are there."""

    def run(self, batch: Sequence[Rows]) -> Sequence[Output]:
        """Run rows, each of another slot, and return the output behind the last token of each."""

    def keep(self, slot: int, tokens: Sequence[int]) -> None:
        """Take the next drafts of a slot's last rows as right: its next rows begin behind them."""

    def end(self, slot: int) -> None:
        """Free a slot."""

    def close(self) -> None:
        """Free what is held on the device."""
