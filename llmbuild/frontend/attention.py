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
    """Attend with query `[B, heads, T, head_dim]` to keys and values `[B * context, kv_heads, head_dim]`.

    The query heads of one key head stay a dimension of their own: keys and values are not repeated, and no reshape of a
    dynamic T is needed. Returns `[B, T, heads, head_dim]`.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    batch, kv_heads = query.shape[0], keys.shape[1]
    own = (batch, keys.shape[0] // batch, *keys.shape[1:])
    keys, values = keys.to(query.dtype).view(own), values.to(query.dtype).view(own)
    grouped = query.view(batch, kv_heads, query.shape[1] // kv_heads, *query.shape[2:])
    scores = torch.einsum("bgrtd,bsgd->bgrts", grouped, keys) * scale + attention_mask[:, :, None]
    weights = torch.softmax(scores, -1)
    return torch.einsum("bgrts,bsgd->btgrd", weights, values).flatten(2, 3), None


def causal_mask(positions: torch.Tensor, context: int) -> torch.Tensor:
    """Return f32 `[B, 1, T, context]` for positions i64[B,T]: 0 where a position may look, `MASKED` elsewhere."""
    visible = torch.arange(context)[None, None, :] <= positions[:, :, None]
    return torch.where(visible, 0.0, MASKED)[:, None]


def register() -> None:
    """Make the attention known to the library, which then takes it as `attn_implementation=NAME`."""
    ALL_ATTENTION_FUNCTIONS[NAME] = grouped_attention
