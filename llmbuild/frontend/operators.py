"""Our kernels as torch operators: eager PyTorch runs their NumPy reference, an export keeps their names for `splice`."""

from __future__ import annotations

import numpy as np
import torch

from llmbuild.kernels.head import HeadShape
from llmbuild.kernels.shapes import DecoderShape
from llmbuild.transform import reference, weights

LAYERS: dict[str, DecoderShape] = {}
HEADS: dict[str, HeadShape] = {}
"""Shapes by kernel name: an operator can carry a name, not a dataclass."""


@torch.library.custom_op("llmbuild::layer", mutates_args=())
def layer(
    x: torch.Tensor,
    cosine: torch.Tensor,
    sine: torch.Tensor,
    start: torch.Tensor,
    buffer: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    kernel: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run one decoder layer; return the hidden states f32[T,hidden] and the new cache."""
    arrays = [tensor.numpy() for tensor in (x, cosine, sine)]
    cache = [tensor.numpy() for tensor in (keys, values)]
    packed = buffer.numpy().view(np.uint8)
    new = reference.layer(LAYERS[kernel], *arrays, int(start[0]), packed, *cache)
    return tuple(torch.from_numpy(np.ascontiguousarray(part)) for part in new)  # type: ignore[return-value]


@layer.register_fake
def _(
    x: torch.Tensor,
    cosine: torch.Tensor,
    sine: torch.Tensor,
    start: torch.Tensor,
    buffer: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    kernel: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(keys), torch.empty_like(values)


@torch.library.custom_op("llmbuild::head", mutates_args=())
def head(
    x: torch.Tensor, norm: torch.Tensor, data: torch.Tensor, scale: torch.Tensor, kernel: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits f32[padded vocabulary] of one hidden state f32[1,hidden], and the first largest one's index i64[1]."""
    shape = HEADS[kernel]
    quads = data.numpy().view(np.uint8).reshape(-1, shape.hidden // 4, 4, 16, 4)
    matrix = (weights.unpack_quads(quads, shape.padded), scale.numpy(), np.zeros(shape.padded, np.float32))
    normal = reference.normalize(x.numpy(), norm.numpy(), shape.epsilon)
    logits = torch.from_numpy(reference.multiply(normal, matrix)[0])
    return logits, logits[: shape.vocabulary].argmax(-1, keepdim=True)


@head.register_fake
def _(
    x: torch.Tensor, norm: torch.Tensor, data: torch.Tensor, scale: torch.Tensor, kernel: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(scale), x.new_empty(1, dtype=torch.int64)
