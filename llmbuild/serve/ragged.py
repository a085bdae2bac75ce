"""A step that packs the rows of all sequences into one call of the device, which reads the weights once for all.

Keys and values of all sequences lie in one cache, in blocks of some positions; each slot has a table of its blocks, and
prompts with the same beginning share the blocks of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, repeat

from llmbuild.runtime.rows import told
from llmbuild.runtime.session import Session
from llmbuild.serve.blocks import Names, Tables
from llmbuild.serve.of_session import OfSession
from llmbuild.serve.step import Logits, Output, Rows


class RaggedStep(OfSession):
    """The step of one opened artifact that has `step`."""

    drafts = True
    """A row is computed alike alone and among others: a draft that is right has the bits that it would have later."""

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
        outputs = self.ahead(batch)
        for rows in batch:
            self.tables.computed(rows.slot, rows.tokens)
        return outputs

    def ahead(self, batch: Sequence[Rows]) -> list[Output]:
        """Run rows of which no block may be found by others until `keep` takes their tokens as right."""
        for rows in batch:
            self.tables.grow(rows.slot, rows.start + len(rows.tokens) + len(rows.drafts))
        pieces = [piece for rows in batch for piece in _pieces(rows)]
        tokens, starts, slots = zip(*pieces, strict=True)
        found = self._session.step(*told(tokens, starts, slots, self.tables.array), self._cache).tolist()
        read = any(rows.logits for rows in batch)
        logits: Iterable[Logits | None] = self._session.step_logits() if read else repeat(None, len(found))
        said = zip(found, logits, strict=True)
        return [_output(rows, said) for rows in batch]

    def keep(self, slot: int, tokens: Sequence[int]) -> None:
        """Take drafts as right: the blocks that they fill may be found by others from now on."""
        self.tables.computed(slot, tokens)


def _pieces(rows: Rows) -> Iterator[tuple[Sequence[int], int, int]]:
    """Yield tokens, their first position and their slot: what is read behind its last token, each draft alone."""
    yield rows.tokens, rows.start, rows.slot
    for position, draft in enumerate(rows.drafts, rows.start + len(rows.tokens)):
        yield (draft,), position, rows.slot


def _output(rows: Rows, said: Iterator[tuple[int, Logits | None]]) -> Output:
    """Return what the device says of some rows: the next of all that it said."""
    found = [(token, logits if rows.logits else None) for token, logits in islice(said, 1 + len(rows.drafts))]
    return Output(*found[0], tuple(Output(*one) for one in found[1:]))
