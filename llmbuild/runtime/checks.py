"""Checks of the loader's arguments: one message that names the argument, its value and what it must be."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from numbers import Integral, Real
from typing import TYPE_CHECKING

from llmbuild.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LARGEST = 2**32 - 1
"""Upper bound of token ids in any tokenizer."""


def text(name: str, value: object) -> str:
    """Return a text that can be written as UTF-8.

    Raises:
        InputError: not such a text.
    """
    if not isinstance(value, str):
        raise InputError(f"{name} is {_kind(value)}; it must be a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        raise InputError(f"{name} is not Unicode text: U+{code:04X} alone at character {error.start}") from None
    return value


def texts(name: str, value: object) -> list[str]:
    """Return a list of texts.

    Raises:
        InputError: not a list of texts; a single string is not one.
    """
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise InputError(f"{name} is {_kind(value)}; it must be a list of strings")
    return [text(f"{name}[{i}]", one) for i, one in enumerate(value)]


def integer(name: str, value: object, low: int, high: int | None = None) -> int:
    """Return an integer in a range.

    Raises:
        InputError: not an integer, or outside the range.
    """
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, Integral)):
        raise InputError(f"{name} is {_kind(value)}; it must be an integer")
    found = int(value)
    if found < low or (high is not None and found > high):
        bound = f"{low} or more" if high is None else f"{low} to {high}"
        raise InputError(f"{name} is {found}; it must be {bound}")
    return found


def number(name: str, value: object) -> float:
    """Return a finite number.

    Raises:
        InputError: not a finite number.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InputError(f"{name} is {_kind(value)}; it must be a number")
    if not isfinite(value):
        raise InputError(f"{name} is {value}; it must be finite")
    return float(value)


def tokens(name: str, value: object, vocabulary: int = LARGEST + 1) -> list[int]:
    """Return a list of token ids.

    Raises:
        InputError: not such a list, or a token is outside the vocabulary.
    """
    found = integers(name, value)
    if found.ndim != 1:
        raise InputError(f"{name} has the shape {list(found.shape)}; it must be a list of token ids")
    ids: list[int] = inside(name, found, vocabulary).tolist()
    return ids


def outside(found: NDArray[np.int64], end: int) -> bool:
    """Return whether an integer is below 0, or is not below `end`."""
    # in one pass: without a sign, negative ones are large
    return bool(found.size) and int(found.view("u8").max()) >= end


def inside(name: str, found: NDArray[np.int64], vocabulary: int) -> NDArray[np.int64]:
    """Return token ids.

    Raises:
        InputError: a token is outside the vocabulary.
    """
    if outside(found, vocabulary):
        wrong = found[(found < 0) | (found >= vocabulary)].flat[0]
        raise InputError(f"{name}: token {wrong} is outside the vocabulary of {vocabulary}")
    return found


def integers(name: str, value: object) -> NDArray[np.int64]:
    """Return an array of integers as i64.

    Raises:
        InputError: not integers: text, fractions, booleans, ragged rows, or more than 64 bits.
    """
    import numpy as np

    if isinstance(value, (str, bytes, set, frozenset, dict)):
        raise InputError(f"{name} is {_kind(value)}; it must be integers")
    try:
        found = np.asarray(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise InputError(f"{name} is {_kind(value)}; it must be integers: {error}") from None
    if found.size == 0 and found.dtype.kind == "f" and not isinstance(value, np.ndarray):
        return found.astype(np.int64)  # an empty list has no element type
    if found.dtype.kind not in "iu" or (found.dtype == np.uint64 and found.size and found.max() >= 2**63):
        raise InputError(f"{name} is {_kind(value)} of {found.dtype}; it must be integers of at most 64 bits")
    return found.astype(np.int64, copy=False)


def _kind(value: object) -> str:
    """Return a value's type name, and the value itself if it is short."""
    kind = type(value).__name__
    if isinstance(value, (int, float, str, type(None))) and len(repr(value)) <= 40:
        return f"{value!r}" if value is None else f"{kind} {value!r}"
    return f"a {kind}" if kind[0] not in "aeiou" else f"an {kind}"
