"""Results that benchmarks keep in a file, to be shown again: JSON whose format has a number."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

from llmbuild.errors import InputError

T = TypeVar("T")


def finite(value: Any) -> Any:
    """Return plain data without infinite numbers and those that are none: null stands for them."""
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def lines(path: Path) -> list[str]:
    """Return the lines of a file to which `add` has added, none where there is no file.

    A run that was killed may have left half a line: it is taken out of the file.
    """
    said = path.read_text() if path.exists() else ""
    whole = said[: said.rfind("\n") + 1]
    if whole != said:
        path.write_text(whole)
    return whole.splitlines()


def add(path: Path, body: object) -> None:
    """Add plain data to a file as a line."""
    with path.open("a") as file:
        file.write(json.dumps(finite(body)) + "\n")


def read(path: Path, form: str, made_of: Callable[[dict[str, Any]], T]) -> T:
    """Return what a file of a format has, as `made_of` makes it.

    Raises:
        InputError: there is no such file, or it is another one.
    """
    try:
        body = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file: --save writes one") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    if not isinstance(body, dict) or body.get("format") != form:
        raise InputError(f"{path}: is not what --save writes here: its format is not {form!r}")
    try:
        return made_of(body)
    except (KeyError, TypeError, ValueError) as error:
        told = f"{type(error).__name__}: {error}"
        raise InputError(f"{path}: is not what --save writes here: {told}") from None
