"""Files of a model folder, opened with care: what a file is, is known before anything reads from it."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from llmbuild.errors import InputError

_POINTER = b"version https://git-lfs.github.com/spec/"
_POINTER_BYTES = 1024
"""A Git LFS pointer is shorter than this."""


def check_file(path: Path) -> int:
    """Return the size of a file that can be read; opening it never waits.

    Raises:
        InputError: it is missing, a dangling link, no regular file, not readable, or a Git LFS pointer.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            raise InputError(f"{path}: a link to {path.readlink()}, which does not exist") from None
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {told(error)}") from None
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{path}: a {_kind(found.st_mode)}, not a file")
    try:
        with open(path, "rb") as file:
            start = file.read(len(_POINTER)) if found.st_size < _POINTER_BYTES else b""
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {told(error)}") from None
    if start == _POINTER:
        raise InputError(f"{path}: a Git LFS pointer, not the file itself: run `git lfs pull` in its repository")
    return found.st_size


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object that a file holds.

    Raises:
        InputError: the file cannot be read, or holds something else; NaN and infinities are no JSON.
    """
    check_file(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
        json.dumps(found, ensure_ascii=False).encode()  # an escape may say half a character, which is no text
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {told(error)}") from None
    except RecursionError:
        raise InputError(f"{path}: not JSON that can be read: it is nested too deep") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: holds {shown(found)}, not a JSON object")
    return found


def meaning(value: Any) -> Any:
    """Return a value of JSON in the one form that equal values have: a whole number is an int."""
    if isinstance(value, dict):
        return {key: meaning(each) for key, each in value.items()}
    if isinstance(value, list):
        return [meaning(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def shown(value: Any) -> str:
    """Return a value of JSON as people are shown it: in ASCII, and short."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def told(error: Exception) -> str:
    """Return what an error says, without the path that its message may repeat."""
    return (error.strerror if isinstance(error, OSError) else str(error)) or type(error).__name__


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _kind(mode: int) -> str:
    kinds = ((stat.S_ISDIR, "folder"), (stat.S_ISFIFO, "pipe"), (stat.S_ISSOCK, "socket"))
    return next((name for is_kind, name in kinds if is_kind(mode)), "device")
