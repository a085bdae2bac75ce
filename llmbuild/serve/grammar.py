"""Answers of a form: grammars made of JSON schemas, and the tokens that each lets follow.

The library is llguidance. It raises nothing: every matcher is asked whether it has failed.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llmbuild import digest
from llmbuild.errors import InputError
from llmbuild.serve.errors import RequestRefused

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

KEPT = 64
"""Compiled grammars that are kept."""
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,8}"
"""Between the parts of an answer: without a bound, a model may go on with line breaks for ever."""


class Matching:
    """Where one answer is in its grammar."""

    def __init__(self, matcher: LLMatcher, vocabulary: int) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary
        self._bits = np.zeros((vocabulary + 31) // 32, np.uint32)
        self._at, self._bytes = self._bits.ctypes.data, self._bits.nbytes

    def allowed(self) -> NDArray[np.int64]:
        """Return the tokens that may follow, by id, in ascending order.

        Raises:
            InputError: the matcher has failed.
        """
        self._matcher.unsafe_compute_mask_ptr(self._at, self._bytes)
        self._check()
        bits = np.unpackbits(self._bits.view(np.uint8), count=self._vocabulary, bitorder="little")
        return np.flatnonzero(bits.view(np.bool_))

    def tries(self, token: int) -> bool:
        """Take a token if it may follow, and return whether it was taken. This costs no more than to take it.

        An end token may be refused that `allowed` has: where nothing but the end may follow, ask `allowed`.

        Raises:
            InputError: the matcher has failed.
        """
        taken = self._matcher.try_consume_tokens([token]) == 1
        self._check()
        return taken

    def forced(self) -> list[int]:
        """Return the tokens that must follow as text, split as the tokenizer would split it."""
        return self._matcher.compute_ff_tokens()

    def take(self, token: int) -> None:
        """Take the token that follows.

        Raises:
            InputError: it may not.
        """
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InputError(f"the answer has left its grammar: {self._matcher.get_error()[:200]}")


class Grammar:
    """A compiled grammar; each answer begins at its beginning."""

    def __init__(self, matcher: LLMatcher, vocabulary: int) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary

    def begin(self) -> Matching:
        """Return the beginning of an answer."""
        return Matching(self._matcher.deep_copy(), self._vocabulary)


class Grammars:
    """Compiles the grammars of one model, and keeps the last ones; for any thread."""

    def __init__(self, tokenizer: Path, vocabulary: int, ends: Sequence[int]) -> None:
        self._path, self._vocabulary, self._ends = tokenizer, vocabulary, list(ends)
        self._kept: OrderedDict[str, Grammar] = OrderedDict()
        self._tokenizer: LLTokenizer | None = None
        self._turn = Lock()

    def of_schema(self, name: str, schema: object) -> Grammar:
        """Return the grammar of a JSON schema.

        Raises:
            RequestRefused: the schema has what is not supported, or the model's tokenizer or end tokens are not.
        """
        from llguidance import LLMatcher

        def written() -> str:
            return LLMatcher.grammar_from_json_schema(json.dumps(schema), {"whitespace_pattern": WHITESPACE})

        return self._found(name, "the schema", digest.of(schema), written)

    def of_text(self, name: str, grammar: str) -> Grammar:
        """Return the grammar that is written in llguidance's Lark.

        Raises:
            RequestRefused: it has what is not supported, or the model's tokenizer or end tokens are not.
        """
        return self._found(name, "a schema", digest.of({"lark": grammar}), lambda: grammar)

    def _found(self, name: str, what: str, key: str, written: Callable[[], str]) -> Grammar:
        with self._turn:
            if key not in self._kept:
                self._kept[key] = self._compiled(name, what, written)
                if len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            return self._kept[key]

    def _compiled(self, name: str, what: str, written: Callable[[], str]) -> Grammar:
        from llguidance import LLMatcher

        try:
            matcher = LLMatcher(self._opened(name), written(), log_level=0)
        except ValueError as error:
            raise RequestRefused(f"{name}: {str(error)[:300]}", name) from None
        if matcher.is_error():
            raise RequestRefused(f"{name}: {what} is not supported: {matcher.get_error()[:300]}", name)
        made = Grammar(matcher, self._vocabulary)
        try:  # some faults appear with the first token: here nobody else waits for them
            made.begin().allowed()
        except InputError as error:
            raise RequestRefused(f"{name}: {what} lets no answer begin: {error}", name) from None
        return made

    def _opened(self, name: str) -> LLTokenizer:
        from llguidance import LLTokenizer

        if not self._ends:
            raise RequestRefused(f"{name} is not supported: the model has no end token", name)
        if self._tokenizer is None:
            self._tokenizer = LLTokenizer(self._path.read_text(), n_vocab=self._vocabulary, eos_token=self._ends)
        return self._tokenizer
