"""Incremental detokenization: an emitted piece never changes, and all pieces joined are the whole text.

A decoder of the tokenizers library is a chain of stages. Here each stage takes parts of tokens, emits the text that
is final, and holds the rest back: the first bytes of a character, or a space that the end of the text would remove.
The output equals the library's text of the same tokens, with one exception: where the bytes of a byte-fallback
tokenizer are not UTF-8, the library emits a U+FFFD for every byte of the run, including those of whole characters
that were already emitted. Here only the invalid bytes become U+FFFD, as in the library's byte-level decoder.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from functools import lru_cache

from llmbuild.system.strict_json import JsonObject

Parts = list[tuple[str, bool]]
"""Text, and whether its token ends with it."""

_BYTE = re.compile(r"<0x(\+[0-9A-Fa-f]|[0-9A-Fa-f]{2})>")


def _byte_of_character() -> dict[str, int]:
    """Return GPT-2's table: printable bytes map to themselves, the others to characters from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


BYTES = _byte_of_character()
"""The byte of each character of a byte-level token."""


@lru_cache(maxsize=1 << 13)
def level_bytes(token: str) -> bytes:
    """Return the bytes of a byte-level token; one with a character outside the table is text as it is."""
    found = [BYTES.get(character) for character in token]
    return token.encode() if None in found else bytes(byte for byte in found if byte is not None)


def fallback_byte(token: str) -> bytes | None:
    """Return the byte that a token such as `<0xE2>` stands for; None for any other."""
    found = _BYTE.fullmatch(token)
    return bytes([int(found[1], 16)]) if found else None


class Stage:
    """One stage of a decoder. Its state is immutable values, so that a shallow copy is a full copy."""

    def feed(self, parts: Parts) -> Parts:
        """Take parts of tokens and return the final parts of the stage's own tokens."""
        raise NotImplementedError

    def end(self) -> Parts:
        """Return what is held back: the text has ended."""
        return []


class _Whole(Stage):
    """Base of the stages that need a whole token."""

    _held = ""

    def feed(self, parts: Parts) -> Parts:
        found: Parts = []
        for text, ends in parts:
            self._held += text
            if ends:
                token, self._held = self._held, ""
                found += self.take(token)
        return found

    def take(self, token: str) -> Parts:
        """Take one token and return the text that is final."""
        raise NotImplementedError


class _Utf8(_Whole):
    """Base of the stages that collect bytes: the first bytes of a character wait for the others."""

    _bytes = b""

    def text(self, data: bytes, final: bool = False) -> str:
        """Return the complete characters; an invalid byte becomes U+FFFD."""
        data = self._bytes + data
        found, used = codecs.utf_8_decode(data, "replace", final)
        self._bytes = data[used:]
        return found


class ByteLevel(_Utf8):
    """Each character of a token is a byte; all tokens form one text."""

    def take(self, token: str) -> Parts:
        """Return the text of a token's bytes; a token with a character outside the table is text as it is."""
        return [(self.text(level_bytes(token)), False)]

    def end(self) -> Parts:
        return [(self.text(b"", final=True), True)]


class ByteFallback(_Utf8):
    """Tokens such as `<0xE2>` are bytes; a run of them forms one text."""

    _open = False

    def take(self, token: str) -> Parts:
        """Return a token as it is, and the text of a byte."""
        if (byte := fallback_byte(token)) is not None:
            self._open = True
            return [(self.text(byte), False)]
        return [*self.end(), (token, True)]

    def end(self) -> Parts:
        if not self._open:
            return []
        self._open = False
        return [(self.text(b"", final=True), True)]


class Fuse(Stage):
    """All tokens become one token."""

    def feed(self, parts: Parts) -> Parts:
        return [(text, False) for text, _ in parts]

    def end(self) -> Parts:
        return [("", True)]


class Metaspace(Stage):
    """A marker character replaces a space; in the first token it is dropped where the tokenizer inserted it."""

    def __init__(self, sign: str, first: str) -> None:
        self._sign, self._becomes = sign, first

    def feed(self, parts: Parts) -> Parts:
        found: Parts = []
        for text, ends in parts:
            found.append((text.replace(self._sign, self._becomes), ends))
            if ends:
                self._becomes = " "
        return found


class Replace(Stage):
    """A pattern inside a token is replaced."""

    _held = ""

    def __init__(self, pattern: str, content: str) -> None:
        self._pattern, self._content = pattern, content

    def feed(self, parts: Parts) -> Parts:
        return [(self._replaced(text, ends), ends) for text, ends in parts]

    def _replaced(self, text: str, ends: bool) -> str:
        """Return the final text: the end of a text may be a prefix of the pattern."""
        *before, rest = (self._held + text).split(self._pattern)
        keep = 0 if ends else overlap(rest, self._pattern)
        self._held = rest[len(rest) - keep :]
        return self._content.join([*before, rest[: len(rest) - keep]])


class Strip(Stage):
    """A character is stripped, up to a number of times, from the start and the end of a token."""

    _held = ""

    def __init__(self, content: str, start: int, stop: int) -> None:
        self._content, self._start, self._stop = content, start, stop
        self._left = start

    def feed(self, parts: Parts) -> Parts:
        return [(self._stripped(text, ends), ends) for text, ends in parts]

    def _stripped(self, text: str, ends: bool) -> str:
        begins = min(self._left, len(text) - len(text.lstrip(self._content)))
        self._left = self._left - begins if begins == len(text) else 0
        text = self._held + text[begins:]
        tail = min(self._stop, len(text) - len(text.rstrip(self._content)))
        certain, self._held = text[: len(text) - tail], text[len(text) - tail :]
        if ends:
            self._held, self._left = "", self._start
        return certain


class Spaced(_Whole):
    """Tokens are separated by a space, as the library joins them where a tokenizer has no decoder."""

    _between = ""

    def take(self, token: str) -> Parts:
        """Return a token, preceded by a space unless it is the first."""
        between, self._between = self._between, " "
        return [(between + token, True)]


class Suffixed(_Whole):
    """A suffix marks the end of a word; it becomes a space where another token follows."""

    _due: Parts | None = None
    _last = ""

    def __init__(self, suffix: str) -> None:
        self._suffix = suffix

    def take(self, token: str) -> Parts:
        """Return the rest of the previous token, and this token up to its suffix."""
        before = self._due or []
        marked = bool(self._suffix) and token.endswith(self._suffix)
        head = token[: len(token) - len(self._suffix)] if marked else token
        if self._suffix in head:  # also where the suffix is empty: the library replaces it between all characters
            self._due, self._last = [(token.replace(self._suffix, " "), True)], token.replace(self._suffix, "")
            return before
        self._due, self._last = [(" " if marked else "", True)], ""
        return [*before, (head, False)]

    def end(self) -> Parts:
        if self._due is None:
            return []
        last, self._due, self._last = self._last, None, ""
        return [(last, True)]


class Local(_Whole):
    """A library stage that processes one token at a time and depends on whether it is the first."""

    _first = True

    def __init__(self, decode: Callable[[Sequence[str]], str]) -> None:
        self._decode = decode

    def take(self, token: str) -> Parts:
        """Return the library's output for a token."""
        tokens = [token] if self._first else ["", token]
        self._first = False
        return [(self._decode(tokens), True)]


class Collapsed(_Whole):
    """A token that repeats the previous one is dropped; so is one whose text becomes empty."""

    _before: str | None = None

    def __init__(self, decode: Callable[[Sequence[str]], str]) -> None:
        self._decode = decode

    def take(self, token: str) -> Parts:
        """Return the library's output for a token."""
        repeated, self._before = token == self._before, token
        text = "" if repeated else self._decode([token])
        return [(text, True)] if text else []


def overlap(text: str, pattern: str) -> int:
    """Return how many of a text's last characters may be a prefix of `pattern`; the text does not contain `pattern`."""
    most = min(len(pattern) - 1, len(text))
    return next((n for n in range(most, 0, -1) if pattern.startswith(text[len(text) - n :])), 0)


def stages(state: JsonObject | None) -> list[Stage]:
    """Return the stages of a decoder from its JSON form.

    Raises:
        KeyError: an unsupported type of decoder.
    """
    if state is None:
        return [Spaced()]
    if state["type"] == "Sequence":
        return [stage for one in state["decoders"] for stage in stages(one)]
    return [_STAGES[state["type"]](state)]


def _metaspace(state: JsonObject) -> Stage:
    return Metaspace(state["replacement"], " " if state.get("prepend_scheme") == "never" else "")


def _replace(state: JsonObject) -> Stage:
    from tokenizers import Regex, decoders

    ((kind, pattern),) = state["pattern"].items()
    if kind == "String" and pattern:
        return Replace(pattern, state["content"])
    matched = Regex(pattern) if kind == "Regex" else pattern
    alone = decoders.Replace(matched, state["content"])
    return _EachAlone(alone.decode)


class _EachAlone(_Whole):
    """A library stage that treats all tokens alike."""

    def __init__(self, decode: Callable[[Sequence[str]], str]) -> None:
        self._decode = decode

    def take(self, token: str) -> Parts:
        return [(self._decode([token]), True)]


def _word_piece(state: JsonObject) -> Stage:
    from tokenizers import decoders

    return Local(decoders.WordPiece(prefix=state["prefix"], cleanup=state["cleanup"]).decode)


def _ctc(state: JsonObject) -> Stage:
    from tokenizers import decoders

    words = {name: state[name] for name in ("pad_token", "word_delimiter_token", "cleanup")}
    return Collapsed(decoders.CTC(**words).decode)


_STAGES: Mapping[str, Callable[[JsonObject], Stage]] = {
    "ByteLevel": lambda _: ByteLevel(),
    "ByteFallback": lambda _: ByteFallback(),
    "Fuse": lambda _: Fuse(),
    "Metaspace": _metaspace,
    "Replace": _replace,
    "Strip": lambda state: Strip(state["content"], state["start"], state["stop"]),
    "WordPiece": _word_piece,
    "BPEDecoder": lambda state: Suffixed(state["suffix"]),
    "CTC": _ctc,
}

KNOWN = tuple(_STAGES)
"""Supported types of decoders; a sequence of them is supported too."""


class Decoder:
    """The text of one sequence of tokens, incrementally."""

    def __init__(self, made: Iterable[Stage], text_of: Callable[[int], str | None]) -> None:
        """Take the stages, new or copied, and a function from a token to its text (None: not shown)."""
        self._stages = [copy(stage) for stage in made]
        self._text_of = text_of
        self._prefix = ""

    def begin(self, tokens: Iterable[int]) -> None:
        """Take the tokens that precede the text; their text is not emitted."""
        for token in tokens:
            self.push(token)
        self._prefix = Decoder(self._stages, self._text_of).end()

    def push(self, token: int) -> str:
        """Take one token and return the text that is now final."""
        text = self._text_of(token)
        return "" if text is None else self._out([(text, True)], ends=False)

    def end(self) -> str:
        """Return what is held back; an incomplete character becomes U+FFFD."""
        return self._out([], ends=True)

    def _out(self, parts: Parts, ends: bool) -> str:
        for stage in self._stages:
            parts = stage.feed(parts)
            if ends:
                parts += stage.end()
        return self._without_prefix("".join(text for text, _ in parts))

    def _without_prefix(self, text: str) -> str:
        """Remove the held-back text of the preceding tokens: it belongs to them."""
        if not self._prefix or not text:
            return text
        if text.startswith(self._prefix):
            text, self._prefix = text[len(self._prefix) :], ""
        elif self._prefix.startswith(text):
            text, self._prefix = "", self._prefix[len(text) :]
        else:
            self._prefix = ""
        return text
