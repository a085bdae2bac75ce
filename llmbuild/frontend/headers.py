"""What a safetensors file says that it holds, read from its header alone and held against the file's size."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from llmbuild.errors import InputError
from llmbuild.frontend.documents import check_file, shown

HEADER_BYTES = 100_000_000
"""The longest header that the format allows."""

BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
"""Bits of an element, by the format's names."""


@dataclass(frozen=True)
class Stored:
    """A tensor as a file holds it: element type by the format's name, and shape."""

    dtype: str
    shape: tuple[int, ...]
    file: str
    begin: int = 0
    """Where its bytes begin, behind the header of a safetensors file."""


def read_header(path: Path) -> dict[str, Stored]:
    """Return the tensors of a file by name.

    Raises:
        InputError: the file cannot be read, is cut short, or its header contradicts itself or the file's size.
    """
    size = check_file(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise InputError(f"{path}: weights are truncated or corrupt: {size} bytes hold no whole header")
        if length > HEADER_BYTES:
            raise InputError(f"{path}: weights are corrupt: a header of {length} bytes is too large")
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
        if not isinstance(header, dict):
            raise ValueError("it is not an object")
        header.pop("__metadata__", None)
        spans = {name: _span(name, entry) for name, entry in header.items()}
        _check_spans(((begin, end) for _, begin, end in spans.values()), size - 8 - length)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: weights are truncated or corrupt: their header says so: {error}") from None
    return {name: Stored(dtype, shape, path.name, begin) for name, ((dtype, shape), begin, _) in spans.items()}


def data_start(path: Path) -> int:
    """Return where the tensors of a file begin."""
    with open(path, "rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)} is named twice")
    return found


def _span(name: str, entry: Any) -> tuple[tuple[str, tuple[int, ...]], int, int]:
    """Return a tensor's type and shape, and where its bytes begin and end."""
    if not isinstance(entry, dict) or {*entry} != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{shown(name)} has no dtype, shape and data_offsets alone")
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in BITS if isinstance(dtype, str) else True:
        raise ValueError(f"{shown(name)} has the unknown type {shown(dtype)}")
    if not _counts(shape) or not _counts(span) or len(span) != 2:
        raise ValueError(f"{shown(name)} has no proper shape or place")
    if prod(shape) * BITS[dtype] != 8 * (span[1] - span[0]):
        raise ValueError(f"{shown(name)} has {span[1] - span[0]} bytes, which {dtype} {shown(shape)} has not")
    return (dtype, tuple(shape)), span[0], span[1]


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 62 for n in value)


def _check_spans(spans: Iterable[tuple[int, int]], size: int) -> None:
    """Refuse tensors that overlap, leave holes, or end elsewhere than the file."""
    at = 0
    for begin, end in sorted(spans):
        if begin != at:
            raise ValueError(f"tensors overlap or leave a hole at byte {min(begin, at)} of the data")
        at = end
    if at != size:
        raise ValueError(f"tensors take {at} bytes, the file has {size}")
