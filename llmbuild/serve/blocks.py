"""Blocks of a KV cache that sequences share: who refers to which, and which hold the beginning of a known text.

A block that is full has a name: a digest of all tokens up to its end, of what is asked to be kept apart, and of nothing
else. A sequence whose prompt begins with the same tokens refers to the same blocks. Nobody writes to a full block; a
block that nobody refers to keeps its name until it is needed for something else, those longest unused first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

Names = tuple[bytes, ...]
"""The names of the blocks of a text, from its beginning on."""


class Chain:
    """Names the blocks of a text, token by token."""

    def __init__(self, page: int, salt: bytes) -> None:
        """Take the tokens of a block; texts of different salts share no name."""
        self._page, self._last, self._rest = page, hashlib.sha256(salt).digest(), list[int]()

    def add(self, tokens: Iterable[int]) -> Names:
        """Go on with tokens; return the names of the blocks that are now full."""
        self._rest.extend(tokens)
        found: list[bytes] = []
        whole = len(self._rest) // self._page * self._page
        for first in range(0, whole, self._page):
            own = np.array(self._rest[first : first + self._page], np.int64).tobytes()
            self._last = hashlib.sha256(self._last + own).digest()
            found.append(self._last)
        del self._rest[:whole]
        return tuple(found)


class Blocks:
    """A fixed number of blocks, each free or referred to by one sequence or more."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._references = [0] * count
        self._free = OrderedDict.fromkeys(range(count))
        """Free blocks; the first is used next."""
        self._block_of: dict[bytes, int] = {}
        self._name_of: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        """How many blocks nobody refers to."""
        return len(self._free)

    def known(self, names: Names) -> int:
        """Return how many blocks of a text's beginning are there."""
        return sum(1 for _ in takewhile(self._block_of.__contains__, names))

    def beside(self, names: Names) -> int:
        """Return how many blocks of a text's beginning are there and referred to."""
        return sum(self._references[self._block_of[name]] > 0 for name in names[: self.known(names)])

    def take(self, names: Names) -> list[int]:
        """Refer to the blocks of a text's beginning that are there."""
        found = [self._block_of[name] for name in names[: self.known(names)]]
        for block in found:
            self._references[block] += 1
            self._free.pop(block, None)
        return found

    def new(self) -> int:
        """Refer to a free block, which loses its name.

        Raises:
            RuntimeError: none is free.
        """
        if not self._free:
            raise RuntimeError(f"none of {self.count} blocks is free")
        block, _ = self._free.popitem(last=False)
        self._references[block] = 1
        if (name := self._name_of.pop(block, None)) is not None:
            del self._block_of[name]
        return block

    def name(self, block: int, name: bytes) -> None:
        """Name a block that is full; where another has the name already, that one keeps it."""
        if name not in self._block_of:
            self._block_of[name], self._name_of[block] = block, name

    def give(self, blocks: Sequence[int]) -> None:
        """Refer to blocks of a text no more: its end will be used for something else before its beginning."""
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} is given back twice"
            self._references[block] -= 1
            if not self._references[block]:
                self._free[block] = None
                self._free.move_to_end(block, last=block in self._name_of)

    def check(self, held: Iterable[Sequence[int]]) -> None:
        """See that references are those of these tables, that the rest is free, and that names are unique."""
        counted = [0] * self.count
        for blocks in held:
            for block in blocks:
                counted[block] += 1
        assert counted == self._references, "references are those of the tables"
        assert set(self._free) == {block for block, count in enumerate(counted) if not count}
        assert {block: name for name, block in self._block_of.items()} == self._name_of


class Tables:
    """The blocks of each slot.

    There are those of a number of whole contexts. Who gives slots out sees to it that a slot finds a block when it
    grows: all that sequences take at most is kept free, or another slot is ended first.
    """

    def __init__(self, slots: int, context: int, page: int, contexts: int) -> None:
        self.page = page
        each = self.takes(context)
        self.array: NDArray[np.int64] = np.zeros((slots, each), np.int64)
        """The blocks of each slot, in the order of positions; what is behind the last one means nothing."""
        self.blocks = Blocks(contexts * each)
        self._held: list[list[int]] = [[] for _ in range(slots)]
        self._chains = [Chain(page, b"") for _ in range(slots)]
        self._full = [0] * slots

    def takes(self, positions: int) -> int:
        """Return how many blocks so many positions are in."""
        return -(-positions // self.page)

    def held(self, slot: int) -> int:
        """Return how many blocks a slot has."""
        return len(self._held[slot])

    def names(self, tokens: Sequence[int], salt: bytes) -> Names:
        """Return the names of a prompt's full blocks; its last token must be computed, and so its block."""
        return Chain(self.page, salt).add(tokens[:-1])

    def known(self, names: Names) -> int:
        """Return how many tokens of a prompt are there."""
        return self.blocks.known(names) * self.page

    def begin(self, slot: int, tokens: Sequence[int], names: Names, salt: bytes) -> int:
        """Give a slot to a sequence; return how many tokens of its prompt need not be computed."""
        assert not self._held[slot], f"slot {slot} is taken"
        found = self.blocks.take(names)
        self._held[slot], self._full[slot] = found, len(found)
        self.array[slot, : len(found)] = found
        self._chains[slot] = Chain(self.page, salt)
        self._chains[slot].add(tokens[: len(found) * self.page])
        return len(found) * self.page

    def grow(self, slot: int, positions: int) -> None:
        """Take blocks for so many positions of a slot."""
        held = self._held[slot]
        while len(held) * self.page < positions:
            held.append(self.blocks.new())
            self.array[slot, len(held) - 1] = held[-1]

    def computed(self, slot: int, tokens: Iterable[int]) -> None:
        """Name the blocks of a slot that these further tokens have filled."""
        for name in self._chains[slot].add(tokens):
            self.blocks.name(self._held[slot][self._full[slot]], name)
            self._full[slot] += 1

    def end(self, slot: int) -> None:
        """Give the blocks of a slot back; those that have a name may be found again."""
        self.blocks.give(self._held[slot])
        self._held[slot] = []

    def check(self) -> None:
        """See that what is counted is what is held."""
        self.blocks.check(self._held)
