"""Puts our own kernels into a model of the library: whole decoder layers, and the final norm with the output matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from llmbuild.errors import ChoiceRefused
from llmbuild.frontend import operators
from llmbuild.frontend.cache import CallerCache
from llmbuild.frontend.formats import TABLES, Formats
from llmbuild.frontend.modules import Embedding, RowMajor, ScaledColumns, Weights
from llmbuild.kernels.applies import ACTIVATIONS, cpu_problem
from llmbuild.kernels.choose import instructions
from llmbuild.kernels.head import HeadShape, head
from llmbuild.kernels.instructions import Instructions
from llmbuild.kernels.layer import MAX_LAYERS, layers
from llmbuild.kernels.layouts import PANEL, PERIOD, QUAD, family
from llmbuild.kernels.shapes import DecoderShape
from llmbuild.kernels.shared_exponent import MOVED, STEP
from llmbuild.spec.decoder import Decoder
from llmbuild.transform.decoder import layer_buffer
from llmbuild.transform.panels import encode_for, pack
from llmbuild.transform.quantized import Quantized, pad_columns
from llmbuild.transform.weights import pad_width

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
HEAD_NORMS = {"query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"}
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
        **named: object,
    ) -> torch.Tensor:
        """Return hidden states f32[1,T,width]."""
        cosine, sine = position_embeddings
        cache = next(value for value in named.values() if isinstance(value, CallerCache))
        buffers = list(cache.buffers[2 * self.first : 2 * (self.first + self.count)])
        x = hidden_states[0]
        new: torch.Tensor = operators.layers(x, cosine[0], sine[0], cache.start, self.buffer, buffers, self.kernel)
        return new.unsqueeze(0)


class OwnHead(nn.Module):
    """The final norm and the output matrix as one operator, which finds the next token as well."""

    def __init__(
        self, shape: HeadShape, norm: torch.Tensor, weights: torch.Tensor, ready: Quantized | None = None
    ) -> None:
        """Take weights f32[V,hidden], and what was quantized of them before, if it was."""
        super().__init__()
        self.shape = shape
        self.norm: torch.Tensor
        self.data: torch.Tensor
        self.scale: torch.Tensor
        data, scale = pack(shape.layout, encode_for(shape.layout, weights.float().numpy(), ready))
        self.register_buffer("norm", torch.from_numpy(pad_width(norm.numpy(), shape.width)))
        self.register_buffer("data", _tensor(data))
        self.register_buffer("scale", _tensor(scale))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits f32[V] and the next token i64[1] of hidden states f32[1,1,width]."""
        logits, token = operators.head(x[0], self.norm, self.data, self.scale, HEAD)
        return logits.narrow(0, 0, self.shape.vocabulary), token


def _tensor(stored: np.ndarray) -> torch.Tensor:
    """Return the array as torch sees it; u16 are bf16."""
    if stored.dtype == np.uint16:
        return torch.from_numpy(stored.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(stored)


class PanelEmbedding(nn.Module):
    """A token table that reads the output matrix as our kernels keep it."""

    def __init__(self, head: OwnHead) -> None:
        super().__init__()
        self.head = head
        self.powers: torch.Tensor
        self.register_buffer("powers", torch.tensor([0.0, *(2.0 ** (e - 22) for e in range(1, 16))]))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return f32[1,T,width] of tokens i64[1,T]."""
        layout, row = self.head.shape.layout, tokens.unsqueeze(-1)
        column = torch.arange(layout.columns)
        shared = 2 if layout.is_nibble else 1
        if layout.is_shared:
            return self._shared(row, column) * self.head.scale[row]
        if layout.in_groups:
            return (self._sevens(row, column) - layout.offset).float() * self._scale(row, column // layout.group)
        together = {"f16": 1, "bf16": 2}.get(layout.form, QUAD)
        step = column // (together * shared)
        place = row // PANEL * layout.panel_elements + step * PANEL * together
        stored = self.head.data[place + row % PANEL * together + column % together]
        scale = self._scale(row, column // layout.group)
        if layout.is_half:
            return stored.float() * scale
        code = stored.to(torch.int32) & 255
        if layout.is_nibble:
            code = torch.where(column // QUAD % 2 == 0, code & 15, code >> 4)
        return (code - layout.offset).float() * scale

    def _shared(self, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        """Return numbers of 12 bits without the power of two of their row."""
        line = QUAD * PANEL
        first = row // PANEL * self.head.shape.layout.panel_elements + row % PANEL * QUAD + column // STEP * 3 * line
        three = [self._word(first + i * line) for i in range(3)]
        turned = three[2] >> MOVED[2] | three[2] << 32 - MOVED[2]
        fourth = torch.bitwise_xor(torch.bitwise_xor(three[0] >> MOVED[0], three[1] >> MOVED[1]), turned)
        pair, found = column % STEP // 2, fourth
        for i in range(3):
            found = torch.where(pair == i, three[i], found)
        code = torch.where(column % 2 == 0, found, found >> 16)
        size = (128 + (code & 127)).float() * self.powers[code >> 7 & 15]
        return size * ((code >> 15 & 1).float() * -2 + 1)

    def _word(self, first: torch.Tensor) -> torch.Tensor:
        """Return 32 bits from four bytes on, as i64 that is not negative."""
        word = self.head.data[first].long() & 255
        for i in range(1, 4):
            word = word | (self.head.data[first + i].long() & 255) << 8 * i
        return word

    def _sevens(self, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        """Return codes of 7 bits, i32."""
        quad, line = column % PERIOD // QUAD, QUAD * PANEL
        first = row // PANEL * self.head.shape.layout.panel_elements + row % PANEL * QUAD + column % QUAD
        first = first + column // PERIOD * 7 * line
        own = self.head.data[first + quad.clamp(max=6) * line].to(torch.int32) & 127
        bits = [self.head.data[first + i * line].to(torch.int32) >> 7 & 1 for i in range(7)]
        return torch.where(quad < 7, own, sum((bit << i for i, bit in enumerate(bits)), torch.zeros_like(own)))

    def _scale(self, row: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
        groups = self.head.shape.layout.groups
        if groups == 1:
            return self.head.scale[row]
        return self.head.scale[(row // PANEL * groups + group) * PANEL + row % PANEL].float()


@dataclass(frozen=True)
class Units:
    """The instruction sets of the layers and of the head."""

    layers: Instructions
    head: Instructions


def check(model: Any, name: str, features: tuple[str, ...], formats: tuple[str, str]) -> Units:
    """Refuse what our kernels do not take; return what they are written in for formats of layers and head.

    Raises:
        ChoiceRefused: the kernels do not know a format on this target, or a part of the model.
    """
    units = Units(*(instructions(features, form) for form in formats))
    if problem := cpu_problem(facts(model), *formats):
        raise ChoiceRefused(f"{name}: kernel=own: {problem}")
    return units


def facts(model: Any) -> Decoder:
    """Return what decides whether our kernels apply to a model of the library."""
    config, attention = model.config, model.model.layers[0].self_attn
    return Decoder(
        hidden=config.hidden_size,
        inner=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=attention.head_dim,
        vocabulary=config.vocab_size,
        activation=config.hidden_act,
        head_norms=hasattr(attention, "q_norm"),
    )


def put_in(
    model: Any, context: int, half_cache: bool, work_groups: int, formats: Formats, units: Units
) -> dict[str, str]:
    """Replace layers, head and embedding in place; return the MLIR of the kernels by name."""
    shape = _shape(model, context, half_cache, work_groups, formats, units.layers)
    vocabulary, narrow = model.config.vocab_size, _narrow(units.head, formats.head)
    head_shape = HeadShape(
        shape.hidden, vocabulary, shape.epsilon, work_groups, formats.head, narrow, layer_weights=formats.layers
    )
    operators.HEADS[HEAD] = head_shape
    kernels, decoder = {HEAD: head(HEAD, head_shape, units.head)}, model.model
    buffers = [layer_buffer(shape, _arrays(old), _ready(formats, i)) for i, old in enumerate(decoder.layers)]
    groups, first = [], 0
    for part in _split(len(buffers)):
        kernel = f"{LAYERS}_{part}"
        operators.LAYERS[kernel], kernels[kernel] = shape, layers(kernel, shape, part, units.layers)
        groups.append(OwnLayers(buffers[first : first + part], first, kernel))
        first += part
    decoder.layers = nn.ModuleList(groups)
    _put_in_tables(model, head_shape, formats)
    return kernels


def _put_in_tables(model: Any, shape: HeadShape, formats: Formats) -> None:
    """Replace embedding, final norm and head."""
    decoder = model.model
    embedding, output = decoder.embed_tokens.weight.detach(), model.lm_head.weight.detach()
    tied = embedding.data_ptr() == output.data_ptr()
    model.lm_head = OwnHead(shape, decoder.norm.weight.detach(), output, formats.ready.get(TABLES[1]))
    decoder.embed_tokens = (
        PanelEmbedding(model.lm_head)
        if tied
        else Embedding(RowMajor(_padded(formats(TABLES[0], embedding.numpy()), shape.width)))
    )
    decoder.norm = nn.Identity()
    if formats.looked_up is not None:
        factor = torch.from_numpy(pad_width(formats.looked_up.numpy(), shape.width))
        decoder.embed_tokens = ScaledColumns(decoder.embed_tokens, factor)


def _padded(weights: Weights, width: int) -> Weights:
    """Return a table with zeros behind its columns."""
    if isinstance(weights, Quantized):
        return pad_columns(weights, width)
    return nn.functional.pad(weights, (0, width - weights.shape[1]))


def _ready(formats: Formats, layer: int) -> dict[str, Quantized]:
    """Return the matrices of a layer that were quantized before, by our names."""
    names = {ours: f"model.layers.{layer}.{theirs}" for ours, theirs in NAMES.items()}
    return {ours: formats.ready[theirs] for ours, theirs in names.items() if theirs in formats.ready}


def _split(count: int) -> list[int]:
    """Return how many layers go into each dispatch: as few dispatches as bindings allow, of nearly one size."""
    dispatches = -(-count // MAX_LAYERS)
    return [count // dispatches + (index < count % dispatches) for index in range(dispatches)]


def _shape(
    model: Any, context: int, half_cache: bool, workers: int, formats: Formats, unit: Instructions
) -> DecoderShape:
    known, attention = facts(model), model.model.layers[0].self_attn
    return DecoderShape(
        hidden=known.hidden,
        heads=known.heads,
        kv_heads=known.kv_heads,
        head_dim=known.head_dim,
        inner=known.inner,
        epsilon=model.config.rms_norm_eps,
        scale=attention.scaling,
        context=context,
        half_cache=half_cache,
        workers=workers,
        weights=formats.layers,
        narrow=_narrow(unit, formats.layers),
        activation=ACTIVATIONS[known.activation],
        head_norms=known.head_norms,
        head_weights=formats.head,
    )


def _narrow(unit: Instructions, form: str) -> bool:
    return unit.kernels[family(form)].narrow


def _arrays(old: nn.Module) -> dict[str, np.ndarray]:
    arrays = {}
    for ours, theirs in NAMES.items():
        part: Any = old.get_submodule(theirs)
        arrays[ours] = part.weight.detach().numpy()
        if getattr(part, "bias", None) is not None:
            arrays[f"{ours}.bias"] = part.bias.detach().numpy()
    norms = dict(old.named_parameters())
    return arrays | {
        ours: norms[f"{theirs}.weight"].detach().numpy()
        for ours, theirs in HEAD_NORMS.items()
        if f"{theirs}.weight" in norms
    }
