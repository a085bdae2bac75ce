"""Attention over a caller's cache, in a form that exports with a dynamic prompt length and never copies the cache."""

from __future__ import annotations

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "llmbuild"
MASKED = -1e9
"""Added to scores that must not be seen. Finite: a row of -inf alone would give NaN."""


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Attend with query `[1, heads, T, head_dim]` to keys and values `[context, kv_heads, head_dim]`.

    The query heads of one key head stay a dimension of their own: keys and values are not repeated, and no reshape of a
    dynamic T is needed. Returns `[1, T, heads, head_dim]`.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    groups = query.shape[1] // keys.shape[1]
    grouped = query[0].view(keys.shape[1], groups, *query.shape[2:])
    scores = torch.einsum("grtd,sgd->grts", grouped, keys.to(query.dtype)) * scale + attention_mask[0, 0]
    weights = torch.softmax(scores, -1)
    mixed = torch.einsum("grts,sgd->tgrd", weights, values.to(query.dtype))
    return mixed.flatten(1, 2).unsqueeze(0), None


def causal_mask(positions: torch.Tensor, context: int) -> torch.Tensor:
    """Return f32 `[1, 1, T, context]`: 0 where a position may look, `MASKED` elsewhere."""
    visible = torch.arange(context)[None, :] <= positions[:, None]
    return torch.where(visible, 0.0, MASKED)[None, None]


def register() -> None:
    """Make the attention known to the library, which then takes it as `attn_implementation=NAME`."""
    ALL_ATTENTION_FUNCTIONS[NAME] = grouped_attention
