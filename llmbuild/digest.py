"""Content digests: sha256 of bytes, or of canonical JSON."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

SHOWN = 12
"""Number of hex digits of a digest that are shown."""

OMITTED = {"omitted at its default": True}
"""Metadata of a dataclass field that JSON leaves out at its default: adding such a field changes no earlier digest."""


def canonical(value: object) -> str:
    """Return `value` as JSON with sorted keys and no spaces; dataclasses become objects, tuples become lists.

    Raises:
        TypeError: `value` contains something that JSON cannot represent, such as NaN or a path.
    """
    try:
        return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    except ValueError as error:
        raise TypeError(f"not canonical: {error}") from error


def plain(value: object) -> Any:
    """Return `value` in terms of dict, list, str, int, float, bool and None."""
    if is_dataclass(value) and not isinstance(value, type):
        cells = [(f, getattr(value, f.name)) for f in fields(value)]
        return {f.name: plain(cell) for f, cell in cells if f.metadata != OMITTED or cell != f.default}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, (frozenset, set)):
        return sorted(plain(v) for v in value)
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise TypeError(f"not canonical: {type(value).__name__}")


def of(value: object) -> str:
    """Return the digest of a value, 64 hex digits; equal values have equal digests whatever their key order."""
    return of_bytes(canonical(value).encode())


def of_bytes(data: bytes) -> str:
    """Return the sha256 of `data`, 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def of_file(path: Path) -> str:
    """Return the sha256 of a file's bytes, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def short(digest: str) -> str:
    """Return the short form of a digest."""
    return digest[:SHOWN]
