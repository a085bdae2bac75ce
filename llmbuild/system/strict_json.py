"""JSON that is JSON: no `NaN` and no `Infinity`, neither written nor read; the one place that knows how.

Python's own module writes and takes both, and no other reader of JSON does. A number too large for a float is infinite
as well.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

JsonObject = dict[str, Any]
"""An object that was read: what its names hold, its reader knows from who wrote it, or has to check."""


def loads(text: str | bytes) -> Any:
    """Return what a JSON document says.

    Raises:
        ValueError: not JSON, a number that is not finite, or nested deeper than anything of ours is.
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
    """Return a JSON document in printable ASCII; a number that is not finite is null in it, as what is absent is."""
    try:
        text = json.dumps(value, allow_nan=False, indent=indent)
    except ValueError:
        text = json.dumps(finite(value), allow_nan=False, indent=indent)
    return text.replace("\x7f", "\\u007f")  # the one control that JSON lets pass


def finite(value: object) -> object:
    """Return plain data with None in the place of every number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return value
