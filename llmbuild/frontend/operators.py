"""Our kernels as torch operators: eager PyTorch runs their NumPy reference, an export keeps their names for
`splice`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from llmbuild.kernels.head import HeadShape
from llmbuild.kernels.layer_weights import offsets
from llmbuild.kernels.shapes import DecoderShape
from llmbuild.transform import reference
from llmbuild.transform.panels import Matrix, unpack
from llmbuild.transform.weights import Array

LAYERS: dict[str, Sequence[DecoderShape]] = {}
PAGED: dict[str, Sequence[DecoderShape]] = {}
HEADS: dict[str, HeadShape] = {}
"""Shapes by kernel name: an operator can carry a name, not a dataclass. `PAGED` are layers whose cache is shared."""


@torch.library.custom_op("llmbuild::layers", mutates_args=())
def layers(
    x: torch.Tensor,
    cosine: torch.Tensor,
    sine: torch.Tensor,
    where: torch.Tensor,
    buffer: torch.Tensor,
    cache: list[torch.Tensor],
    kernel: str,
) -> torch.Tensor:
    """Run decoder layers; return the hidden states f32[T,width]. `where` i64[W] is as the kernel takes it.

    The cache is written in place, and torch is not told: an export would otherwise return a copy of it.
    """
    shapes, state = PAGED.get(kernel) or LAYERS[kernel], x.numpy()
    seen = _seen(where.numpy(), len(state), shapes[0].page if kernel in PAGED else 0)
    angles = cosine.numpy(), sine.numpy()
    stored = np.split(buffer.numpy().view(np.uint8), offsets(shapes)[1:-1])
    for shape, packed, pair in zip(shapes, stored, pairs(cache), strict=True):
        arrays = [part.numpy() for part in pair]
        state, *new = reference.layer(shape, state, *angles, seen, packed, *arrays)
        for old, part in zip(arrays, new, strict=True):
            old[:] = part
    return torch.from_numpy(np.ascontiguousarray(state))


def _seen(where: Array, rows: int, page: int) -> list[Array]:
    """Return the places in a cache that each row attends to; `page` is 0 for that of one sequence."""
    tables = [where[first:] for first in where[rows : 2 * rows]] if page else []
    return reference.places(where[:rows], tables, page)


def pairs(cache: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return keys and values of each layer."""
    return list(zip(cache[::2], cache[1::2], strict=True))


@layers.register_fake
def _(
    x: torch.Tensor,
    cosine: torch.Tensor,
    sine: torch.Tensor,
    where: torch.Tensor,
    buffer: torch.Tensor,
    cache: list[torch.Tensor],
    kernel: str,
) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("llmbuild::head", mutates_args=())
def head(
    x: torch.Tensor, norm: torch.Tensor, data: torch.Tensor, scale: torch.Tensor, kernel: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits f32[padded vocabulary] of one hidden state f32[1,width], and the first largest one's index
    i64[1].
    """
    shape = HEADS[kernel]
    stored = unpack(shape.layout, data.view(torch.uint8).numpy(), scale.view(torch.uint8).numpy())
    matrix = Matrix(*stored, np.zeros(shape.padded, np.float32), shape.layout)
    normal = reference.normalize(x.numpy(), norm.numpy(), shape.epsilon, shape.hidden)
    logits = torch.from_numpy(reference.multiply(normal, matrix)[0])
    return logits, logits[: shape.vocabulary].argmax(-1, keepdim=True)


@head.register_fake
def _(
    x: torch.Tensor, norm: torch.Tensor, data: torch.Tensor, scale: torch.Tensor, kernel: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(HEADS[kernel].padded), x.new_empty(1, dtype=torch.int64)


@torch.library.custom_op("llmbuild::scores", mutates_args=())
def scores(x: torch.Tensor, norm: torch.Tensor, data: torch.Tensor, scale: torch.Tensor, kernel: str) -> torch.Tensor:
    """Return logits f32[T,padded vocabulary] of hidden states f32[T,width]."""
    return torch.stack([head(row[None], norm, data, scale, kernel)[0] for row in x])


@scores.register_fake
def _(x: torch.Tensor, norm: torch.Tensor, data: torch.Tensor, scale: torch.Tensor, kernel: str) -> torch.Tensor:
    return x.new_empty(x.shape[0], HEADS[kernel].padded)


def rows(data: torch.Tensor, scale: torch.Tensor, kernel: str) -> torch.Tensor:
    """Return the rows f32[padded vocabulary,width] of an output matrix, of which `kernels.look` looks some up."""
    values, scales = unpack(HEADS[kernel].layout, data.view(torch.uint8).numpy(), scale.view(torch.uint8).numpy())
    return torch.from_numpy(values * scales[:, None])


@torch.library.custom_op("llmbuild::picked", mutates_args=())
def picked(
    x: torch.Tensor, read: torch.Tensor, norm: torch.Tensor, data: torch.Tensor, scale: torch.Tensor, kernel: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits f32[R,padded vocabulary] and the first largest ones' indices i64[R] of the hidden states that
    `read` names, of f32[T,width].
    """
    found = [head(x[row][None], norm, data, scale, kernel) for row in read]
    return torch.stack([logits for logits, _ in found]), torch.cat([token for _, token in found])


@picked.register_fake
def _(
    x: torch.Tensor, read: torch.Tensor, norm: torch.Tensor, data: torch.Tensor, scale: torch.Tensor, kernel: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(read.shape[0], HEADS[kernel].padded), torch.empty_like(read)


@torch.library.custom_op("llmbuild_shell::look", mutates_args=())
def look(tokens: torch.Tensor, width: int) -> torch.Tensor:
    """Stand for the look-up of tokens i64[1,T] in a table: f32[1,T,width]. It is traced, never run."""
    raise NotImplementedError("the look-up of a shell is put in by `shell.module`")


@look.register_fake
def _(tokens: torch.Tensor, width: int) -> torch.Tensor:
    return tokens.new_empty((*tokens.shape, width), dtype=torch.float32)
