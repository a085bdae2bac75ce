"""Parameter archives (IRPA, version 0.0) whose bytes are written piece by piece, in any order.

The format is that of IREE's `ParameterIndex`: a header, one entry for each tensor, their names, and the tensors at
multiples of 64 bytes. Here the layout is known before the first byte of a tensor is.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

MAGIC = b"IRPA"
ALIGNMENT, FILE_ALIGNMENT, ENTRY_ALIGNMENT = 64, 4096, 16
_HEADER = struct.Struct("<4sHHQQQQ2Q2Q2Q")
"""Magic, version, size, next header, flags, number of entries; offset and length of entries, names and tensors."""
_ENTRY = struct.Struct("<QIQ2Q2QQ2Q")
"""Size, kind, flags; offset and length of name and metadata; alignment; offset and length of the data."""
DATA = 2
"""The kind of an entry that has bytes of its own."""


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


@dataclass(frozen=True)
class Layout:
    """Where the bytes of each tensor lie in an archive; tensors are in the order of their names."""

    sizes: tuple[tuple[str, int], ...]

    @staticmethod
    def of(sizes: Mapping[str, int]) -> Layout:
        """Return the layout of tensors with these sizes in bytes."""
        return Layout(tuple(sorted(sizes.items())))

    @cached_property
    def places(self) -> dict[str, int]:
        """Offset in the file of each tensor."""
        found, at = {}, self._begin
        for name, size in self.sizes:
            found[name] = at
            at += _up(size, ALIGNMENT)
        return found

    @cached_property
    def _names(self) -> bytes:
        return b"".join(name.encode() for name, _ in self.sizes)

    @property
    def _entries(self) -> tuple[int, int]:
        """Offset and length of the entries."""
        count = len(self.sizes)
        length = (count - 1) * _up(_ENTRY.size, ENTRY_ALIGNMENT) + _ENTRY.size if count else 0
        return _up(_HEADER.size, ENTRY_ALIGNMENT), length

    @property
    def _begin(self) -> int:
        """Offset of the tensors."""
        return _up(sum(self._entries) + len(self._names), ALIGNMENT)

    @property
    def _stored(self) -> int:
        """Bytes of the tensors, from the first to the end of the last."""
        if not self.sizes:
            return 0
        name, size = self.sizes[-1]
        return self.places[name] + size - self._begin

    @property
    def file_bytes(self) -> int:
        """Size of the file."""
        return _up(self._begin + self._stored, FILE_ALIGNMENT)

    @property
    def head(self) -> bytes:
        """What comes before the tensors."""
        begin, length = self._entries
        names = begin + length
        found = bytearray(self._begin)
        segments = (begin, length, names, len(self._names), self._begin, self._stored)
        _HEADER.pack_into(found, 0, MAGIC, 0, 0, _HEADER.size, 0, 0, len(self.sizes), *segments)
        at, named = begin, 0
        for name, size in self.sizes:
            own = len(name.encode())
            place = self.places[name] - self._begin
            _ENTRY.pack_into(found, at, _ENTRY.size, DATA, 0, named, own, 0, 0, ALIGNMENT, place, size)
            at, named = at + _up(_ENTRY.size, ENTRY_ALIGNMENT), named + own
        found[names : names + len(self._names)] = self._names
        return bytes(found)
