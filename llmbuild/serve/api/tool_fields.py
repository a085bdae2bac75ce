"""The fields of a chat that are about tools: functions that a model may call, calls that it made, and their results."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmbuild.runtime import checks
from llmbuild.serve.api.fields import Fields, mapping, truth
from llmbuild.serve.errors import RequestRefused
from llmbuild.serve.tools import Form, Tool, Tools
from llmbuild.system.strict_json import JsonObject, loads

MOST_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_ANY: JsonObject = {"type": "object"}


@dataclass(frozen=True)
class Offered:
    """The functions of a request: as its chat template takes them, and as its answer is read; none without `tools`."""

    shown: tuple[JsonObject, ...] = ()
    tools: Tools | None = None


def offered(fields: Fields, form: Form | None, model: str) -> Offered:
    """Return the functions that a chat offers.

    Raises:
        RequestRefused: a field is wrong, or the model takes no tools.
    """
    listed: list[JsonObject] = fields.take("tools", _functions, [])
    several = fields.take("parallel_tool_calls", truth, True)
    names = [tool["function"]["name"] for tool in listed]
    choice, named = fields.take("tool_choice", lambda n, v: _choice(n, v, names), ("auto", ""))
    if not listed or choice == "none":
        return Offered()
    if form is None:
        raise RequestRefused(f"tools: the chat template of {model} takes none that this server can read", "tools")
    made = [Tool(tool["function"]["name"], tool["function"].get("parameters") or _ANY) for tool in listed]
    chosen = tuple(tool for tool in made if not named or tool.name == named)
    required = choice == "required"
    tools = Tools(form, chosen, "required" if required else "auto", several and not named and form == "hermes")
    return Offered(tuple(listed), tools)


def _functions(name: str, value: object) -> list[JsonObject]:
    if not isinstance(value, list):
        raise RequestRefused(f"{name} is a {type(value).__name__}; it must be a list of tools", name)
    if len(value) > MOST_TOOLS:
        raise RequestRefused(f"{name} has {len(value)} tools; at most {MOST_TOOLS} are taken", name)
    found = [_function(f"{name}[{i}]", one) for i, one in enumerate(value)]
    names = [tool["function"]["name"] for tool in found]
    if len(set(names)) < len(names):
        raise RequestRefused(f"{name}: two functions have one name", name)
    return found


def _function(name: str, value: object) -> JsonObject:
    fields = Fields(mapping(name, value), f"{name}.")
    kind = fields.needed("type", checks.text)
    if kind != "function":
        raise RequestRefused(f"{name}.type is {kind[:40]!r}: this server takes functions alone", f"{name}.type")
    inner = Fields(fields.needed("function", mapping), f"{name}.function.")
    fields.end()
    told: JsonObject = {"name": inner.needed("name", _name)}
    if description := inner.take("description", checks.text, ""):
        told["description"] = description
    if (schema := inner.take("parameters", mapping, None)) is not None:
        told["parameters"] = schema
    inner.take("strict", truth, False)  # every call is kept to its schema where a grammar is
    inner.end()
    return {"type": "function", "function": told}


def _name(name: str, value: object) -> str:
    found = checks.text(name, value)
    if not _NAME.fullmatch(found):
        raise RequestRefused(f"{name} is {found[:70]!r}; it must be 1 to 64 letters, digits, _ and -", name)
    return found


def _choice(name: str, value: object, names: Sequence[str]) -> tuple[str, str]:
    """Return the kind of a choice, and the function that it names."""
    if value in ("none", "auto", "required"):
        if value == "required" and not names:
            raise RequestRefused(f"{name} is required, and there are no tools", name)
        return str(value), ""
    if not isinstance(value, dict):
        raise RequestRefused(f"{name} must be none, auto, required, or name a function", name)
    fields = Fields(value, f"{name}.")
    kind = fields.needed("type", checks.text)
    inner = Fields(fields.needed("function", mapping), f"{name}.function.")
    named = inner.needed("name", checks.text)
    inner.end()
    fields.end()
    if kind != "function" or named not in names:
        raise RequestRefused(f"{name} names {named[:64]!r}, which is none of the tools", name)
    return "required", named


def calls_of(name: str, value: object) -> list[JsonObject]:
    """Return the calls of an assistant's message as chat templates take them: with arguments as objects.

    Raises:
        RequestRefused: not calls.
    """
    if not isinstance(value, list):
        raise RequestRefused(f"{name} is a {type(value).__name__}; it must be a list of calls", name)
    return [_call(f"{name}[{i}]", one) for i, one in enumerate(value)]


def _call(name: str, value: object) -> JsonObject:
    fields = Fields(mapping(name, value), f"{name}.")
    told: JsonObject = {"id": fields.take("id", checks.text, ""), "type": "function"}
    fields.neutral({"type": ("function",)})
    inner = Fields(fields.needed("function", mapping), f"{name}.function.")
    nothing: JsonObject = {}
    called: Mapping[str, object] = {
        "name": inner.needed("name", checks.text),
        "arguments": inner.take("arguments", _arguments, nothing),
    }
    inner.end()
    fields.taken("index")
    fields.end()
    return {**told, "function": called}


def _arguments(name: str, value: object) -> JsonObject:
    """Return arguments, which clients send as JSON in a text."""
    text = checks.text(name, value)
    try:
        found = loads(text) if text.strip() else {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise RequestRefused(f"{name} must be a JSON object in a text", name)
    return found
