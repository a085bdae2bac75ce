"""A model of the library run layer by layer, in f32: one decoder layer has its weights at a time.

Each layer is run by the library's own decoder, made with a single layer: masks, positions and what a layer computes are
the library's. Memory is that of one layer, whatever the model's size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from llmbuild.frontend.attention import causal_mask
from llmbuild.frontend.cache import CallerCache, RoundedCache, cache_name, new_cache
from llmbuild.frontend.checkpoint import Floats, Model
from llmbuild.frontend.tensors import EMBEDDING, HEAD
from llmbuild.spec.program import TensorType

HEAD_WEIGHTS = 1 << 23
"""Weights of the output matrix that are read at once: 32 MB."""

Weights = Callable[[str], Floats]
"""From a tensor's name in the model to the tensor."""


@dataclass(frozen=True)
class Cached:
    """Our attention over a cache of our own, as an import runs it: the buffers of one layer, by a context of tokens."""

    buffers: Callable[[int], Sequence[TensorType]]
    own: str = ""
    """What our own kernels for CPUs keep keys and values as, where these are rounded to it before they are written."""

    def cache(self, positions: torch.Tensor) -> CallerCache:
        """Return a zeroed cache for positions i64[1,T]."""
        made = new_cache(self.buffers(positions.shape[1]))
        return RoundedCache(made, positions, self.own) if self.own else CallerCache(made, positions)


class Layers:
    """The decoder of a model: `layer` puts one layer's weights in, `run` runs it on states f32[B,T,hidden]."""

    def __init__(self, config: Any, attention: str, cached: Cached | None = None) -> None:
        """Take the library's configuration; with `cached`, attention is ours and reads what it wrote to a cache."""
        from transformers import AutoModel

        one = copy.deepcopy(config)
        one.num_hidden_layers = 1
        if getattr(one, "layer_types", None):
            one.layer_types = one.layer_types[:1]
        library: Any = AutoModel
        with torch.device("meta"):
            self._decoder: Any = library.from_config(one, attn_implementation=attention)
        self._decoder.rotary_emb = type(self._decoder.rotary_emb)(config)
        self._norm, self._decoder.norm = self._decoder.norm, nn.Identity()
        self._decoder.eval().requires_grad_(False)
        self.config, self.cached = config, cached
        self.names = list(self.module.state_dict())

    @property
    def module(self) -> Any:
        """The one decoder layer."""
        return self._decoder.layers[0]

    def layer(self, index: int, weights: Weights) -> None:
        """Put in the weights of a layer; arrays are kept, not copied."""
        state = {name: torch.from_numpy(weights(f"model.layers.{index}.{name}")) for name in self.names}
        self.module.load_state_dict(state, assign=True)
        self.module.requires_grad_(False)

    def run(self, states: torch.Tensor) -> torch.Tensor:
        """Return what the layer makes of states f32[B,T,hidden] from position 0 on."""
        if self.cached is None:
            return self._decoder(inputs_embeds=states, use_cache=False).last_hidden_state
        return torch.cat([self._with_cache(row[None], self.cached) for row in states])

    def normalized(self, states: torch.Tensor, weight: Floats) -> torch.Tensor:
        """Return states after the final norm with this weight f32[hidden]."""
        self._norm.load_state_dict({"weight": torch.from_numpy(weight)}, assign=True)
        self._norm.requires_grad_(False)
        found: torch.Tensor = self._norm(states)
        return found

    def _with_cache(self, states: torch.Tensor, cached: Cached) -> torch.Tensor:
        length = states.shape[1]
        positions = torch.arange(length)[None]
        named: dict[str, Any] = {cache_name(self._decoder): cached.cache(positions)}
        found: torch.Tensor = self._decoder(
            inputs_embeds=states,
            attention_mask=causal_mask(positions, length),
            position_ids=positions,
            use_cache=True,
            **named,
        ).last_hidden_state
        return found


Look = Callable[[int], Floats]
"""From a token to its vector f32[1,hidden]."""


def embedded(look: Look, tokens: np.ndarray) -> torch.Tensor:
    """Return the token vectors f32[B,T,hidden] of tokens i64[B,T]; each token is looked up once."""
    ids, where = np.unique(tokens, return_inverse=True)
    rows = np.concatenate([look(int(token)) for token in ids])
    return torch.from_numpy(rows[where.reshape(tokens.shape)])


def own_vectors(model: Model) -> Look:
    """Return what looks tokens up in the model's own table."""
    return lambda token: model.rows(EMBEDDING, token, token + 1)


def head_parts(model: Model) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the output matrix in parts: where rows begin, and the rows f32[n,hidden]."""
    count, width = model.shape(HEAD)
    step = max(1, HEAD_WEIGHTS // width)
    for start in range(0, count, step):
        yield start, torch.from_numpy(model.rows(HEAD, start, min(start + step, count)))


def through_head(model: Model, states: torch.Tensor, out: np.ndarray) -> None:
    """Write the logits of normalized states f32[...,hidden] into `out` f32[...,V]."""
    for start, rows in head_parts(model):
        out[..., start : start + len(rows)] = nn.functional.linear(states, rows).numpy()
