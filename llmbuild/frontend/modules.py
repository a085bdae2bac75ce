"""Linear layers and embeddings that read weights in the chosen format and layout, and the swap that puts them into
a model. They hold no weights: `archive` says how those are made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from llmbuild.frontend import nibbles
from llmbuild.transform import weights as layouts
from llmbuild.transform.stored import Rows, StoredMatrix

TORCH = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "int8", "uint8")}
"""Element types by their names."""

Form = Callable[[str], str]
"""From the name of a layer to the format that its weights are stored in."""


class Matrix(nn.Module):
    """A weight matrix `[N, K]` as it is stored; tied layers hold the same one, so that it is stored once.

    `data` is floating-point, int8, or 4-bit codes two in a byte. A quantized matrix has a `scale` for each row, or in
    groups of columns, and then `zero` points or a `minimum` as well where its format has them.
    """

    packed = False
    data: torch.Tensor
    scale: torch.Tensor | None
    zero: torch.Tensor | None
    minimum: torch.Tensor | None

    def __init__(self, rows: Rows, columns: int, form: str) -> None:
        super().__init__()
        self.stored = StoredMatrix(rows, columns, form, self.packed)
        self.rows, self.columns = rows.count, columns
        self.group, self.nibbles = self.stored.group, self.stored.nibbles
        kinds = self.stored.tensors()
        for name in ("data", "scale", "zero", "minimum"):
            kind = kinds.get(name)
            self.register_buffer(name, None if kind is None else torch.empty(kind.shape, dtype=TORCH[kind.dtype]))

    @property
    def groups(self) -> int:
        """Number of scales in a row."""
        return self.columns // self.group

    @property
    def grouped(self) -> bool:
        """Whether scales go with the columns; else they can wait until the row is summed."""
        return self.scale is not None and self.scale.dim() > 1

    def values(self) -> torch.Tensor:
        """Return what is stored, in f32 and in this layout, without the scales."""
        return (nibbles.unpack(self.data) if self.nibbles else self.data).float()

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Return x f32[1,T,K] times the transposed stored matrix: f32[1,T,N], without scales of rows."""
        raise NotImplementedError

    def place(self, row: torch.Tensor, column: torch.Tensor, columns: int) -> torch.Tensor:
        """Return where an element of an array `[N, columns]` is stored, counted in elements."""
        raise NotImplementedError

    def picked(self, data: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        """Return what is stored of rows i64[1,T,1] and columns i64[K], without scales: [1,T,K].

        By one flat index: indexing several axes with a dynamic T does not lower.
        """
        place = self.place(row, column, self.columns)
        return nibbles.picked(data, place) if self.nibbles else data[place]

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """Return x f32[1,T,K] times the transposed matrix: f32[1,T,N]."""
        out = self.product(x)
        return out if self.scale is None or self.grouped else out * self.scale

    def look_up(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows i64[1,T] of the matrix: f32[1,T,K]."""
        row, column = rows.unsqueeze(-1), torch.arange(self.columns)
        found = self.picked(self.data.flatten(), row, column).float()
        if self.scale is None:
            return found
        if not self.grouped:
            return found * self.scale[rows].unsqueeze(-1)
        shared = self.place(row, column // self.group, self.groups)
        if self.zero is not None:
            found = found - self.zero.flatten()[shared].float()
        if self.minimum is None:
            return found * self.scale.flatten()[shared].float()
        unsigned = (found.to(torch.int32) & 15).float()
        return unsigned * self.scale.flatten()[shared].float() + self.minimum.flatten()[shared].float()


I4_MULTIPLE = 64
"""Rows and columns that matrices of the compiler's `i4` have a multiple of: with others it has loads of parts of a
vector of them, which it cannot make code of (IREE 3.13: "failed to legalize operation 'vector.maskedload'")."""


class RowMajor(Matrix):
    """`[N, K]` as torch keeps it; scales `[N, K/group]`. Rows of an odd number of 4-bit codes end in half a byte."""

    @property
    def apart(self) -> bool:
        """Whether the two codes of a byte are taken apart by shifts."""
        return self.nibbles and bool(self.rows % I4_MULTIPLE or self.columns % I4_MULTIPLE)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        if self.apart:
            return self._by_halves(x)
        if self.grouped and x.shape[1] == 1:
            return self._grouped_row(x[0, 0]).reshape(1, 1, -1)
        dense = self.values()
        if self.grouped:
            assert self.scale is not None
            parts = dense.unflatten(1, (self.groups, self.group))
            if self.zero is not None:
                parts = parts - self.zero.float().unsqueeze(-1)
            dense = (parts * self.scale.float().unsqueeze(-1)).flatten(1)
        return nn.functional.linear(x, dense)

    def _grouped_row(self, x: torch.Tensor) -> torch.Tensor:
        """Return f32[N] for one row f32[K]: a sum for each group, then the scaled sum of these.

        A matrix product with the scaled weights would have the compiler write all of them as f32 first, a small
        matrix once and for all: decoding then reads eight times the bytes.
        """
        assert self.scale is not None
        x = x.unflatten(0, (self.groups, self.group))
        sums = (x[None] * self.values().unflatten(1, (self.groups, self.group))).sum(2)
        if self.zero is not None:
            sums = sums - x.sum(1)[None] * self.zero.float()
        return (sums * self.scale.float()).sum(1)

    def _by_halves(self, x: torch.Tensor) -> torch.Tensor:
        """Return f32[1,T,N] for x f32[1,T,K]: even columns meet the low halves of the bytes, odd ones the high halves.

        So no code is ever moved to where it stands among the columns.
        """
        pairs = nn.functional.pad(x, (0, self.columns % 2)).unflatten(-1, (-1, 2))
        bytes_ = self.data.to(torch.int32)
        halves = [(pairs[..., 0], nibbles.low(bytes_).float()), (pairs[..., 1], nibbles.high(bytes_).float())]
        if not self.grouped:
            return nn.functional.linear(*halves[0]) + nn.functional.linear(*halves[1])
        if x.shape[1] == 1:
            return self._grouped_halves([(part[0, 0], codes) for part, codes in halves]).reshape(1, 1, -1)
        assert self.scale is not None
        dense = [codes.unflatten(1, (self.groups, -1)) for _, codes in halves]
        if self.zero is not None:
            dense = [codes - self.zero.float().unsqueeze(-1) for codes in dense]
        scaled = [(codes * self.scale.float().unsqueeze(-1)).flatten(1) for codes in dense]
        return nn.functional.linear(halves[0][0], scaled[0]) + nn.functional.linear(halves[1][0], scaled[1])

    def _grouped_halves(self, halves: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """Return f32[N] for one row: a sum for each group, then the scaled sum of these.

        `halves` are every other of the row's columns f32[K/2] with their codes f32[N,K/2].
        """
        assert self.scale is not None
        grouped = [(x.unflatten(0, (self.groups, -1)), codes.unflatten(1, (self.groups, -1))) for x, codes in halves]
        sums = sum(((x[None] * codes).sum(2) for x, codes in grouped), torch.zeros(()))
        if self.zero is not None:
            sums = sums - sum((x.sum(1)[None] for x, _ in grouped), torch.zeros(())) * self.zero.float()
        return (sums * self.scale.float()).sum(1)

    def place(self, row: torch.Tensor, column: torch.Tensor, columns: int) -> torch.Tensor:
        return row * columns + column

    def picked(self, data: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        if not self.nibbles:
            return super().picked(data, row, column)
        half = (self.columns + 1) // 2
        pairs = data[row * half + column[:half]].to(torch.int32)
        return torch.stack((nibbles.low(pairs), nibbles.high(pairs)), -1).flatten(-2)[..., : self.columns]


class Packed(Matrix):
    """`[N/64, K, 64]`: panels of 64 rows; scales `[N/64, K/group, 64]`."""

    packed = True

    def values(self) -> torch.Tensor:
        if not self.nibbles or self.columns % I4_MULTIPLE == 0:
            return super().values()
        bytes_ = self.data.to(torch.int32)
        return torch.stack((nibbles.low(bytes_), nibbles.high(bytes_)), -1).flatten(-2).float()

    def product(self, x: torch.Tensor) -> torch.Tensor:
        panels = self.values()
        if x.shape[1] == 1:  # one row: a matrix product would be padded to the tile of one
            out = self._grouped_row(x[0, 0], panels) if self.grouped else (x[0, 0, None, :, None] * panels).sum(1)
            out = out.reshape(1, 1, -1)
        else:  # as one matrix product: a batch of panels ends in a transposed store, three times slower
            dense = self._scaled(panels) if self.grouped else panels
            out = torch.einsum("tk,pkl->tpl", x[0], dense).flatten(1, 2).unsqueeze(0)
        return out if out.shape[-1] == self.rows else out[..., : self.rows]

    def _grouped_row(self, x: torch.Tensor, panels: torch.Tensor) -> torch.Tensor:
        """Return f32[N/64,64] for one row f32[K]: a sum for each group, then the scaled sum of these.

        Scaled within the inner sum, the same takes four times as long.
        """
        assert self.scale is not None
        x = x.unflatten(0, (self.groups, self.group))
        sums = (x[None, :, :, None] * panels.unflatten(1, (self.groups, self.group))).sum(2)
        if self.zero is not None:
            sums = sums - x.sum(1)[None, :, None] * self.zero.float()
        return (sums * self.scale.float()).sum(1)

    def _scaled(self, panels: torch.Tensor) -> torch.Tensor:
        assert self.scale is not None
        parts = panels.unflatten(1, (self.groups, self.group))
        if self.zero is not None:
            parts = parts - self.zero.float().unsqueeze(2)
        return (parts * self.scale.float().unsqueeze(2)).flatten(1, 2)

    def place(self, row: torch.Tensor, column: torch.Tensor, columns: int) -> torch.Tensor:
        return (row // layouts.PANEL * columns + column) * layouts.PANEL + row % layouts.PANEL


Store = Callable[[Rows, int, str], Matrix]
"""From rows, columns and format to the matrix."""

LAYOUTS: dict[str, Store] = {"row_major": RowMajor, "packed": Packed}


class Linear(nn.Module):
    """A linear layer over a stored matrix; `biased` says whether the layers whose rows it has have biases."""

    def __init__(self, matrix: Matrix, biased: bool = False) -> None:
        super().__init__()
        self.matrix = matrix
        self.bias: torch.Tensor | None
        self.register_buffer("bias", torch.empty(matrix.rows) if biased else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.matrix.multiply(x)
        return out if self.bias is None else out + self.bias


class Embedding(nn.Module):
    """A table of token vectors over a stored matrix."""

    def __init__(self, matrix: Matrix) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.matrix.look_up(tokens)


class ScaledColumns(nn.Module):
    """A table of token vectors and a factor f32[K] for their columns."""

    def __init__(self, table: nn.Module, columns: int) -> None:
        super().__init__()
        self.table = table
        self.factor: torch.Tensor
        self.register_buffer("factor", torch.empty(columns))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = self.table(tokens)
        return rows * self.factor


class Fused(nn.Module):
    """Several linear layers of one input as one; `Part`s hand out its columns."""

    def __init__(self, linear: Linear, parts: int) -> None:
        super().__init__()
        self.linear = linear
        self.parts = parts
        self._taken: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute for the first part that asks, remember for the others, forget after the last."""
        if not self._taken:
            self._taken = [self.linear(x)] * self.parts
        return self._taken.pop()


class Part(nn.Module):
    """One of the layers that were fused."""

    def __init__(self, fused: Fused, start: int, size: int) -> None:
        super().__init__()
        self.fused = fused
        self.start, self.size = start, size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        whole: torch.Tensor = self.fused(x)
        return whole.narrow(-1, self.start, self.size)


FUSED_GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of one parent module that the library calls with the same input, in this order."""


def swap(model: Any, form: Form, kind: Store, fused: bool) -> None:
    """Put stored matrices into the model, in place: every linear layer, the embedding, and a tied head only once.

    Layers of one input become one matrix if `fused`.
    """
    names = {id(module): name for name, module in model.named_modules()}
    if fused:
        for parent in list(model.modules()):
            for group in FUSED_GROUPS:
                layers = [getattr(parent, name, None) for name in group]
                if all(isinstance(layer, nn.Linear) for layer in layers):
                    _fuse(parent, group, [names[id(layer)] for layer in layers], kind, form)
    stored: dict[int, Matrix] = {}
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if not isinstance(layer, nn.Linear | nn.Embedding):
                continue
            weight, full = layer.weight, names[id(layer)]
            if id(weight) not in stored:
                stored[id(weight)] = kind(Rows(((full, weight.shape[0]),)), weight.shape[1], form(full))
            matrix = stored[id(weight)]
            is_table = isinstance(layer, nn.Embedding)
            setattr(parent, name, Embedding(matrix) if is_table else Linear(matrix, layer.bias is not None))


def _fuse(parent: nn.Module, names: tuple[str, ...], full: Sequence[str], kind: Store, form: Form) -> None:
    layers: list[Any] = [getattr(parent, name) for name in names]
    rows = Rows(tuple((name, layer.out_features) for name, layer in zip(full, layers, strict=True)))
    matrix = kind(rows, layers[0].in_features, form(full[0]))
    fused, start = Fused(Linear(matrix, layers[0].bias is not None), len(layers)), 0
    for name, layer in zip(names, layers, strict=True):
        setattr(parent, name, Part(fused, start, layer.out_features))
        start += layer.out_features
