"""Who may have a slot: a sequence for which all that it may take is free, or what it is expected to take.

By the worst case, what is admitted ends. By what is expected, more sequences run at a time where answers are shorter
than they may be; when memory is short all the same, the engine preempts the last one, which is computed again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Protocol

from llmbuild.serve.blocks import Tables
from llmbuild.serve.sequence import Sequence
from llmbuild.serve.step import Step

WORST_CASE, EXPECTED = "worst-case", "expected"
NAMES = (WORST_CASE, EXPECTED)
"""How sequences are admitted, by name."""

WATERMARK = 0.01
"""Part of the blocks that stays free for those that run when others are admitted; vLLM keeps as much."""
GROWTH = 1
"""Blocks that an answer is expected to need beyond those that it has, where nothing else is known of its length."""

Ends = Iterable[tuple[int, int]]
"""Slots, and how many positions each of them is to have."""


class Admission(Protocol):
    """Counts the parts of the device's memory; for the engine's thread, but for `used`."""

    @property
    def used(self) -> float:
        """The part of the memory that is not free, for any thread."""

    def takes(self, one: Sequence) -> int:
        """Return how many parts a sequence that waits is to find free."""

    def room(self, running: Iterable[Sequence]) -> int:
        """Return how many parts are free for those that wait."""

    def lacks(self, ends: Ends) -> bool:
        """Return whether a step in which slots grow so far needs more than is free."""

    def begun(self, one: Sequence) -> None:
        """Note that a sequence has a slot."""

    def ended(self, one: Sequence) -> None:
        """Note that a sequence has its slot no more."""


class WorstCase:
    """Reserves all that a sequence may take: it never waits for memory once it runs."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self.reserved = 0

    @property
    def used(self) -> float:
        """The part of the memory that is reserved."""
        return self.reserved / self._step.room

    def takes(self, one: Sequence) -> int:
        """Return what a sequence takes at most."""
        return one.most

    def room(self, running: Iterable[Sequence]) -> int:
        """Return what is not reserved."""
        return self._step.room - self.reserved

    def lacks(self, ends: Ends) -> bool:
        """Return False: all is there."""
        return False

    def begun(self, one: Sequence) -> None:
        """Reserve."""
        self.reserved += one.most

    def ended(self, one: Sequence) -> None:
        """Give back."""
        self.reserved -= one.most


class Expected:
    """Counts blocks that are held, and those that answers under way are expected to need still.

    Whoever is admitted finds free what it and all that run are expected to take, and at least what they need for their
    next tokens: so each admission gives a token before its place can be lost again.
    """

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    @property
    def used(self) -> float:
        """The part of the blocks that sequences refer to."""
        blocks = self._tables.blocks
        return 1 - blocks.free / blocks.count

    def takes(self, one: Sequence) -> int:
        """Return what a sequence is expected to take, without the blocks of its beginning that others hold."""
        return self._parts(one) - self._tables.blocks.beside(one.names)

    def room(self, running: Iterable[Sequence]) -> int:
        """Return what is left of the free blocks when all that run have what they are expected to need."""
        blocks, ahead, spare = self._tables.blocks, 0, 0
        for one in running:
            assert one.slot is not None
            ahead += max(0, self._parts(one) - self._tables.held(one.slot))
            spare = math.ceil(WATERMARK * blocks.count)
        return max(0, blocks.free - ahead - spare)

    def lacks(self, ends: Ends) -> bool:
        """Return whether slots grow by more than the free blocks."""
        tables = self._tables
        return sum(max(0, tables.takes(count) - tables.held(slot)) for slot, count in ends) > tables.blocks.free

    def begun(self, one: Sequence) -> None:
        """Do nothing: its blocks are counted where they are held."""

    def ended(self, one: Sequence) -> None:
        """Do nothing, for the same reason."""

    def _parts(self, one: Sequence) -> int:
        """Return the blocks that a sequence is expected to have at its end."""
        prompt, tokens, expected = len(one.request.prompt), len(one.tokens), one.predicted
        now = self._tables.takes(prompt + tokens)
        if expected is None or expected <= tokens:
            return min(one.most, now + GROWTH)
        return min(one.most, max(now, self._tables.takes(prompt + math.ceil(expected) - 1)))
