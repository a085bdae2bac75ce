"""A step that packs the rows of all sequences into one call of the device, which reads the weights once for all.

Keys and values of all sequences lie in one cache, in blocks of some positions; each slot has a table of its blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np

from llmbuild.runtime.session import Session
from llmbuild.serve.step import Output, Rows


class RaggedStep:
    """The step of one opened artifact that has `step`; each slot has blocks for the whole context."""

    def __init__(self, session: Session, slots: int) -> None:
        """Allocate the blocks of all slots, so that no request finds them missing.

        Raises:
            InputError: the artifact has no `step`, or there is no memory for the blocks.
        """
        self._session, self.slots, self.cut = session, slots, 1
        each = -(-session.abi.context // max(1, session.abi.page))
        self._tables = np.arange(slots * each, dtype=np.int64).reshape(slots, each)
        self._held = ExitStack()
        self._cache = self._held.enter_context(session.shared_cache(slots * each))

    @property
    def context(self) -> int:
        """Positions of a slot."""
        return self._session.abi.context

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return self._session.abi.vocabulary

    @property
    def ends(self) -> tuple[int, ...]:
        """The model's end tokens."""
        return self._session.abi.eos_tokens

    def run(self, batch: Sequence[Rows]) -> list[Output]:
        """Run the rows of all sequences by one call."""
        counts = np.array([len(rows.tokens) for rows in batch])
        behind = np.cumsum(counts)
        count = int(behind[-1])
        tokens = np.fromiter((token for rows in batch for token in rows.tokens), np.int64, count)
        starts = np.array([rows.start for rows in batch]) - (behind - counts)
        positions = np.repeat(starts, counts) + np.arange(count)
        tables = 2 * count + np.array([rows.slot for rows in batch]) * self._tables.shape[1]
        where = np.concatenate([positions, np.repeat(tables, counts), self._tables.ravel()])
        found, logits = self._session.step(tokens, positions, where, behind - 1, self._cache)
        return [
            Output(int(token), row if rows.logits else None)
            for token, row, rows in zip(found, logits, batch, strict=True)
        ]

    def close(self) -> None:
        """Give the blocks back to the session."""
        self._held.close()
