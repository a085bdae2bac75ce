"""Strict JSON: `NaN` and `Infinity` are neither written nor read.

Python's own module writes and reads both, unlike other JSON readers. A number too large for a float is infinite as
well.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

JsonObject = dict[str, Any]
"""A parsed object: the types of its values are guaranteed by its writer, or checked by its reader."""


def loads(text: str | bytes) -> Any:
    """Return the value of a JSON document.

    Raises:
        ValueError: not JSON, a number that is not finite, or nested deeper than any document of llmbuild.
    """
    try:
        return json.loads(text, parse_constant=_refused, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refused(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not finite")
    return number


def dumps(value: object, indent: int | None = None) -> str:
    """Return a JSON document in printable ASCII; a number that is not finite is null."""
    try:
        text = json.dumps(value, allow_nan=False, indent=indent)
    except ValueError:
        text = json.dumps(finite(value), allow_nan=False, indent=indent)
    return text.replace("\x7f", "\\u007f")  # the one control character that JSON allows unescaped


def finite(value: object) -> object:
    """Return plain data with None in place of every number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return value
