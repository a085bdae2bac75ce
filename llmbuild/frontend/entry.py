"""The entry points of a program as torch modules: `spec/program.py` has their signatures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from llmbuild.frontend.attention import causal_mask
from llmbuild.frontend.cache import CallerCache, SharedCache, cache_name
from llmbuild.frontend.fusion_barrier import fusion_barrier
from llmbuild.frontend.own import OwnHead


class _Entry(nn.Module):
    """Holds the model under one name in both entry points, so that both name a weight alike."""

    def __init__(self, model: Any, context: int) -> None:
        super().__init__()
        self.model = model
        self.context = context

    def last(
        self, tokens: torch.Tensor, positions: torch.Tensor, kv: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run tokens i64[B,T] at positions i64[B,T]; return the next tokens i64[B] and the
        last logits f32[B,V], or f32[V] of one sequence.

        The model reads the tokens of all sequences as one row, and only attention tells them apart: layers then have
        no dimension for the batch (SPIR-V backends of IREE 3.13 give up on the cache's write where they have one).
        """
        batch, length = tokens.shape
        hidden = self.states(tokens, positions, CallerCache(kv, positions))
        hidden = hidden[:, -1:] if batch == 1 else hidden.view(batch, length, -1)[:, -1].unsqueeze(0)
        if isinstance(self.model.lm_head, OwnHead):
            logits, token = self.model.lm_head(hidden)
            return token, logits
        logits = self.model.lm_head(hidden)[0]
        if batch == 1:
            return fusion_barrier(logits[-1]).argmax(-1, keepdim=True), logits[-1]
        return largest(fusion_barrier(logits)), logits

    def states(self, tokens: torch.Tensor, positions: torch.Tensor, cache: CallerCache) -> torch.Tensor:
        """Return the final hidden states f32[1,B*T,hidden]."""
        mask = causal_mask(positions, self.context)
        found: torch.Tensor = self.model.model(
            input_ids=tokens.view(1, -1),
            attention_mask=fusion_barrier(mask) if self.model.config.num_hidden_layers == 1 else mask,
            position_ids=positions.view(1, -1),
            use_cache=True,
            **{cache_name(self.model.model): cache},
        ).last_hidden_state
        return found


def largest(logits: torch.Tensor) -> torch.Tensor:
    """Return where each row of f32[B,V] has its largest value, the first of equal ones: i64[B].

    As two plain reductions: the compiler cannot share out `argmax` over several rows on GPUs (IREE 3.13: "failed to
    distribute" for cuda and vulkan).
    """
    tokens = torch.arange(logits.shape[1], dtype=torch.int32)
    there = logits >= logits.amax(-1, keepdim=True)
    return torch.where(there, tokens, logits.shape[1] - 1).amin(-1).to(torch.int64)


class Prefill(_Entry):
    """`prefill(tokens i64[B,T], start i64[B], *kv)`."""

    def forward(
        self, tokens: torch.Tensor, start: torch.Tensor, kv: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.last(tokens, start[:, None] + torch.arange(tokens.shape[1]), kv)


class Decode(_Entry):
    """`decode(tokens i64[B], positions i64[B], *kv)`."""

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, kv: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.last(tokens[:, None], positions[:, None], kv)


class Score(_Entry):
    """`score(tokens i64[1,T], start i64[1], *kv)`."""

    def forward(self, tokens: torch.Tensor, start: torch.Tensor, kv: Sequence[torch.Tensor]) -> torch.Tensor:
        positions = start[:, None] + torch.arange(tokens.shape[1])
        hidden = self.states(tokens, positions, CallerCache(kv, positions))
        if isinstance(self.model.lm_head, OwnHead):
            return self.model.lm_head.scores(hidden)
        logits: torch.Tensor = self.model.lm_head(hidden)[0]
        return logits


class Step(_Entry):
    """`step(tokens i64[T], positions i64[T], where i64[W], read i64[R], *kv)`, of our own kernels."""

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        where: torch.Tensor,
        read: torch.Tensor,
        kv: Sequence[torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.states(tokens[None], positions[None], SharedCache(kv, positions, where))
        logits, found = self.model.lm_head.picked(hidden, read)
        return found, logits
