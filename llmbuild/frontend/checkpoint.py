"""The weights of a model, read by rows: from safetensors, from pickles, or drawn from a seed. Nothing is held.

Names are those of the library (`model.layers.0.self_attn.q_proj.weight`); what is read is f32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from llmbuild.errors import InputError
from llmbuild.frontend.headers import Stored, data_start, read_header
from llmbuild.frontend.tensors import EMBEDDING, HEAD, place_of, places
from llmbuild.spec.model import ModelFacts
from llmbuild.transform.drawn import draw_rows

Floats = NDArray[np.float32]
NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
"""Element types of safetensors as NumPy reads them; those of bf16 are moved into the upper half of f32."""


@dataclass(frozen=True)
class Blocks:
    """Rows as a file keeps them, in blocks of 32 columns: `code * scale + minimum`, or `code * scale` without one.

    `codes` are int8[n,K], `scale` and `minimum` f16[n,K/32].
    """

    codes: NDArray[np.int8]
    scale: NDArray[np.float16]
    minimum: NDArray[np.float16] | None


class Checkpoint(Protocol):
    """The weights of a model."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes by the library's names."""

    def rows(self, name: str, start: int, stop: int) -> Floats:
        """Return rows f32[n,K] of a matrix, or entries f32[n] of a vector."""

    def blocks(self, name: str) -> str:
        """Return the format of the blocks in which a file keeps a matrix; empty for plain numbers."""

    def quantized(self, name: str, start: int, stop: int) -> Blocks:
        """Return rows of a matrix in blocks as they are stored."""


class Plain:
    """What all weights have in common that are plain numbers."""

    def blocks(self, name: str) -> str:
        """Return that there are no blocks."""
        return ""

    def quantized(self, name: str, start: int, stop: int) -> Blocks:
        """Refuse: there are no blocks."""
        raise NotImplementedError(f"{name} is stored in plain numbers")


class Safetensors(Plain):
    """Tensors of safetensors files, mapped into memory."""

    def __init__(self, files: Sequence[Path], facts: ModelFacts) -> None:
        wanted = places(facts, facts.layers)
        self._stored: dict[str, tuple[Path, Stored]] = {}
        for path in files:
            for name, stored in read_header(path).items():
                if (place := place_of(name, wanted)) is not None:
                    self._stored[place] = path, stored
        self._data = cache(_mapped)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by the library's names."""
        return {name: stored.shape for name, (_, stored) in self._stored.items()}

    def rows(self, name: str, start: int, stop: int) -> Floats:
        """Return rows f32 of a tensor."""
        path, stored = self._stored[name]
        kind = np.dtype(NUMPY[stored.dtype])
        width = prod(stored.shape[1:]) * kind.itemsize
        begin = stored.begin + start * width
        raw = self._data(path)[begin : begin + (stop - start) * width].view(kind)
        return _as_f32(raw, stored.dtype).reshape(stop - start, *stored.shape[1:])


def _mapped(path: Path) -> NDArray[np.uint8]:
    """Return the data of a file behind its header."""
    return np.memmap(path, np.uint8, "r", offset=data_start(path))


def _as_f32(raw: NDArray[Any], kind: str) -> Floats:
    if kind == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):  # what is beyond f32 becomes infinite, which is refused where it is used
        return raw.astype(np.float32)


class Pickled(Plain):
    """Tensors of pickled files, which torch maps into memory."""

    def __init__(self, files: Sequence[Path], facts: ModelFacts) -> None:
        import torch

        wanted, self._tensors = places(facts, facts.layers), dict[str, Any]()
        for path in files:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
            self._tensors |= {place: t for name, t in state.items() if (place := place_of(name, wanted)) is not None}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by the library's names."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def rows(self, name: str, start: int, stop: int) -> Floats:
        """Return rows f32 of a tensor."""
        found: Floats = self._tensors[name][start:stop].float().numpy()
        return found


def _is_zip(path: Path) -> bool:
    """Return whether torch can map a file: older pickles are no archives."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


class Drawn(Plain):
    """Random weights of a shape, the same on every machine: norms are 1, biases 0, matrices drawn from a seed."""

    def __init__(self, facts: ModelFacts, seed: int, spread: float) -> None:
        self.seed, self.spread = seed, spread
        self._shapes = places(facts, facts.layers)
        if facts.tied:
            del self._shapes[HEAD]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by the library's names."""
        return self._shapes

    def rows(self, name: str, start: int, stop: int) -> Floats:
        """Return rows f32 of a tensor."""
        shape = self._shapes[name]
        if len(shape) == 1:
            return np.full(stop - start, 0 if name.endswith(".bias") else 1, np.float32)
        return draw_rows(self.seed, name, shape, self.spread, start, stop)


class Model:
    """The weights of a model by the names of all its places: a tied head is its table, and values are numbers."""

    def __init__(self, stored: Checkpoint, name: str, tied: bool) -> None:
        self.stored, self.name, self.tied = stored, name, tied
        self._alias = {}
        if tied:
            self._alias = {HEAD: EMBEDDING} if EMBEDDING in stored.shapes else {EMBEDDING: HEAD}

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self.stored.shapes[self._alias.get(name, name)]

    def has(self, name: str) -> bool:
        """Return whether the model has a tensor."""
        return self._alias.get(name, name) in self.stored.shapes

    def blocks(self, name: str) -> str:
        """Return the format of the blocks in which a matrix is stored."""
        return self.stored.blocks(self._alias.get(name, name))

    def quantized(self, name: str, start: int, stop: int) -> Blocks:
        """Return rows in blocks as they are stored."""
        return self.stored.quantized(self._alias.get(name, name), start, stop)

    def rows(self, name: str, start: int, stop: int) -> Floats:
        """Return rows of a tensor.

        Raises:
            InputError: some are NaN or infinite in f32: every answer would be none either.
        """
        found = self.stored.rows(self._alias.get(name, name), start, stop)
        with np.errstate(over="ignore", invalid="ignore"):
            total = found.sum()
        if not np.isfinite(total) and not np.isfinite(found).all():
            raise InputError(self._faulty(name))
        return found

    def whole(self, name: str) -> Floats:
        """Return a tensor."""
        return self.rows(name, 0, self.shape(name)[0])

    def _faulty(self, name: str) -> str:
        shape = self.shape(name)
        step = max(1, (1 << 22) // prod(shape[1:]))
        own, begins = self._alias.get(name, name), range(0, shape[0], step)
        parts = (self.stored.rows(own, begin, min(begin + step, shape[0])) for begin in begins)
        count = sum(int((~np.isfinite(part)).sum()) for part in parts)
        return f"{self.name}: {name} has {count} values that are NaN or infinite, of {prod(shape)}"


def untied(stored: Checkpoint) -> bool:
    """Return whether a head and a table that should be one differ in the files: the library then keeps both."""
    if not {HEAD, EMBEDDING} <= {*stored.shapes}:
        return False
    count, step = stored.shapes[HEAD][0], 4096
    ranges = ((start, min(start + step, count)) for start in range(0, count, step))
    return any(not np.array_equal(stored.rows(HEAD, *r), stored.rows(EMBEDDING, *r)) for r in ranges)
