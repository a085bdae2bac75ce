"""Interface to the tokenizers library: text to tokens and back, each by one rule and with one kind of error.

A `tokenizer.json` may carry settings of a training run: truncation, padding, dropout. They are switched off. The
tokens that the file's post-processor prepends to a text are kept; those that it appends would end the prompt, and are
left out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryFile
from threading import Lock
from typing import Any

from llmbuild.errors import InputError
from llmbuild.runtime import checks, detokenize

_TEXT_ID = 2**32 - 1
"""The largest possible id, of a text that only the post-processor sees."""


_PROBE = "aB 1.é€"
"""Characters of several kinds and lengths."""


@contextmanager
def _library_errors(what: str) -> Iterator[None]:
    """Turn every error of the library into an `InputError`; its panics are a `BaseException` without a module."""
    try:
        yield
    except (InputError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # noqa: BLE001 - the library's errors and panics have no common class
        said = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{what}: {said[:300]}") from None


_alone = Lock()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep a panic's own report off the terminal: the `InputError` has its message. Other output is passed on."""
    with _alone, TemporaryFile() as place:
        try:
            kept = os.dup(2)
        except OSError:  # there is no standard error to redirect
            yield
            return
        try:
            os.dup2(place.fileno(), 2)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            place.seek(0)
            said = place.read()
            if said and b"panicked at" not in said:
                os.write(2, said)


@dataclass(frozen=True)
class Encoded:
    """The tokens of a text. `before` are the names of those that the tokenizer prepended."""

    tokens: tuple[int, ...]
    before: tuple[str, ...] = ()

    @property
    def ids(self) -> list[int]:
        """The tokens as a list."""
        return list(self.tokens)


class Tokenizer:
    """A `tokenizer.json`."""

    def __init__(self, path: str | Path) -> None:
        """Read the file.

        Raises:
            InputError: missing, or a tokenizer that the library or `detokenize` does not support.
        """
        self.path = Path(path)
        from tokenizers import Tokenizer as Library

        with _library_errors(f"{self.path}: the tokenizer cannot be read"), _quiet():
            found = _settled(Library.from_file(str(self.path)))
            self._library: Any = found
            self._before, self.behind = _around(found.post_processor)
            found.encode(_PROBE, add_special_tokens=False)  # some errors of a file appear with the first text
            added = self._added = tuple(found.get_added_tokens_decoder().values())
        self.special = frozenset(token.content for token in added if token.special and token.content)
        self.added = frozenset(token.content for token in added if not token.special and token.content)
        """Names of the special tokens, and of the other tokens that are found in a text before it is split."""
        self._late = frozenset(token.content for token in added if token.normalized and found.normalizer is not None)
        self._one_at_a_time = Lock()
        self._shown: dict[int, str | None] = {}

    @cached_property
    def _stages(self) -> list[detokenize.Stage]:
        with _library_errors(f"{self.path}: the tokenizer's decoder cannot be read"):
            decoder = self._library.decoder
            state = None if decoder is None else json.loads(decoder.__getstate__())
            try:
                return detokenize.stages(state)
            except KeyError as error:
                known = ", ".join(detokenize.KNOWN)
                raise InputError(f"{self.path}: decoder {error} is not supported; taken are {known}") from None

    @property
    def largest(self) -> int:
        """The largest token that a text can contain; -1 where there is none."""
        return max(self._library.get_vocab().values(), default=-1)

    def encode(self, text: str, add_special_tokens: bool = True) -> Encoded:
        """Return the tokens of a prompt's text.

        With `add_special_tokens`, the tokens that the tokenizer prepends come first, each once: a text that already
        begins with one of them keeps its own.

        Raises:
            InputError: not a text, or the library rejects it.
        """
        checks.text("the text", text)
        with _library_errors(f"{self.path}: the text cannot be tokenized"):
            own = tuple(self._library.encode(text, add_special_tokens=False).ids)
        if not add_special_tokens or not self._before:
            return Encoded(own)
        missing = self._before[: self._before.index(own[0])] if own and own[0] in self._before else self._before
        return Encoded(missing + own, tuple(self.name(token) for token in missing))

    def encode_chat(self, rendered: str, stand_ins: Mapping[str, str] | None = None) -> Encoded:
        """Return the tokens of a chat that its template has rendered: the template contains all special tokens.

        `stand_ins` are characters of `rendered`, each with the character that it is in a token: one that is not part
        of a special token's name. Each such name must be one that `can_be_text`.

        Raises:
            InputError: as `encode`.
        """
        if not stand_ins:
            return self.encode(rendered, add_special_tokens=False)
        checks.text("the text", rendered)
        with _library_errors(f"{self.path}: the text cannot be tokenized"), self._one_at_a_time:
            return Encoded(tuple(self._restoring(stand_ins).encode(rendered, add_special_tokens=False).ids))

    def can_be_text(self, name: str) -> bool:
        """Return whether a text that is an added token's name can be read as plain text.

        It cannot where the library looks for the name after it has normalized a text.
        """
        return name not in self._late

    def token(self, name: str) -> int | None:
        """Return the token of a string in the vocabulary; None where there is none."""
        found = self._library.token_to_id(name)
        return None if found is None else int(found)

    @cached_property
    def _second(self) -> Any:
        """The same tokenizer once more, to change its normalizer; all that `can_be_text` is found before that."""
        from tokenizers import Tokenizer as Library

        late = self._library.normalizer is None and any(t.normalized for t in self._added)
        if not late:
            return _settled(Library.from_file(str(self.path)))
        state = json.loads(self._library.to_str())
        tokens = [{**token, "normalized": False} for token in state["added_tokens"]]  # a text is as it is
        return Library.from_str(json.dumps({**state, "added_tokens": tokens}))

    def _restoring(self, stand_ins: Mapping[str, str]) -> Any:
        """Return a tokenizer whose normalizer restores characters first, after it has found the added tokens."""
        from tokenizers import normalizers

        own = self._library.normalizer
        steps = [normalizers.Replace(stand_in, one) for stand_in, one in stand_ins.items()]
        self._second.normalizer = normalizers.Sequence([*steps, *([] if own is None else [own])])
        return self._second

    def name(self, token: int) -> str:
        """Return a token's string in the vocabulary; `<N>` where the vocabulary lacks it."""
        found = self._library.id_to_token(token)
        return f"<{token}>" if found is None else str(found)

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes that a token adds to a text; the name of one that is not shown.

        A character may be spread over several tokens.
        """
        text = self._text_of(token)
        if text is None:
            return self.name(token).encode()
        if any(isinstance(stage, detokenize.ByteLevel) for stage in self._stages):
            return detokenize.level_bytes(text)
        if (byte := detokenize.fallback_byte(text)) is not None:
            return byte
        made = self.decoder()
        made.push(token)
        return made.push(token).encode()  # the second: the first of a text may lose a space

    def decoder(self, before: Sequence[int] = ()) -> detokenize.Decoder:
        """Return an incremental decoder of the tokens that follow `before`; special tokens are not shown."""
        made = detokenize.Decoder(self._stages, self._text_of)
        made.begin(before)
        return made

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens; special tokens and those outside the vocabulary are not shown.

        Raises:
            InputError: not tokens.
        """
        ids = checks.tokens("tokens", tokens)
        with _library_errors(f"{self.path}: the tokens cannot be made text"):
            made = self.decoder()
            return "".join([*map(made.push, ids), made.end()])

    def _text_of(self, token: int) -> str | None:
        if token not in self._shown:
            with _library_errors(f"{self.path}: token {token} cannot be made text"):
                found = self._library.id_to_token(token)
            self._shown[token] = None if found in self.special else found
        return self._shown[token]


def _settled(found: Any) -> Any:
    """Return a tokenizer of the library without what a training run sets."""
    found.no_truncation()
    found.no_padding()
    if getattr(found.model, "dropout", None) is not None:
        found.model.dropout = None
    return found


def _around(post_processor: Any) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return the tokens that a post-processor prepends to a text, and the names of those that it appends.

    Raises:
        InputError: it changes a text in another way.
    """
    if post_processor is None:
        return (), ()
    from tokenizers import Tokenizer as Library
    from tokenizers.models import WordLevel

    probe = Library(WordLevel({"a": _TEXT_ID}, unk_token="a"))
    probe.post_processor = post_processor
    made = probe.encode("a")
    if made.ids.count(_TEXT_ID) != 1:
        raise InputError("its post-processor does not put the text once into what it makes")
    at = made.ids.index(_TEXT_ID)
    return tuple(made.ids[:at]), tuple(made.tokens[at + 1 :])
