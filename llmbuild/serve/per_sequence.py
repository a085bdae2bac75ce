"""A step that calls the device once for each sequence: what artifacts without `step` can do.

An artifact of one sequence has `prefill` and `decode`, and a KV cache that its caller gives it. All sequences share one
opened artifact, and so one copy of the weights in memory; but each call reads all of them, so a step of several
sequences takes as long as their steps one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmbuild.errors import InputError
from llmbuild.runtime.session import Session
from llmbuild.serve.blocks import Names
from llmbuild.serve.of_session import OfSession
from llmbuild.serve.step import Logits, Output, Rows

CUTS = (1, 6, 8, 16, 32)
"""Multiples that are tried for where a prompt may be cut."""
_PIECES, _LEAST = 3, 40
"""Pieces that the prompts which are tried have at least, and their tokens; and one token less."""


class PerSequenceStep(OfSession):
    """The step of one opened artifact; each slot has its own KV cache of the whole context."""

    drafts = False
    """What is read behind several tokens of one sequence takes a call for each."""

    def __init__(self, session: Session, slots: int) -> None:
        """Allocate the caches of all slots, so that no request finds them missing.

        Raises:
            InputError: the artifact answers several sequences together, or there is no memory for the caches.
        """
        if session.abi.batch != 1:
            told = f"the variant answers {session.abi.batch} sequences in each call, whether they are there or not"
            raise InputError(f"{told}: serve one of a workload with `batch: 1`")
        super().__init__(session)
        self.slots, self.cut = slots, 0
        self._caches = [self._held.enter_context(session.cache()) for _ in range(slots)]
        self._logits = np.zeros((slots, session.abi.vocabulary), np.float32)

    @property
    def room(self) -> int:
        """The caches of all slots."""
        return self.slots

    def takes(self, positions: int) -> int:
        """Return 1: a sequence has a cache of the whole context."""
        return 1

    def names(self, tokens: Sequence[int], salt: bytes) -> Names:
        """Return nothing: caches are not shared."""
        return ()

    def known(self, names: Names) -> int:
        """Return 0."""
        return 0

    def begin(self, slot: int, tokens: Sequence[int], names: Names, salt: bytes) -> int:
        """Return 0: every token of a prompt is computed."""
        return 0

    def keep(self, slot: int, tokens: Sequence[int]) -> None:
        """Do nothing: there are no drafts."""

    def end(self, slot: int) -> None:
        """Do nothing: the slot keeps its cache."""

    def run(self, batch: Sequence[Rows]) -> list[Output]:
        """Run the rows of each sequence by a call of its own."""
        return [self._call(rows, self._logits[i]) for i, rows in enumerate(batch)]

    def probe(self) -> None:
        """Find where prompts may be cut: compute some whole and in pieces, and compare every bit of the logits.

        Kernels that sum the rows of a tile in another order than a single row are exact at multiples of the tile.
        """
        self.cut = next((cut for cut in CUTS if cut * _PIECES <= self.context and self._exact(cut)), 0)

    def _exact(self, cut: int) -> bool:
        drawn = np.random.default_rng(cut)
        most = min(self.context, max(_LEAST, cut * _PIECES))
        for length in (most, most - 1):
            tokens = drawn.integers(0, self.vocabulary, length).tolist()
            (whole,) = self.run([Rows(0, tokens, 0, True)])
            said = whole.token, _bits(whole)
            for most_pieces in (1, _PIECES):
                at = 0
                while at < length:
                    end = min(length, at + cut * int(drawn.integers(1, most_pieces, endpoint=True)))
                    (pieces,) = self.run([Rows(0, tokens[at:end], at, True)])
                    at = end
                if (pieces.token, _bits(pieces)) != said:
                    return False
        return True

    def _call(self, rows: Rows, kept: Logits) -> Output:
        session, cache = self._session, self._caches[rows.slot]
        if rows.start and len(rows.tokens) == 1:
            token = session.decode(rows.tokens[0], rows.start, cache=cache)
        else:
            token = session.prefill(rows.tokens, rows.start, cache=cache)
        if not rows.logits:
            return Output(token)
        np.copyto(kept, session.peek())
        return Output(token, kept)


def _bits(output: Output) -> bytes:
    assert output.logits is not None
    return output.logits.tobytes()
