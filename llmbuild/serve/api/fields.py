"""The fields of a request's body: each is read by its name, and none is dropped in silence."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TypeVar

from llmbuild.errors import InputError
from llmbuild.serve.errors import RequestRefused
from llmbuild.system.strict_json import loads

T = TypeVar("T")
_DEEPEST = 64
"""Levels of nesting of a body."""


def parsed(data: bytes) -> dict[str, object]:
    """Return the object of a body.

    Raises:
        RequestRefused: it is not a JSON object.
    """
    try:
        text = data.decode("utf-8-sig")
        found = loads(text)
    except ValueError as error:
        raise RequestRefused(f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(found, dict):
        raise RequestRefused("the body must be a JSON object")
    if _depth(found) > _DEEPEST:
        raise RequestRefused(f"the body is nested deeper than {_DEEPEST} levels")
    if "\\u" in text:  # nothing else makes half a character
        _check_characters(found)
    return found


def _check_characters(found: dict[str, object]) -> None:
    """Refuse texts that UTF-8 cannot hold: neither templates, grammars nor answers can have them."""
    try:
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        code = ord(error.object[error.start])
        raise RequestRefused(f"the body has half a character: U+{code:04X} alone is no Unicode text") from None


def _depth(value: object) -> int:
    deepest, level = 0, [value]
    while level:
        deepest += 1
        inner = [one for one in level if isinstance(one, (dict, list))]
        level = [each for one in inner for each in (one.values() if isinstance(one, dict) else one)]
    return deepest


class Fields:
    """A JSON object that is read field by field; null stands for a field that is left out."""

    def __init__(self, body: Mapping[str, object], within: str = "") -> None:
        self._left = {name: value for name, value in body.items() if value is not None}
        self._within = within

    def take(self, name: str, check: Callable[[str, object], T], default: T) -> T:
        """Return a checked field, or the default.

        Raises:
            RequestRefused: the check refuses it.
        """
        return self._checked(name, check) if name in self._left else default

    def _checked(self, name: str, check: Callable[[str, object], T]) -> T:
        shown = self._within + name
        try:
            return check(shown, self._left.pop(name))
        except RequestRefused:
            raise
        except InputError as error:
            raise RequestRefused(str(error), shown) from None

    def taken(self, *names: str) -> dict[str, object]:
        """Return those of some fields that are there, unchecked."""
        return {name: self._left.pop(name) for name in names if name in self._left}

    def needed(self, name: str, check: Callable[[str, object], T]) -> T:
        """Return a checked field that must be there.

        Raises:
            RequestRefused: it is not, or the check refuses it.
        """
        if name not in self._left:
            raise RequestRefused(f"{self._within}{name} is missing", self._within + name)
        return self._checked(name, check)

    def neutral(self, allowed: Mapping[str, tuple[object, ...]]) -> None:
        """Take the fields that are not supported, where their value asks for what is done anyway.

        Raises:
            RequestRefused: a field asks for something else.
        """
        for name, values in allowed.items():
            if name not in self._left:
                continue
            value = self._left.pop(name)
            if not any(type(value) is type(one) and value == one for one in values):
                raise RequestRefused(f"{self._within}{name} is not supported by this server", self._within + name)

    def end(self) -> None:
        """Refuse what is left.

        Raises:
            RequestRefused: a field that nobody knows.
        """
        for name in self._left:
            raise RequestRefused(f"{self._within}{name[:100]}: there is no such field", self._within + name[:100])


def truth(name: str, value: object) -> bool:
    """Return true or false.

    Raises:
        RequestRefused: neither.
    """
    if not isinstance(value, bool):
        raise RequestRefused(f"{name} is a {type(value).__name__}; it must be true or false", name)
    return value


def mapping(name: str, value: object) -> dict[str, object]:
    """Return an object.

    Raises:
        RequestRefused: none.
    """
    if not isinstance(value, dict):
        raise RequestRefused(f"{name} is a {type(value).__name__}; it must be an object", name)
    return value
