"""Strict YAML into validated data: unknown and duplicate keys refused, every error with file, line and key path."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from llmbuild.errors import InputError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

MAX_FILE_BYTES = 1 << 20
"""Maximum size of a file; a larger one is refused unread."""

_YAML_FAULTS = (
    YAMLError,
    LookupError,
    TypeError,
    AttributeError,
    ValueError,
    ArithmeticError,
    AssertionError,
    RecursionError,
)
"""What ruamel.yaml raises on text that is not YAML: its own errors, and on odd tags and merges the builtin ones."""

M = TypeVar("M", bound=BaseModel)


class Strict(BaseModel):
    """A mapping of known keys."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)


def _near(path: Path, homes: tuple[str, ...]) -> str:
    """Return the file most similar to a name that is not one; empty where none is similar."""
    folders = (path.parent, *map(Path, homes))
    there = [each for folder in folders for each in sorted(folder.glob("*.y*ml"))]
    named = {each.name: each for each in reversed(there)} | {each.stem: each for each in reversed(there)}
    close = get_close_matches(path.name, list(named), 1, 0.75)
    return f"; did you mean {named[close[0]]}?" if close else ""


def read(
    path: Path, hint: str = "", folder: Callable[[Path], str] | None = None, homes: tuple[str, ...] = ("recipes",)
) -> dict[object, object]:
    """Return the mapping in a YAML file, with its line numbers.

    `hint` says what such a file holds, `folder` what to do about a folder, and `homes` are where similar names lie.

    Raises:
        InputError: no such file, not YAML, or no mapping.
    """
    text, hint = _text_of(path, hint, folder, homes), f": {hint}" if hint else ""
    try:
        raw = YAML(typ="rt").load(text)
    except DuplicateKeyError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        key = str(error.problem or "").split('"')[1:2]
        raise InputError(f"{path}:{line} duplicate key {key[0] if key else ''!r}: keep one of the two") from None
    except MarkedYAMLError as error:
        mark = error.problem_mark
        raise InputError(f"{path}:{mark.line + 1 if mark else '?'} not YAML: {error.problem}") from None
    except _YAML_FAULTS as error:
        raise InputError(f"{path}: not YAML: {error}") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: a mapping of keys is expected at the top{hint}")
    return raw


def _text_of(path: Path, hint: str, folder: Callable[[Path], str] | None, homes: tuple[str, ...]) -> str:
    try:
        if path.is_dir():
            raise InputError(f"{path}: {folder(path) if folder else 'a folder, not a file'}")
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: not a regular file: copy it into one")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InputError(f"{path}: larger than {MAX_FILE_BYTES} bytes, which no file of llmbuild is")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file{_near(path, homes) or (hint and f': {hint}')}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text: {error}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None


def validate(kind: type[M], raw: object, path: Path) -> M:
    """Return the data of a mapping.

    Raises:
        InputError: all errors at once, each with line and key path.
    """
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        faults = error.errors()
        inner = [f["loc"] for f in faults]
        # An invalid list item also makes the list count as too short: report only the items.
        told = [f for f in faults if not any(len(x) > len(f["loc"]) and x[: len(f["loc"])] == f["loc"] for x in inner)]
        lines = [_fault_line(fault, raw, path) for fault in told]
        raise InputError("\n".join(lines)) from None


def _fault_line(fault: ErrorDetails, raw: object, path: Path) -> str:
    where = tuple(fault["loc"])
    text = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        text = "unknown key"
    elif fault["type"] == "missing":
        text = "this key is missing"
    dotted = "$" + "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in where)
    return f"{path}:{line_of(raw, where)} {dotted}: {text}"


def line_of(raw: object, where: tuple[int | str, ...]) -> int:
    """Return the 1-based line of the deepest key of `where` that is in the file."""
    node: Any = raw
    line = 1
    for part in where:
        marks = getattr(node, "lc", None)
        try:
            line = int((marks.key(part) if isinstance(node, dict) else marks.item(part))[0]) + 1  # type: ignore[union-attr]
            node = node[part]
        except (KeyError, IndexError, TypeError, AttributeError):
            break
    return line
