"""Calls of tools in answers: the forms in which models write them, the grammars of these, and the parser of a stream.

Hermes and Qwen write `<tool_call>`, JSON with `name` and `arguments`, and `</tool_call>`, between texts or alone.
Llama 3 writes JSON with `name` and `parameters` in place of a text.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from llmbuild.system.strict_json import JsonObject, loads

Form = Literal["hermes", "llama3"]
Choice = Literal["auto", "required"]

BEGIN, END = "<tool_call>", "</tool_call>"
_ARGUMENTS: Mapping[Form, str] = {"hermes": "arguments", "llama3": "parameters"}


@dataclass(frozen=True)
class Tool:
    """A function that a model may call: its name, and the JSON schema of its arguments."""

    name: str
    schema: JsonObject


@dataclass(frozen=True)
class Tools:
    """The functions of a request. With `required`, an answer is calls alone; without `several`, it has one at most."""

    form: Form
    offered: tuple[Tool, ...]
    choice: Choice = "auto"
    several: bool = True

    @property
    def names(self) -> frozenset[str]:
        """Names of the functions."""
        return frozenset(tool.name for tool in self.offered)


@dataclass(frozen=True)
class Call:
    """A call of a function; `arguments` is JSON."""

    name: str
    arguments: str


def form_of(template: str) -> Form | None:
    """Return in which form the model of a chat template writes calls; None where the template takes no tools."""
    if "tools" not in template:
        return None
    if BEGIN in template:
        return "hermes"
    return "llama3" if '"parameters"' in template else None


def grammar_of(tools: Tools, whitespace: str, tokens: Collection[str]) -> str | None:
    """Return the grammar of answers, in llguidance's Lark; None where any text may come.

    `whitespace` is a regular expression of what may stand between the parts of JSON. `tokens` are the tokens of the
    vocabulary that are found in a text before it is split: a tag that is one of them is that token, and no text.
    """
    if tools.form == "llama3" and tools.choice == "auto":
        return None  # a text may begin as a call does
    body = json.dumps({**_body(tools), "x-guidance": {"whitespace_pattern": whitespace}})
    if tools.form == "llama3":
        return f"%llguidance {{}}\nstart: %json {body}\n"
    begin, end = (tag if tag in tokens else json.dumps(tag) for tag in (BEGIN, END))
    rules = f'%llguidance {{}}\ncall: head "\\n" body "\\n" {end}\nbody: %json {body}\n'
    if tools.choice == "required":
        more = ' ("\\n" call)*' if tools.several else ""
        return f"{rules}start: call{more}\nhead: {begin}\n"
    lazy = "" if BEGIN in tokens else "[lazy]"  # a text ends where the tag begins
    calls = "call*" if tools.several else "call?"
    return f"{rules}start: {calls} rest\nrest: TEXT\nhead{lazy}: TEXT {begin}\nTEXT: /(.|\\n)*/\n"


def _body(tools: Tools) -> JsonObject:
    """Return the schema of a call."""
    place = _ARGUMENTS[tools.form]
    each: list[JsonObject] = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.name}, place: tool.schema},
            "required": ["name", place],
            "additionalProperties": False,
        }
        for tool in tools.offered
    ]
    return each[0] if len(each) == 1 else {"anyOf": each}


class Parser:
    """Finds the calls in an answer while it comes; what is no call is text, and none of it is lost."""

    def __init__(self, tools: Tools) -> None:
        self._tools, self._held = tools, ""
        self._inside = False
        self.calls: list[Call] = []

    def push(self, text: str) -> str:
        """Take more of the answer; return the text that is certainly no part of a call. Calls are added when whole."""
        self._held += text
        if self._tools.form == "llama3":
            return "" if self._held.lstrip()[:1] in ("", "{") else self._flushed()
        found = ""
        while True:
            if not self._inside:
                before, tag, rest = self._held.partition(BEGIN)
                if not tag:
                    keep = _overlap(self._held, BEGIN)
                    found += self._held[: len(self._held) - keep]
                    self._held = self._held[len(self._held) - keep :]
                    return found
                found, self._held, self._inside = found + before, rest, True
            body, tag, rest = self._held.partition(END)
            if not tag:
                return found
            self._held, self._inside = rest, False
            if not self._add(body):
                found += f"{BEGIN}{body}{END}"

    def end(self) -> str:
        """Return the text that was held back and is no call."""
        held, inside = self._flushed(), self._inside
        if self._tools.form == "llama3":
            return "" if held.strip() and self._add(held) else held
        return f"{BEGIN}{held}" if inside else held

    def _flushed(self) -> str:
        held, self._held = self._held, ""
        return held

    def _add(self, body: str) -> bool:
        """Add a call; return whether it is one of a function that there is."""
        if self.calls and not self._tools.several:
            return False
        try:
            told = loads(body)
        except ValueError:
            return False
        if not isinstance(told, dict) or told.get("name") not in self._tools.names:
            return False
        arguments = told.get(_ARGUMENTS[self._tools.form], {})
        if not isinstance(arguments, dict):
            return False
        self.calls.append(Call(told["name"], json.dumps(arguments, ensure_ascii=False)))
        return True


def _overlap(text: str, tag: str) -> int:
    """Return how many characters at the end of a text may begin a tag."""
    return next((n for n in range(min(len(text), len(tag) - 1), 0, -1) if tag.startswith(text[-n:])), 0)
