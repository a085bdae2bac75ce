"""A launch line as flags: which there are, in their order, whoever's line it is."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from llmbuild.errors import InputError

_SET = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=.*", re.DOTALL)
_OPERATORS = {"|", "||", "&&", ";", ">", ">>", "<", "2>&1", "2>", "&>"}
_PYTHON = re.compile(r"(.*/)?python[0-9.]*")


@dataclass(frozen=True)
class Given:
    """A flag as it was given: its name without dashes at the beginning, and its values."""

    name: str
    values: tuple[str, ...] = ()
    said: str = ""
    """How it was written, where that is not the name."""

    @property
    def text(self) -> str:
        """The flag as a person would write it."""
        name = self.said or f"--{self.name}"
        return " ".join([name, *map(shlex.quote, self.values)])


@dataclass(frozen=True)
class Program:
    """How the lines of a server begin, and how its flags are written.

    `modules` are run by `python -m`, `commands` by their own names. `takes` says how many values a flag has: 0, 1, or
    -1 for all that follow; None for a flag that nobody knows.
    """

    name: str
    modules: tuple[str, ...]
    commands: tuple[tuple[str, ...], ...]
    aliases: Mapping[str, str]
    takes: Callable[[str], int | None]
    positional: str
    """The flag that a word without one stands for."""


@dataclass(frozen=True)
class Line:
    """What a line gives: variables before the command, what is before the server itself, and flags."""

    variables: tuple[tuple[str, str], ...]
    container: str
    flags: tuple[Given, ...]


def parse_line(text: str, program: Program) -> Line:
    """Return what a launch line gives.

    Raises:
        InputError: it is no launch line of this server.
    """
    try:
        words = shlex.split(text.replace("\\\r\n", " ").replace("\\\n", " "), comments=True)
    except ValueError as error:
        raise InputError(f"the launch line cannot be read: {error}: quote it as for a shell") from None
    if shell := [word for word in words if word in _OPERATORS or (word == "&" and word != words[-1])]:
        raise InputError(f"the launch line has {shell[0]!r}: give the server's command alone")
    words = [word for word in words if word != "&"]
    words = words[1:] if words[:1] == ["env"] else words
    variables = []
    while words and _SET.fullmatch(words[0]):
        name, _, value = words.pop(0).partition("=")
        variables.append((name, value))
    begin, container = _begin(words, program)
    return Line(tuple(variables), container, tuple(flags_of(words[begin:], program)))


def _begin(words: Sequence[str], program: Program) -> tuple[int, str]:
    """Return where the flags begin, and what a container is started with."""
    for i in range(len(words)):
        for command in program.commands:
            if tuple(words[i : i + len(command)]) == command:
                return i + len(command), _container(words[:i])
        python = words[i] == "-m" and i > 0 and _PYTHON.fullmatch(words[i - 1])
        if python and words[i + 1 : i + 2] and words[i + 1] in program.modules:
            return i + 2, _container(words[: i - 1])
    if words[:2] == ["docker", "run"] or words[:2] == ["podman", "run"]:
        image = next((i for i in range(2, len(words)) if program.name in words[i] and "/" in words[i]), None)
        if image is not None:
            return image + 1, _container(words[: image + 1])
    shown = ", ".join([*map(" ".join, program.commands), *(f"python -m {name}" for name in program.modules)])
    raise InputError(f"this is no launch line of {program.name}: it begins with {shown}")


def _container(words: Sequence[str]) -> str:
    """Return what stands before a server's command, without the values of variables: they may be secret."""
    return shlex.join(re.sub(r"^((?:--env=)?[A-Za-z_]\w*)=.*$", r"\1=...", word, flags=re.DOTALL) for word in words)


def flags_of(words: Sequence[str], program: Program) -> list[Given]:
    """Return the flags of the words behind a command."""
    found, rest = list[Given](), list(words)
    while rest:
        word = rest.pop(0)
        if not _flag(word):  # the first is the model, and there is no second
            known = any(one.name == program.positional for one in found)
            found.append(Given(word, (), word) if known else Given(program.positional, (word,)))
            continue
        said, sign, value = word.partition("=")
        name = program.aliases.get(said) or said.lstrip("-").replace("_", "-")
        if "." in name:  # a part of a flag that is an object
            name, _, part = name.partition(".")
            value, sign = f"{part}={value or (rest.pop(0) if rest and not rest[0].startswith('--') else '')}", "="
        if sign:
            found.append(Given(name, (value,), said))
            continue
        count = program.takes(name)
        values: list[str] = []
        while rest and not _flag(rest[0]) and (count in (-1,) or len(values) < (1 if count is None else count)):
            values.append(rest.pop(0))
        if count == 1 and not values:
            raise InputError(f"{said} has no value")
        found.append(Given(name, tuple(values), said))
    return found


def _flag(word: str) -> bool:
    return word.startswith("-") and not _number(word)


def _number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def flags_of_config(body: Mapping[str, object]) -> list[Given]:
    """Return the flags of a configuration file: keys are flags without dashes at the beginning.

    A truth is a flag without a value, or one that begins with `no-`; a list are several values, an object is JSON.
    """
    found = []
    for key, value in body.items():
        name = str(key).lstrip("-").replace("_", "-")
        if isinstance(value, bool):
            found.append(Given(name if value else f"no-{name}", (), str(key)))
        elif value is None:
            found.append(Given(name, ("None",), str(key)))
        elif isinstance(value, Mapping):
            found.append(Given(name, (json.dumps(value),), str(key)))
        elif isinstance(value, (list, tuple)):
            found.append(Given(name, tuple(map(str, value)), str(key)))
        else:
            found.append(Given(name, (str(value),), str(key)))
    return found
