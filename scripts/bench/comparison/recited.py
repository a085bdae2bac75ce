"""A device that needs no model: it says logits of a form's own making, so that what is timed is the server alone.

Behind the prompt `HELD` it follows a grammar: its likeliest token is one that may follow, and this token is not the
likeliest where it errs. Behind any other prompt its likeliest token is any. The other logits are noise.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmbuild.errors import InputError
from llmbuild.runtime.answers import Text
from llmbuild.runtime.tokenizer import Tokenizer
from llmbuild.serve.blocks import Names
from llmbuild.serve.engine import Engine
from llmbuild.serve.events import Outlet
from llmbuild.serve.grammar import WHITESPACE, Grammars
from llmbuild.serve.observe import Observer
from llmbuild.serve.request import Request
from llmbuild.serve.schedule.fcfs import Fcfs
from llmbuild.serve.speculate import Speculation
from llmbuild.serve.step import Logits, Output, Rows

if TYPE_CHECKING:
    from llguidance import LLMatcher

FREE, HELD = 0, 1
"""The tokens of prompts."""
NOISE, LIKELY = 3.0, 20.0
"""Deviation of the logits, and the likeliest one: at a temperature of 1.5 it has some 60 % of 49,152 tokens."""
_ROWS = 16
"""Rows of noise that are taken in turn."""


class RecitingStep:
    """Slots whose tokens follow a grammar, or nothing."""

    context, cut, drafts = 4096, 1, True

    def __init__(self, slots: int, vocabulary: int, end: int, form: LLMatcher, errs: float) -> None:
        """Take where an answer begins in its grammar, and which part of all places the device errs in."""
        self.slots = self.room = slots
        self.vocabulary, self.ends, self._form, self._errs = vocabulary, (end,), form, errs
        self._random = np.random.default_rng(0)
        self._noise = self._random.normal(0, NOISE, (_ROWS, vocabulary)).astype(np.float32)
        self._said = np.empty((_ROWS * slots, vocabulary), np.float32)
        self._at: dict[int, LLMatcher | None] = {}

    def takes(self, positions: int) -> int:
        """Return 1: a slot is a part of the memory."""
        return 1

    def names(self, tokens: Sequence[int], salt: bytes) -> Names:
        """Return nothing: nothing is shared."""
        return ()

    def known(self, names: Names) -> int:
        """Return 0."""
        return 0

    def begin(self, slot: int, tokens: Sequence[int], names: Names, salt: bytes) -> int:
        """Take a slot; return 0."""
        self._at[slot] = self._form.deep_copy() if tokens[0] == HELD else None
        return 0

    def keep(self, slot: int, tokens: Sequence[int]) -> None:
        """Take drafts as right."""
        _go_on(self._at[slot], tokens)

    def end(self, slot: int) -> None:
        """Free a slot."""
        del self._at[slot]

    def close(self) -> None:
        """Nothing is held."""

    def run(self, batch: Sequence[Rows]) -> list[Output]:
        """Say what follows the rows of each sequence, and each draft."""
        rows = iter(self._said)
        return [self._one(one, lambda: next(rows)) for one in batch]

    def _one(self, rows: Rows, row: Callable[[], Logits]) -> Output:
        at = self._at[rows.slot]
        _go_on(at, rows.tokens if rows.start else rows.tokens[1:])
        found = [self._output(at, rows.logits, row)]
        at = at.deep_copy() if at is not None and rows.drafts else at
        for draft in rows.drafts:
            _go_on(at, (draft,))
            found.append(self._output(at, rows.logits, row))
        return Output(found[0].token, found[0].logits, tuple(found[1:]))

    def _output(self, at: LLMatcher | None, read: bool, row: Callable[[], Logits]) -> Output:
        anything = int(self._random.integers(self.vocabulary))
        errs = at is None or self._random.random() < self._errs
        right = anything if at is None or at.is_error() else self._following(at)
        token = anything if errs else right
        if not read:
            return Output(token)
        made = row()
        np.copyto(made, self._noise[self._random.integers(_ROWS)])
        made[right], made[token] = LIKELY - 1, LIKELY
        return Output(token, made)

    def _following(self, at: LLMatcher) -> int:
        """Return a token that may follow: one that must, where some must."""
        if forced := at.compute_ff_tokens():
            return forced[0]
        bits = np.unpackbits(np.frombuffer(at.compute_bitmask(), np.uint8), count=self.vocabulary, bitorder="little")
        return int(self._random.choice(np.flatnonzero(bits)))


def _go_on(at: LLMatcher | None, tokens: Sequence[int]) -> None:
    if at is not None:
        at.try_consume_tokens(list(tokens))


class Recited:
    """What is served of no model: a tokenizer, grammars, and an engine over a device that recites."""

    name, variant = "no model", "its own logits"

    def __init__(
        self,
        path: Path,
        schema: object,
        streams: int,
        errs: float,
        outlet: Outlet,
        observer: Observer,
        clock: Callable[[], float],
    ) -> None:
        """Take a tokenizer.json, and the schema that the device knows; the clock is that of the engine.

        Raises:
            InputError: the tokenizer cannot be read, or has no special token that may end an answer.
        """
        self.tokenizer = Tokenizer(path)
        size, ends = self.tokenizer.largest + 1, [self.tokenizer.token(name) for name in self.tokenizer.special]
        if not ends:
            raise InputError(f"{path}: the tokenizer has no special token, so no answer can end: name another recipe")
        end = max(int(token) for token in ends if token is not None)
        self.grammars = Grammars(path, size, [end])
        self.step = RecitingStep(streams, size, end, _matcher(path, size, end, schema), errs)
        speculation = Speculation(lookup=False)
        self.engine = Engine(
            self.step, Fcfs(), self._text, outlet, observer=observer, speculation=speculation, clock=clock
        )

    @staticmethod
    def prompt(held: bool) -> tuple[int, ...]:
        """Return the prompt that the device follows the schema behind, or one behind which it says anything."""
        return (HELD if held else FREE,)

    def close(self) -> None:
        """End what runs."""
        self.engine.close()

    def _text(self, request: Request, ends: frozenset[int]) -> Text:
        return Text(self.tokenizer.decoder(request.prompt), tuple(ends), request.params.stops)


def _matcher(path: Path, size: int, end: int, schema: object) -> LLMatcher:
    """Return the beginning of an answer, for the device alone."""
    from llguidance import LLMatcher, LLTokenizer

    grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), {"whitespace_pattern": WHITESPACE})
    return LLMatcher(LLTokenizer(path.read_text(), n_vocab=size, eos_token=[end]), grammar, log_level=0)
