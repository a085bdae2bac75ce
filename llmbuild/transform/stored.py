"""Matrices as an archive holds them, and the tasks that make their bytes from some rows at a time.

Every format encodes a row, or a panel of 64 rows, without regard to the others: a matrix is made in chunks that fit a
CPU's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from llmbuild.kernels.layouts import up_to
from llmbuild.spec.formats import INTEGERS, SHARED, fit_group
from llmbuild.transform import weights
from llmbuild.transform.quantized import Quantized, dequantize, pack_nibbles
from llmbuild.transform.quantized import joined as as_one
from llmbuild.transform.stream import Piece, Region, Task, Unit
from llmbuild.transform.weights import PANEL, Array, from_bf16, to_bf16

CHUNK = 1 << 18
"""Weights that are encoded at once: 1 MB of f32. The system takes larger pieces of memory back in between."""

BF16 = "bfloat16"
"""The one element type that NumPy has no name for; such arrays are u16."""

Encoded = Quantized | Array
"""Rows in a format: quantized, or f32, f16, bf16 as u16, or `f12_e4m7` as f32."""

Encode = Callable[[str, int, int], Encoded]
"""From a matrix's name and a range of its rows to these rows in their format."""

Keep = Callable[[str, int, Array], None]
"""Takes rows f32 of a matrix, from the given one on, as the program will see them."""


@dataclass(frozen=True)
class ArrayType:
    """Shape and element type of a stored tensor, as torch and NumPy name it."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Its size."""
        sizes = {"float32": 4, "float16": 2, BF16: 2, "int8": 1, "uint8": 1}
        return prod(self.shape) * sizes[self.dtype]


@dataclass(frozen=True)
class Rows:
    """Rows of several matrices as one: one after the other, or `turns` of 32 rows of two."""

    parts: tuple[tuple[str, int], ...]
    """Names, and how many rows each has."""
    turns: bool = False

    @property
    def count(self) -> int:
        """Rows in all, without those that fill the last panel; two in turns are filled up to 32 each."""
        if self.turns:
            return 2 * up_to(self.parts[0][1], PANEL // 2)
        return sum(rows for _, rows in self.parts)

    def spans(self, start: int, stop: int) -> list[tuple[str, int, int]]:
        """Return which rows of which matrices lie between two rows; of matrices in turns, both multiples of 64."""
        if self.turns:
            return [(name, start // 2, min(stop // 2, rows)) for name, rows in self.parts]
        found, at = [], 0
        for name, rows in self.parts:
            first, last = max(start - at, 0), min(stop - at, rows)
            if first < last:
                found.append((name, first, last))
            at += rows
        return found

    def joined(self, parts: Sequence[Array]) -> Array:
        """Return the rows of `spans` in their order."""
        if self.turns:
            return weights.interleave(parts[0], parts[1])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def joined(rows: Rows, parts: Sequence[Encoded]) -> Encoded:
    """Return encoded rows as one."""
    quantized = [part for part in parts if isinstance(part, Quantized)]
    if quantized:
        return as_one(quantized, lambda *arrays: rows.joined(arrays))
    return rows.joined([part for part in parts if not isinstance(part, Quantized)])


def plain(encoded: Encoded, columns: int) -> Array:
    """Return f32[n,columns] of encoded rows, which may have columns of zeros behind these."""
    if isinstance(encoded, Quantized):
        return dequantize(encoded)[:, :columns]
    dense = from_bf16(encoded) if encoded.dtype == np.uint16 else encoded
    return dense[:, :columns].astype(np.float32, copy=False)


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix in one of the compiler's layouts: `data`, and `scale`, `zero` and `minimum` where its format has them.

    `row_major` is `[N, K]` as torch keeps it, scales `[N, K/group]`; `packed` are panels `[N/64, K, 64]`, scales
    `[N/64, K/group, 64]`. Two codes of 4 bits share a byte; a row of an odd number ends in half a byte. Scales of whole
    rows without zeros are f32[N].
    """

    rows: Rows
    columns: int
    form: str
    packed: bool = False

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        wanted = INTEGERS[self.form].group if self.form in INTEGERS else 0
        return wanted if self.blocks else fit_group(self.columns, wanted or self.columns)

    @property
    def groups(self) -> int:
        """Scales of a row."""
        return -(-self.columns // self.group)

    @property
    def nibbles(self) -> bool:
        """Whether two codes share a byte."""
        return self.form in INTEGERS and INTEGERS[self.form].bits == 4

    @property
    def zeros(self) -> bool:
        """Whether groups have zero codes of their own."""
        return self.form in INTEGERS and not INTEGERS[self.form].symmetric

    @property
    def blocks(self) -> bool:
        """Whether groups are the blocks of GGUF files."""
        return self.form in INTEGERS and INTEGERS[self.form].is_block

    @property
    def grouped(self) -> bool:
        """Whether scales go with the columns; else they can wait until the row is summed."""
        return self.form in INTEGERS and (self.groups > 1 or self.zeros or self.blocks)

    def tensors(self) -> dict[str, ArrayType]:
        """Return what is stored."""
        kinds = {"f32": "float32", "f16": "float16", "bf16": BF16, SHARED: BF16}
        count, panels = self.rows.count, up_to(self.rows.count, PANEL) // PANEL
        data: tuple[int, ...] = (count, (self.columns + 1) // 2 if self.nibbles else self.columns)
        if self.packed:
            data = (panels, self.columns, PANEL // 2 if self.nibbles else PANEL)
        groups = (panels, self.groups, PANEL) if self.packed else (count, self.groups)
        found = {"data": ArrayType(data, kinds.get(self.form, "int8"))}
        if self.form in INTEGERS:
            found["scale"] = ArrayType(groups, BF16) if self.grouped else ArrayType((count,), "float32")
        if self.zeros:
            found["zero"] = ArrayType(groups, "int8")
        if self.blocks:
            found["scale"] = ArrayType(groups, "float16")
        if self.blocks and INTEGERS[self.form].minimum:
            found["minimum"] = ArrayType(groups, "float16")
        return found

    def encode(self, part: Encoded) -> dict[str, Array]:
        """Return what is stored of some rows: whole panels, or the last ones."""
        if not isinstance(part, Quantized):
            data = to_bf16(part) if self.form in ("bf16", SHARED) and part.dtype != np.uint16 else part
            return {"data": self._laid_out(data)}
        codes = part.codes
        if self.nibbles:
            even = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2))) if not self.packed and codes.shape[1] % 2 else codes
            found = {"data": pack_nibbles(self._laid_out(even))}
        else:
            found = {"data": self._laid_out(codes)}
        if self.blocks:
            minimum = {} if part.minimum is None else {"minimum": self._laid_out(part.minimum).astype("<f2")}
            return {**found, "scale": self._laid_out(part.scale).astype("<f2"), **minimum}
        scale = to_bf16(self._laid_out(part.scale)) if self.grouped else part.scale[:, 0]
        zero = {} if part.zero is None else {"zero": self._laid_out(part.zero).astype(np.int8)}
        return {**found, "scale": scale, **zero}

    def _laid_out(self, stored: Array) -> Array:
        return weights.pack_panels(stored) if self.packed else np.ascontiguousarray(stored)


@dataclass(frozen=True)
class Place:
    """Where a part of a matrix lies: in a tensor from `offset` on, with `panel_bytes` for each 64 rows."""

    tensor: str
    offset: int
    panel_bytes: int
    size: int


Places = Mapping[str, Place]


def chunks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows, whole panels each, with about `CHUNK` weights."""
    step = max(1, CHUNK // max(1, columns) // PANEL) * PANEL
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def tasks(
    rows: Rows,
    columns: int,
    encode: Encode,
    stored: Callable[[Encoded], Mapping[str, Array]],
    places: Places,
    keep: Keep | None,
) -> tuple[Task, ...]:
    """Return the tasks that make a matrix; `stored` says what lies there of encoded rows."""

    def task(start: int, stop: int) -> Iterator[Piece]:
        spans = rows.spans(start, stop)
        parts = [encode(*span) for span in spans]
        if keep is not None:
            for (name, first, _), part in zip(spans, parts, strict=True):
                keep(name, first, plain(part, columns))
        for name, array in stored(joined(rows, parts)).items():
            place = places[name]
            yield Piece(place.tensor, place.offset + start * place.panel_bytes // PANEL, array)

    return tuple(lambda a=a, b=b: task(a, b) for a, b in chunks(rows.count, columns))


def matrix_unit(name: str, matrix: StoredMatrix, encode: Encode, keep: Keep | None) -> Unit:
    """Return the unit of a matrix whose tensors are `<name>.data` and so on."""
    places = {}
    for part, kind in matrix.tensors().items():
        panels = kind.nbytes // kind.shape[0] * (1 if len(kind.shape) == 3 else PANEL)
        places[part] = Place(f"{name}.{part}", 0, panels, kind.nbytes)
    made = tasks(matrix.rows, matrix.columns, encode, matrix.encode, places, keep)
    return Unit(name, regions(places), made)


def regions(places: Places) -> tuple[Region, ...]:
    """Return the bytes of a matrix's parts."""
    return tuple(Region(place.tensor, place.offset, place.size) for place in places.values())
