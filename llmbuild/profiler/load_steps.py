"""Steps of a server as the worker times them: pieces of several sequences, whatever their tokens are."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from time import perf_counter

import numpy as np

from llmbuild.runtime.rows import told
from llmbuild.runtime.session import Session

SHORTEST_VISIT_S = 0.004
"""Seconds of calls in a visit; at least one."""
SLOW_S = 0.01
"""Seconds of a step above which none runs untimed before it: it is no warmer for that."""

Pieces = Sequence[Sequence[int]]
"""For each sequence the position of the first token, and how many tokens there are."""


class LoadSteps:
    """Steps of up to `sequences` sequences, with caches of so many whole contexts as `contexts`.

    Where there are fewer contexts than sequences, these share blocks: what is computed is then meaningless, and takes
    as long.
    """

    def __init__(self, session: Session, sequences: int, contexts: int) -> None:
        """Allocate the caches.

        Raises:
            InputError: there is no memory for them.
        """
        self._session, self._held = session, ExitStack()
        self._drawn = np.random.default_rng(0)
        self._slow: dict[tuple[tuple[int, ...], ...], float] = {}
        abi = session.abi
        if abi.page:
            each = -(-abi.context // abi.page)
            self._tables = (np.arange(sequences * each) % (contexts * each)).reshape(sequences, each)
            self._cache = self._held.enter_context(session.shared_cache(contexts * each))
        else:
            self._caches = [self._held.enter_context(session.cache()) for _ in range(contexts)]

    def visit(self, pieces: Pieces) -> float:
        """Return the seconds of one step with these pieces: the mean of some, after one that is not timed."""
        key = tuple(map(tuple, pieces))
        if self._slow.get(key, 0.0) <= SLOW_S:
            self._slow[key] = self.run(pieces)
        taken = [self.run(pieces)]
        while sum(taken) < SHORTEST_VISIT_S:
            taken.append(self.run(pieces))
        return sum(taken) / len(taken)

    def run(self, pieces: Pieces) -> float:
        """Run one step, and return its seconds."""
        tokens = [self._drawn.integers(0, self._session.abi.vocabulary, count).tolist() for _, count in pieces]
        begin = perf_counter()
        self._step([start for start, _ in pieces], tokens)
        return perf_counter() - begin

    def _step(self, starts: Sequence[int], tokens: Sequence[Sequence[int]]) -> None:
        session = self._session
        if session.abi.page:
            session.step(*told(tokens, starts, range(len(tokens)), self._tables), self._cache)
            return
        for i, (start, one) in enumerate(zip(starts, tokens, strict=True)):
            cache = self._caches[i % len(self._caches)]
            if start and len(one) == 1:
                session.decode(one[0], start, cache=cache)
            else:
                session.prefill(one, start, cache=cache)
