"""The environment that chat templates run in: Jinja2's sandbox, with what the library gives templates."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import cache
from typing import NoReturn

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llmbuild.errors import InputError


class Refused(TemplateError):
    """What a template raises of messages that it does not take."""


class _Generation(Extension):
    """The tag that marks an answer for training: its contents are rendered as they are."""

    tags = {"generation"}  # noqa: RUF012 - the library's own attribute

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the contents, as a scope of their own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


@cache
def environment() -> ImmutableSandboxedEnvironment:
    """Return the environment: no private attribute can be reached, and nothing that is given can be changed."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _refuse
    made.globals["strftime_now"] = _now
    return made


def compiled(template: str) -> Template:
    """Return a template that can be rendered.

    Raises:
        InputError: it is not one of Jinja2.
    """
    with _errors():
        return environment().from_string(template)


def rendered(template: Template, **values: object) -> str:
    """Return the text of a template with these values.

    Raises:
        InputError: the template refuses them, or fails.
    """
    with _errors():
        return template.render(**values)


def literals(template: str) -> str:
    """Return the text that a template itself may write, its parts on lines of their own.

    Raises:
        InputError: as `compiled`.
    """
    with _errors():
        tree = environment().parse(template)
    parts = [node.data for node in tree.find_all(nodes.TemplateData)]
    parts += [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
    return "\n".join(parts)


@contextmanager
def _errors() -> Iterator[None]:
    """Turn every error of a template into one message: it is a program, and may raise anything."""
    try:
        yield
    except Refused as error:
        raise InputError(f"the chat template refuses these messages: {_said(error)}") from None
    except TemplateSyntaxError as error:
        raise InputError(f"the chat template is not one of Jinja2: line {error.lineno}: {_said(error)}") from None
    except Exception as error:  # noqa: BLE001 - see above
        raise InputError(f"the chat template fails on these messages: {_said(error)}") from None


def _said(error: Exception) -> str:
    said = " ".join((getattr(error, "message", None) or str(error)).split())
    return said[:300] or type(error).__name__


def _refuse(message: object) -> NoReturn:
    raise Refused(str(message))


def _now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON as it is: Jinja2's own filter escapes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
