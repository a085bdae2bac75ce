"""A model's chat template: from messages to the tokens of a prompt.

Messages are data. A text in them that names a control token, such as `<|im_end|>`, is read as plain text: only the
template itself begins and ends a turn. The first character of such a name is replaced before the template renders it,
and the tokenizer restores it after it has looked for control tokens. A chat without such a name is tokenized as the
library does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from llmbuild import digest
from llmbuild.errors import InputError
from llmbuild.runtime import checks
from llmbuild.system.strict_json import loads

if TYPE_CHECKING:
    from jinja2 import Template

    from llmbuild.runtime.tokenizer import Encoded, Tokenizer

NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")
"""Special tokens that a template may name."""
USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
_TRUSTED = (ASSISTANT, SYSTEM, "developer")
"""Roles whose text may name an added token that is not special, such as `<think>`, and means the token."""
_SPARE = range(0x10F000, 0x10FFFE)
"""Characters of private use that stand in for others."""

Message: TypeAlias = Mapping[str, object]
"""A `role` and a `content`, both texts, and what else a template may read: values as of JSON."""

Tool: TypeAlias = Mapping[str, object]
"""A function that a model may call: a `type` and a `function`, values as of JSON."""


@dataclass(frozen=True)
class ChatTemplate:
    """A template of Jinja2, and the texts of the special tokens that it may name."""

    template: str
    tokens: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def read(path: Path) -> ChatTemplate:
        """Read a catalog's blob.

        Raises:
            InputError: it cannot be read, or is no chat template.
        """
        try:
            return ChatTemplate.of(path.read_bytes(), str(path))
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None

    @staticmethod
    def of(blob: bytes, called: str) -> ChatTemplate:
        """Return the template in the bytes that a catalog keeps; `called` names them in a message.

        Raises:
            InputError: they are no chat template.
        """
        try:
            found = loads(blob)
        except ValueError:
            found = None
        if not isinstance(found, dict) or not {"template"} <= found.keys() <= {"template", *NAMED}:
            raise InputError(f"{called}: not a chat template that this llmbuild reads")
        texts = {name: checks.text(f"{called}: {name}", value) for name, value in found.items()}
        return ChatTemplate(texts.pop("template"), texts)

    def blob(self) -> bytes:
        """Return the bytes that a catalog keeps; equal templates have equal bytes."""
        return digest.canonical({"template": self.template, **self.tokens}).encode()

    def fault(self) -> str:
        """Return why the template cannot be rendered whatever the messages; empty where it can."""
        try:
            self._compiled  # noqa: B018 - compiled on access
        except InputError as error:
            return str(error)
        return ""

    def render(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> str:
        """Return the text of a chat, up to where the model answers.

        Raises:
            InputError: not messages, or the template refuses them or fails.
        """
        return self._rendered(checked(messages), _tools(tools))

    def encode(self, messages: Sequence[Message], tokenizer: Tokenizer, tools: Sequence[Tool] = ()) -> Encoded:
        """Return the tokens of a chat, up to where the model answers; control tokens are the template's alone.

        `tools` are functions that the model may call, as OpenAI's API has them.

        Raises:
            InputError: as `render`, or a control token's name that this tokenizer cannot read as plain text.
        """
        found, offered = checked(messages), _tools(tools)
        written = self._written(tokenizer)
        controls = [[*tokenizer.special, *([] if m["role"] in _TRUSTED else written)] for m in found]
        named = [
            (i, name)
            for i, (message, names) in enumerate(zip(found, controls, strict=True))
            for name in names
            if any(name in text for text in _texts(message))
        ]
        every = [*tokenizer.special, *written]
        named += [(-1, name) for name in every if any(name in text for text in _texts(offered))]
        if not named:
            return tokenizer.encode_chat(self._rendered(found, offered))
        for i, name in named:
            if not tokenizer.can_be_text(name):
                told = f"messages[{i}] has" if i >= 0 else "a tool has"
                told = f"{told} the text {name!r}, the name of a control token"
                raise InputError(f"{told}: this model's tokenizer cannot read it as plain text: leave it out")
        texts = [self.template, *chain(*map(_texts, found)), *_texts(offered)]
        stand_ins = _stand_ins({name[0] for _, name in named}, texts)

        def guarded(names: Sequence[str]) -> Callable[[str], str]:
            return lambda text: _without(text, names, stand_ins)

        safe = [_changed(message, guarded(names)) for message, names in zip(found, controls, strict=True)]
        rendered = self._rendered(safe, _changed(offered, guarded(every)))
        return tokenizer.encode_chat(rendered, {own: one for one, own in stand_ins.items()})

    def ends(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Return the tokens that end an answer, besides those of the model: the template's end token."""
        end = tokenizer.token(self.tokens["eos_token"]) if "eos_token" in self.tokens else None
        return () if end is None else (end,)

    @cached_property
    def _compiled(self) -> Template:
        from llmbuild.runtime import sandbox

        return sandbox.compiled(self.template)

    @cached_property
    def _literals(self) -> str:
        from llmbuild.runtime import sandbox

        return sandbox.literals(self.template)

    def _rendered(self, messages: object, tools: object = None) -> str:
        from llmbuild.runtime import sandbox

        given: dict[str, object] = {**self.tokens, "messages": messages, "tools": tools or None, "documents": None}
        return sandbox.rendered(self._compiled, **given, add_generation_prompt=True)

    def _written(self, tokenizer: Tokenizer) -> list[str]:
        """Return the added tokens that are not special and that the template writes itself.

        Some models mark the beginning of a turn with one. Words and spaces among them are vocabulary.
        """
        marks = (name for name in tokenizer.added if not name.isspace() and not name.strip().isalnum())
        return [name for name in marks if name in self._literals]


def checked(messages: object) -> list[dict[str, object]]:
    """Return copies of messages.

    Raises:
        InputError: not a list of messages, or one has no role or no content.
    """
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence):
        raise InputError(f"messages is a {type(messages).__name__}; it must be a list of messages")
    if not messages:
        raise InputError("messages is empty: give at least one")
    found = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InputError(f"messages[{i}] is a {type(message).__name__}; it must have a role and a content")
        told = {name: checks.text(f"messages[{i}].{name}", message.get(name)) for name in ("role", "content")}
        found.append({**_plain(f"messages[{i}]", message), **told})
    return found


def _tools(tools: Sequence[Tool]) -> list[object]:
    """Return copies of tools."""
    return [_value(f"tools[{i}]", tool) for i, tool in enumerate(tools)]


def _plain(name: str, values: Mapping[object, object]) -> dict[str, object]:
    return {checks.text(f"a key of {name}", key): _value(f"{name}.{key}", value) for key, value in values.items()}


def _value(name: str, value: object) -> object:
    """Return a copy of a value as of JSON."""
    if isinstance(value, str):
        return checks.text(name, value)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return _plain(name, value)
    if isinstance(value, (list, tuple)):
        return [_value(f"{name}[{i}]", one) for i, one in enumerate(value)]
    raise InputError(f"{name} is a {type(value).__name__}; it must be a value as of JSON")


def _texts(value: object) -> Iterator[str]:
    """Yield all texts in a value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from chain(value, *map(_texts, value.values()))
    elif isinstance(value, list):
        yield from chain(*map(_texts, value))


def _changed(value: object, change: Callable[[str], str]) -> object:
    """Return a value with every text in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _changed(one, change) for key, one in value.items()}
    return [_changed(one, change) for one in value] if isinstance(value, list) else value


def _stand_ins(characters: set[str], texts: Iterable[str]) -> dict[str, str]:
    """Return a character of private use for each of `characters`, none of them in `texts`.

    Raises:
        InputError: there are not enough.
    """
    used = set(chain(*texts))
    free = (own for own in map(chr, _SPARE) if own not in used)
    found = dict(zip(sorted(characters), free, strict=False))
    if len(found) < len(characters):
        raise InputError("messages have all characters of private use, and the name of a control token: leave it out")
    return found


def _without(text: str, names: Iterable[str], stand_ins: Mapping[str, str]) -> str:
    """Return a text in which none of `names` occurs: the first character of each is replaced."""
    at = {i for name in names for i in _places(text, name)}
    return "".join(stand_ins[one] if i in at else one for i, one in enumerate(text)) if at else text


def _places(text: str, name: str) -> Iterator[int]:
    """Yield where a name occurs, also where it overlaps itself."""
    at = text.find(name)
    while at >= 0:
        yield at
        at = text.find(name, at + 1)
