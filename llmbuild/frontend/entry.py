"""The two entry points of a program as torch modules: `spec/program.py` has their signatures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from llmbuild.frontend.attention import causal_mask
from llmbuild.frontend.cache import CallerCache
from llmbuild.frontend.own import OwnHead
from llmbuild.frontend.seam import apart


class _Entry(nn.Module):
    """Holds the model under one name in both entry points, so that both name a weight alike."""

    def __init__(self, model: Any, context: int) -> None:
        super().__init__()
        self.model = model
        self.context = context

    def step(
        self, tokens: torch.Tensor, positions: torch.Tensor, start: torch.Tensor, kv: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run tokens i64[B,T] at positions i64[B,T] from `start` i64[B] on; return the next tokens i64[B] and the
        last logits f32[B,V], or f32[V] of one sequence.
        """
        hidden = self.model.model(
            input_ids=tokens,
            attention_mask=causal_mask(positions, self.context),
            position_ids=positions,
            past_key_values=CallerCache(kv, positions, start),
            use_cache=True,
        ).last_hidden_state[:, -1:]
        if isinstance(self.model.lm_head, OwnHead):
            logits, token = self.model.lm_head(hidden)
            return token, logits
        logits = self.model.lm_head(hidden)[:, -1]
        if logits.shape[0] == 1:
            return apart(logits[0]).argmax(-1, keepdim=True), logits[0]
        return apart(logits).argmax(-1), logits


class Prefill(_Entry):
    """`prefill(tokens i64[B,T], start i64[B], *kv)`."""

    def forward(
        self, tokens: torch.Tensor, start: torch.Tensor, kv: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.step(tokens, start[:, None] + torch.arange(tokens.shape[1]), start, kv)


class Decode(_Entry):
    """`decode(tokens i64[B], positions i64[B], *kv)`."""

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, kv: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.step(tokens[:, None], positions[:, None], positions, kv)
