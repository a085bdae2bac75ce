"""The two entry points of a program as torch modules: `spec/program.py` has their signatures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from llmbuild.frontend.attention import causal_mask
from llmbuild.frontend.cache import CallerCache


class _Entry(nn.Module):
    """Holds the model under one name in both entry points, so that both name a weight alike."""

    def __init__(self, model: nn.Module, context: int) -> None:
        super().__init__()
        self.model = model
        self.context = context

    def step(
        self, tokens: torch.Tensor, positions: torch.Tensor, kv: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run tokens i64[1,T] at positions i64[T]; return the next token i64[1] and the last logits f32[V]."""
        output = self.model(
            input_ids=tokens,
            attention_mask=causal_mask(positions, self.context),
            position_ids=positions[None],
            past_key_values=CallerCache(kv, positions),
            use_cache=True,
            logits_to_keep=1,
        )
        logits = output.logits[0, -1].float()
        return logits.argmax(-1, keepdim=True), logits


class Prefill(_Entry):
    """`prefill(tokens i64[1,T], start i64[1], *kv)`."""

    def forward(
        self, tokens: torch.Tensor, start: torch.Tensor, kv: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.step(tokens, start + torch.arange(tokens.shape[1]), kv)


class Decode(_Entry):
    """`decode(token i64[1], position i64[1], *kv)`."""

    def forward(
        self, token: torch.Tensor, position: torch.Tensor, kv: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.step(token[None], position, kv)
