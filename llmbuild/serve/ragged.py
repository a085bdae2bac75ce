"""A step that packs the rows of all sequences into one call of the device, which reads the weights once for all.

Keys and values of all sequences lie in one cache, in blocks of some positions; each slot has a table of its blocks, and
prompts with the same beginning share the blocks of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmbuild.runtime.rows import told
from llmbuild.runtime.session import Session
from llmbuild.serve.blocks import Names, Tables
from llmbuild.serve.of_session import OfSession
from llmbuild.serve.step import Output, Rows


class RaggedStep(OfSession):
    """The step of one opened artifact that has `step`."""

    def __init__(self, session: Session, slots: int, contexts: int = 0) -> None:
        """Allocate blocks for so many whole contexts, or for one of each slot.

        Raises:
            InputError: the artifact has no `step`, or there is no memory for the blocks.
        """
        super().__init__(session)
        self.slots, self.cut = slots, 1
        self.contexts = contexts or slots
        self.tables = Tables(slots, session.abi.context, max(1, session.abi.page), self.contexts)
        self._cache = self._held.enter_context(session.shared_cache(self.tables.blocks.count))

    @property
    def room(self) -> int:
        """Blocks of the cache."""
        return self.tables.blocks.count

    def takes(self, positions: int) -> int:
        """Return the blocks that so many positions are in."""
        return self.tables.takes(positions)

    def names(self, tokens: Sequence[int], salt: bytes) -> Names:
        """Return the names of the blocks that a prompt fills."""
        return self.tables.names(tokens, salt)

    def known(self, names: Names) -> int:
        """Return how many tokens of a prompt are in blocks that are still there."""
        return self.tables.known(names)

    def begin(self, slot: int, tokens: Sequence[int], names: Names, salt: bytes) -> int:
        """Give a free slot to a sequence, and return how many tokens of its prompt are there."""
        return self.tables.begin(slot, tokens, names, salt)

    def end(self, slot: int) -> None:
        """Free a slot; its blocks may be found again."""
        self.tables.end(slot)

    def run(self, batch: Sequence[Rows]) -> list[Output]:
        """Run the rows of all sequences by one call."""
        for rows in batch:
            self.tables.grow(rows.slot, rows.start + len(rows.tokens))
        tokens, starts, slots = zip(*((rows.tokens, rows.start, rows.slot) for rows in batch), strict=True)
        found, logits = self._session.step(*told(tokens, starts, slots, self.tables.array), self._cache)
        for rows in batch:
            self.tables.computed(rows.slot, rows.tokens)
        return [
            Output(int(token), row if rows.logits else None)
            for token, row, rows in zip(found, logits, batch, strict=True)
        ]
