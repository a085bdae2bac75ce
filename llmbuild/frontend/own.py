"""Puts our own kernels into a model of the library: whole decoder layers, and the final norm with the output matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from llmbuild.errors import InputError
from llmbuild.frontend import operators
from llmbuild.frontend.cache import CallerCache
from llmbuild.frontend.modules import Embedding, RowMajor
from llmbuild.kernels.choose import KNOWN, choose
from llmbuild.kernels.head import HeadShape, head
from llmbuild.kernels.instructions import Instructions
from llmbuild.kernels.layer import MAX_LAYERS, layers
from llmbuild.kernels.shapes import DecoderShape
from llmbuild.transform import weights as layouts
from llmbuild.transform.decoder import layer_buffer

LAYERS, HEAD = "llmbuild_layers", "llmbuild_head"
NAMES = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
}
"""Our names of a layer's parts, and the library's."""


class OwnLayers(nn.Module):
    """Decoder layers as one operator; they are called like one of the library's."""

    def __init__(self, buffers: list[np.ndarray], first: int, kernel: str) -> None:
        super().__init__()
        self.first, self.count, self.kernel = first, len(buffers), kernel
        self.buffer: torch.Tensor
        self.register_buffer("buffer", torch.from_numpy(np.concatenate(buffers).view(np.int8)))

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        past_key_values: CallerCache,
        **_: object,
    ) -> torch.Tensor:
        """Return hidden states f32[1,T,hidden]."""
        cosine, sine = position_embeddings
        cache = list(past_key_values.buffers[2 * self.first : 2 * (self.first + self.count)])
        start, x = past_key_values.start, hidden_states[0]
        new: torch.Tensor = operators.layers(x, cosine[0], sine[0], start, self.buffer, cache, self.kernel)
        return new.unsqueeze(0)


class OwnHead(nn.Module):
    """The final norm and the output matrix as one operator, which finds the next token as well."""

    def __init__(self, shape: HeadShape, norm: torch.Tensor, dense: np.ndarray) -> None:
        super().__init__()
        self.shape = shape
        quantized, scale = layouts.quantize_rows(dense)
        self.norm: torch.Tensor
        self.data: torch.Tensor
        self.scale: torch.Tensor
        self.register_buffer("norm", norm.detach())
        self.register_buffer("data", torch.from_numpy(layouts.pack_quads(quantized).reshape(-1).view(np.int8)))
        self.register_buffer("scale", torch.from_numpy(layouts.pad_rows(scale)))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits f32[V] and the next token i64[1] of hidden states f32[1,1,hidden]."""
        logits, token = operators.head(x[0], self.norm, self.data, self.scale, HEAD)
        return logits.narrow(0, 0, self.shape.vocabulary), token


class QuadEmbedding(nn.Module):
    """A token table that reads the output matrix as our kernels keep it."""

    def __init__(self, head: OwnHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return f32[1,T,hidden] of tokens i64[1,T]."""
        row, column = tokens.unsqueeze(-1), torch.arange(self.head.shape.hidden)
        panel = row // 64 * (self.head.shape.hidden // 4) + column // 4
        place = panel * 256 + row % 64 // 16 * 64 + row % 16 * 4 + column % 4
        unsigned = self.head.data[place].to(torch.int32) & 255
        return (unsigned - 128).float() * self.head.scale[tokens].unsqueeze(-1)


def instructions(features: tuple[str, ...]) -> Instructions:
    """Return the instruction set that our kernels use on a target.

    Raises:
        InputError: the target has none that they are written for.
    """
    unit = choose(features)
    if unit is None:
        least, told = " and ".join(KNOWN[-1].features), " ".join(features) or "none of those it chooses by"
        raise InputError(f"kernel=own needs CPU features that the target does not have: at least {least}; found {told}")
    return unit


def check(model: Any, name: str) -> None:
    """Refuse what our kernels do not take.

    Raises:
        InputError: the model has a part that the kernels do not know.
    """
    config = model.config
    odd = [part for part in ("q_norm", "k_norm") if hasattr(model.model.layers[0].self_attn, part)]
    if config.hidden_act != "silu" or odd:
        raise InputError(
            f"{name}: kernel=own takes decoders with silu and plain heads, found {config.hidden_act} {odd}"
        )


def put_in(
    model: Any, name: str, context: int, half_cache: bool, work_groups: int, unit: Instructions
) -> dict[str, str]:
    """Replace layers, head and embedding in place; return the MLIR of the kernels by name."""
    shape = _shape(model, context, half_cache, work_groups)
    if problem := shape.problem():
        raise InputError(f"{name}: kernel=own: {problem}")
    head_shape = HeadShape(shape.hidden, model.config.vocab_size, shape.epsilon, work_groups)
    operators.HEADS[HEAD] = head_shape
    kernels, decoder = {HEAD: head(HEAD, head_shape, unit)}, model.model
    buffers = [layer_buffer(shape, _arrays(old)) for old in decoder.layers]
    groups, first = [], 0
    for part in _split(len(buffers)):
        kernel = f"{LAYERS}_{part}"
        operators.LAYERS[kernel], kernels[kernel] = shape, layers(kernel, shape, part, unit)
        groups.append(OwnLayers(buffers[first : first + part], first, kernel))
        first += part
    decoder.layers = nn.ModuleList(groups)
    tied = decoder.embed_tokens.weight.data_ptr() == model.lm_head.weight.data_ptr()
    table = decoder.embed_tokens.weight.detach().numpy()
    model.lm_head = OwnHead(head_shape, decoder.norm.weight, model.lm_head.weight.detach().numpy())
    decoder.embed_tokens = QuadEmbedding(model.lm_head) if tied else Embedding(RowMajor(table, "int8"))
    decoder.norm = nn.Identity()
    return kernels


def _split(count: int) -> list[int]:
    """Return how many layers go into each dispatch: as few dispatches as bindings allow, of nearly one size."""
    dispatches = -(-count // MAX_LAYERS)
    return [count // dispatches + (index < count % dispatches) for index in range(dispatches)]


def _shape(model: Any, context: int, half_cache: bool, workers: int) -> DecoderShape:
    config, attention = model.config, model.model.layers[0].self_attn
    return DecoderShape(
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=attention.head_dim,
        inner=config.intermediate_size,
        epsilon=config.rms_norm_eps,
        scale=attention.scaling,
        context=context,
        half_cache=half_cache,
        workers=workers,
    )


def _arrays(old: nn.Module) -> dict[str, np.ndarray]:
    arrays = {}
    for ours, theirs in NAMES.items():
        part: Any = old.get_submodule(theirs)
        arrays[ours] = part.weight.detach().numpy()
        if getattr(part, "bias", None) is not None:
            arrays[f"{ours}.bias"] = part.bias.detach().numpy()
    return arrays
