"""Linear layers and embeddings that read weights in the chosen format and layout, and the swap that puts them into
a model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from llmbuild.transform import weights as layouts

STORED = {"f32": np.float32, "f16": np.float16, "int8": np.int8}


class Matrix(nn.Module):
    """A weight matrix `[N, K]` as it is stored; tied layers hold the same one, so that it is stored once."""

    def __init__(self, dense: np.ndarray, weight_format: str) -> None:
        super().__init__()
        self.rows, self.columns = dense.shape
        self.scale: torch.Tensor | None
        if weight_format == "int8":
            dense, scale = layouts.quantize_rows(dense)
            self.register_buffer("scale", torch.from_numpy(scale))
        else:
            self.register_buffer("scale", None)
        self.data: torch.Tensor
        self.register_buffer("data", torch.from_numpy(self.lay_out(dense.astype(STORED[weight_format]))))

    def lay_out(self, stored: np.ndarray) -> np.ndarray:
        """Return the array that is stored."""
        raise NotImplementedError

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Return x f32[1,T,K] times the transposed stored matrix: f32[1,T,N], without the scales."""
        raise NotImplementedError

    def gathered(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the stored values of rows i64[1,T]: [1,T,K]."""
        raise NotImplementedError

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """Return x f32[1,T,K] times the transposed matrix: f32[1,T,N]."""
        out = self.product(x)
        return out if self.scale is None else out * self.scale

    def look_up(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows i64[1,T] of the matrix: f32[1,T,K]."""
        out = self.gathered(rows).float()
        return out if self.scale is None else out * self.scale[rows].unsqueeze(-1)


class RowMajor(Matrix):
    """`[N, K]` as torch keeps it."""

    def lay_out(self, stored: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(stored)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.data.float())

    def gathered(self, rows: torch.Tensor) -> torch.Tensor:
        return self.data[rows]


class Packed(Matrix):
    """`[N/64, K, 64]`: panels of 64 rows."""

    def lay_out(self, stored: np.ndarray) -> np.ndarray:
        return layouts.pack_panels(stored)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        panels = self.data.float()
        if x.shape[1] == 1:  # one row: a matrix product would be padded to the tile of one
            out = (x[0, 0, None, :, None] * panels).sum(1).reshape(1, 1, -1)
        else:  # as one matrix product: a batch of panels ends in a transposed store, three times slower
            out = torch.einsum("tk,pkl->tpl", x[0], panels).flatten(1, 2).unsqueeze(0)
        return out if out.shape[-1] == self.rows else out[..., : self.rows]

    def gathered(self, rows: torch.Tensor) -> torch.Tensor:
        row, column = rows.unsqueeze(-1), torch.arange(self.columns)
        place = (row // layouts.PANEL * self.columns + column) * layouts.PANEL + row % layouts.PANEL
        return self.data.flatten()[place]  # one flat index: indexing several axes with a dynamic T does not lower


LAYOUTS: dict[str, type[Matrix]] = {"row_major": RowMajor, "packed": Packed}


class Linear(nn.Module):
    """A linear layer over a stored matrix."""

    def __init__(self, matrix: Matrix, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.matrix = matrix
        self.bias: torch.Tensor | None
        self.register_buffer("bias", bias)

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


def swap(model: Any, weight_format: str, layout: str) -> None:
    """Put stored matrices into the model, in place: every linear layer, the embedding, and a tied head only once."""
    kind = LAYOUTS[layout]
    if layout != "row_major":
        for parent in list(model.modules()):
            for names in FUSED_GROUPS:
                if all(isinstance(getattr(parent, name, None), nn.Linear) for name in names):
                    _fuse(parent, names, lambda dense: kind(dense, weight_format))
    _swap_rest(model, lambda dense: kind(dense, weight_format))


def _fuse(parent: nn.Module, names: tuple[str, ...], store: Callable[[np.ndarray], Matrix]) -> None:
    layers = [getattr(parent, name) for name in names]
    dense = np.concatenate([layer.weight.detach().numpy() for layer in layers])
    biases = [layer.bias for layer in layers]
    bias = None if biases[0] is None else torch.cat([b.detach() for b in biases])
    fused, start = Fused(Linear(store(dense), bias), len(layers)), 0
    for name, layer in zip(names, layers, strict=True):
        setattr(parent, name, Part(fused, start, layer.out_features))
        start += layer.out_features


def _swap_rest(model: nn.Module, store: Callable[[np.ndarray], Matrix]) -> None:
    stored: dict[int, Matrix] = {}
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if not isinstance(layer, nn.Linear | nn.Embedding):
                continue
            dense = layer.weight.detach()
            matrix = stored.setdefault(dense.data_ptr(), store(dense.numpy()))
            if isinstance(layer, nn.Embedding):
                setattr(parent, name, Embedding(matrix))
            else:
                setattr(parent, name, Linear(matrix, None if layer.bias is None else layer.bias.detach()))
