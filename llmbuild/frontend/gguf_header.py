"""What a GGUF file says of itself: metadata, and where each tensor lies, held against the file's size.

The gguf package's reader makes arrays of every token of a vocabulary, which takes seconds, and trusts the lengths that
a file states. So the header is walked here; the numbers of types and the sizes of blocks are the package's.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

from llmbuild import digest
from llmbuild.errors import InputError
from llmbuild.frontend.documents import check_file, shown, told
from llmbuild.frontend.gguf_place import MAGIC, is_gguf

VERSIONS = (2, 3)
"""Version 1 counts in 32 bits; no tool writes it any more."""
ALIGNMENT, SPLIT = "general.alignment", "split.count"

Scalar = bool | int | float | str
Value = Scalar | tuple[Scalar, ...]

_FORMATS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.FLOAT64: "d",
    GGUFValueType.BOOL: "?",
}
_FIXED = struct.calcsize("<4sIQQ")
_DIMENSIONS = 4
_PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class Tensor:
    """A tensor as the file holds it: its type by the format's name, its shape [N,K], and where its bytes are."""

    name: str
    kind: str
    shape: tuple[int, ...]
    begin: int
    """Byte of the file."""
    size: int
    """Bytes."""


@dataclass(frozen=True)
class Header:
    """A file's metadata by key, and its tensors by name."""

    path: Path
    metadata: Mapping[str, Value]
    tensors: Mapping[str, Tensor]
    digest: str
    """Of all bytes before the tensors' data."""

    def read(self, name: str) -> bytes:
        """Return the bytes of a tensor."""
        tensor = self.tensors[name]
        with open(self.path, "rb") as file:
            file.seek(tensor.begin)
            return file.read(tensor.size)


def read_header(path: Path) -> Header:
    """Return what a file says of itself.

    Raises:
        InputError: it cannot be read, is no GGUF file, one of another version or byte order, a part of a model, or
            truncated or corrupt.
    """
    size = check_file(path)
    if not is_gguf(path):
        raise InputError(f"{path}: not a GGUF file: it does not begin with {MAGIC.decode()}")
    if size < _FIXED:
        raise InputError(f"{path}: this GGUF file is truncated: {size} bytes hold no whole header")
    part = _PART.search(path.name)
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found = _walk(path, data)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {told(error)}") from None
    except (ValueError, struct.error) as error:
        raise InputError(f"{path}: this GGUF file is truncated or corrupt: {error}") from None
    parts = found.metadata.get(SPLIT, 1)
    if parts not in (0, 1) or (part and int(part[1]) > 1):
        raise InputError(
            f"{path}: one part of a model that is split over {part[1] if part else parts} files: join them with "
            "`llama-gguf-split --merge` first"
        )
    return found


def _walk(path: Path, data: mmap.mmap) -> Header:
    version, tensors, pairs = struct.unpack_from("<IQQ", data, len(MAGIC))
    if version & 0xFFFF == 0:
        raise InputError(f"{path}: a big-endian GGUF file: convert it for little-endian machines")
    if version not in VERSIONS:
        known = " and ".join(map(str, VERSIONS))
        raise InputError(f"{path}: version {version} of the GGUF format is not supported; taken are {known}")
    cursor = _Cursor(data, _FIXED)
    metadata = cursor.metadata(pairs)
    alignment = metadata.get(ALIGNMENT, GGUF_DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"{ALIGNMENT} is {shown(alignment)}: it must be a power of two")
    entries = cursor.table(tensors)
    begin = -(-cursor.at // alignment) * alignment
    found = [_place(entry, begin, alignment) for entry in entries]
    _check_places(found, len(data))
    return Header(path, metadata, {each.name: each for each in found}, digest.of_bytes(data[:begin]))


class _Cursor:
    """Walks a header; what reaches past the end is a `ValueError` or a `struct.error`."""

    def __init__(self, data: mmap.mmap, at: int) -> None:
        self.data, self.at = data, at

    def numbers(self, form: str, count: int = 1) -> tuple[Scalar, ...]:
        """Take numbers of one type."""
        size = struct.calcsize(f"<{form}") * count
        if size > len(self.data) - self.at:
            raise ValueError(f"an array of {count} values reaches past its end")
        found = struct.unpack_from(f"<{count}{form}", self.data, self.at)
        self.at += size
        return found

    def whole(self, form: str) -> int:
        """Take one whole number."""
        return int(self.numbers(form)[0])

    def texts(self, count: int) -> tuple[str, ...]:
        """Take texts: a vocabulary has a hundred thousand."""
        data, at, end, found = self.data, self.at, len(self.data), []
        if count * _LENGTH.size > end - at:
            raise ValueError(f"an array of {count} texts reaches past its end")
        for _ in range(count):
            (length,) = _LENGTH.unpack_from(data, at)
            at += _LENGTH.size
            if length > end - at:
                raise ValueError(f"a text of {length} bytes reaches past its end")
            found.append(data[at : at + length].decode("utf-8"))
            at += length
        self.at = at
        return tuple(found)

    def metadata(self, count: int) -> dict[str, Value]:
        """Take `count` pairs of key and value."""
        found: dict[str, Value] = {}
        for _ in range(count):
            key = self.texts(1)[0]
            if key in found:
                raise ValueError(f"the key {shown(key)} is there twice")
            found[key] = self._value(key)
        return found

    def _value(self, key: str) -> Value:
        kind = self.whole("I")
        if kind != GGUFValueType.ARRAY:
            return self._array(key, kind, 1)[0]
        kind, count = self.whole("I"), self.whole("Q")
        return self._array(key, kind, count)

    def _array(self, key: str, kind: int, count: int) -> tuple[Scalar, ...]:
        if kind == GGUFValueType.STRING:
            return self.texts(count)
        form = next((form for each, form in _FORMATS.items() if each == kind), "")
        if not form:
            raise ValueError(f"{shown(key)} has a value of type {kind}, which is not known")
        return self.numbers(form, count)

    def table(self, count: int) -> list[tuple[str, tuple[int, ...], int, int]]:
        """Take the table of tensors: name, dimensions with the fastest first, type and offset of each."""
        found = []
        for _ in range(count):
            name, dimensions = self.texts(1)[0], self.whole("I")
            if not 1 <= dimensions <= _DIMENSIONS:
                raise ValueError(f"tensor {shown(name)} has {dimensions} dimensions")
            sizes = tuple(int(size) for size in self.numbers("Q", dimensions))
            found.append((name, sizes, self.whole("I"), self.whole("Q")))
        return found


def _place(entry: tuple[str, tuple[int, ...], int, int], begin: int, alignment: int) -> Tensor:
    """Return a tensor with its size in bytes and its place in the file."""
    name, sizes, number, offset = entry
    if number not in {kind.value for kind in GGML_QUANT_SIZES}:
        raise ValueError(f"tensor {shown(name)} has the unknown type {number}")
    kind = GGMLQuantizationType(number)
    if not all(sizes) or prod(sizes) >= 1 << 62:
        raise ValueError(f"tensor {shown(name)} has the shape {shown(sizes[::-1])}")
    block, size = GGML_QUANT_SIZES[kind]
    if sizes[0] % block:
        raise ValueError(f"tensor {shown(name)} has rows of {sizes[0]} weights, no multiple of {kind.name}'s {block}")
    if offset % alignment:
        raise ValueError(f"tensor {shown(name)} begins at byte {offset} of the data, no multiple of {alignment}")
    return Tensor(name, kind.name, sizes[::-1], begin + offset, prod(sizes) // block * size)


def _check_places(tensors: Iterable[Tensor], size: int) -> None:
    """Refuse tensors of one name, that overlap, or that reach past the file's end."""
    names: set[str] = set()
    last: Tensor | None = None
    for tensor in sorted(tensors, key=lambda each: each.begin):
        if tensor.name in names:
            raise ValueError(f"tensor {shown(tensor.name)} is there twice")
        names.add(tensor.name)
        if last is not None and tensor.begin < last.begin + last.size:
            raise ValueError(f"tensors {shown(last.name)} and {shown(tensor.name)} overlap")
        if tensor.begin + tensor.size > size:
            raise ValueError(f"tensor {shown(tensor.name)} ends at byte {tensor.begin + tensor.size} of {size}")
        last = tensor
