"""Puts our own kernels into a model of the library: whole decoder layers, and the final norm with the output matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from llmbuild.errors import ChoiceRefused
from llmbuild.frontend import operators
from llmbuild.frontend.cache import CallerCache, SharedCache
from llmbuild.frontend.formats import TABLES, Formats
from llmbuild.frontend.modules import Embedding, RowMajor, ScaledColumns
from llmbuild.kernels.applies import ACTIVATIONS, cpu_problem
from llmbuild.kernels.choose import instructions
from llmbuild.kernels.head import HeadShape, head, picked, scores
from llmbuild.kernels.instructions import Instructions
from llmbuild.kernels.layer import MAX_LAYERS, layers, paged
from llmbuild.kernels.layer_weights import offsets
from llmbuild.kernels.layouts import PANEL, TWO_BYTES, Layout, family
from llmbuild.kernels.look import look
from llmbuild.kernels.shapes import DecoderShape
from llmbuild.spec.decoder import Decoder
from llmbuild.spec.formats import INTEGERS
from llmbuild.transform.decoder import PARTS
from llmbuild.transform.stored import Rows

LAYERS, HEAD, LOOK = "llmbuild_layers", "llmbuild_head", "llmbuild_look"
SCORES, PICKED = scores(HEAD), picked(HEAD)
_ELEMENTS = {"i8": torch.int8, "f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
"""Types of stored elements, by their names in MLIR."""
NAMES = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
"""Our names of a layer's matrices, and the library's."""

KINDS = {kind: [NAMES[part] for part in parts] for kind, parts in PARTS.items()}
"""The library's names of the matrices of a layer that are one matrix of ours, and share a format."""

NORM_NAMES = {
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
    "query_norm": "self_attn.q_norm",
    "key_norm": "self_attn.k_norm",
}
"""Our names of a layer's norms, and the library's; those of heads are not in every model."""


class OwnLayers(nn.Module):
    """Decoder layers as one operator; they are called like one of the library's."""

    def __init__(self, shapes: Sequence[DecoderShape], first: int, kernel: str) -> None:
        super().__init__()
        self.shapes, self.first, self.count, self.kernel = shapes, first, len(shapes), kernel
        self.buffer: torch.Tensor
        self.register_buffer("buffer", torch.empty(offsets(shapes)[-1], dtype=torch.int8))

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
        x, shared = hidden_states[0], isinstance(cache, SharedCache)
        kernel = paged(self.kernel) if shared else self.kernel
        new: torch.Tensor = operators.layers(x, cosine[0], sine[0], cache.where, self.buffer, buffers, kernel)
        return new.unsqueeze(0)


class OwnHead(nn.Module):
    """The final norm and the output matrix as one operator, which finds the next token as well."""

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        self.shape = shape
        self.norm: torch.Tensor
        self.data: torch.Tensor
        self.scale: torch.Tensor
        layout, panels = shape.layout, shape.padded // PANEL
        self.register_buffer("norm", torch.empty(shape.width))
        self.register_buffer("data", torch.empty(panels * layout.panel_elements, dtype=_ELEMENTS[layout.element]))
        scales = torch.empty(panels * layout.scale_elements, dtype=_ELEMENTS[layout.scale_element])
        self.register_buffer("scale", scales)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits f32[V] and the next token i64[1] of hidden states f32[1,1,width]."""
        logits, token = operators.head(x[0], self.norm, self.data, self.scale, HEAD)
        return logits.narrow(0, 0, self.shape.vocabulary), token

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits f32[T,V] of hidden states f32[1,T,width]."""
        logits: torch.Tensor = operators.scores(x[0], self.norm, self.data, self.scale, SCORES)
        return logits.narrow(1, 0, self.shape.vocabulary)

    def picked(self, x: torch.Tensor, read: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits f32[R,padded vocabulary] and the next tokens i64[R] of the hidden states that `read` i64[R]
        names, of f32[1,T,width]. They are not cut to the vocabulary: that would copy them.
        """
        found: tuple[torch.Tensor, torch.Tensor] = operators.picked(
            x[0], read, self.norm, self.data, self.scale, PICKED
        )
        return found


class PanelEmbedding(nn.Module):
    """A token table that reads the output matrix as our kernels keep it; a program does so by `kernels.look`."""

    def __init__(self, head: OwnHead) -> None:
        super().__init__()
        self._head = (head,)  # no module of this one: its tensors have their names in the model by the head alone

    @property
    def head(self) -> OwnHead:
        """The output matrix."""
        return self._head[0]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return f32[1,T,width] of tokens i64[1,T]."""
        return operators.rows(self.head.data, self.head.scale, HEAD)[tokens]


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
    model: Any,
    context: int,
    cache: str,
    work_groups: int,
    formats: Formats,
    units: Units,
    wide: Sequence[str] = (),
) -> dict[str, str]:
    """Replace layers, head and embedding in place; return the MLIR of the kernels by name.

    `wide` are the matrices, of a layer's and `head`, for which activations have two bytes where weights are integers.
    """
    shape = replace(
        _shape(model, context, cache, work_groups, formats, units.layers),
        wide=tuple(wide) if formats.layers in INTEGERS else (),
    )
    head_shape = HeadShape(
        shape.hidden,
        model.config.vocab_size,
        shape.epsilon,
        work_groups,
        formats.head,
        _narrow(units.head, formats.head),
        "head" in wide and formats.head in INTEGERS,
        layer_weights=formats.layers,
    )
    operators.HEADS.update(dict.fromkeys((HEAD, SCORES, PICKED), head_shape))
    kernels = dict.fromkeys((HEAD, SCORES, PICKED), head(HEAD, head_shape, units.head))
    groups = _groups([replace(shape, formats=others(formats, n)) for n in range(len(model.model.layers))])
    for names in _alike(groups):
        kernels |= dict.fromkeys([*names, *map(paged, names)], layers(names, groups[names[0]], units.layers))
    first, made = 0, []
    for name, shapes in groups.items():
        operators.LAYERS[name] = operators.PAGED[paged(name)] = shapes
        made.append(OwnLayers(shapes, first, name))
        first += len(shapes)
    model.model.layers = nn.ModuleList(made)
    _put_in_tables(model, head_shape, formats)
    return kernels


def others(formats: Formats, layer: int) -> tuple[tuple[str, str], ...]:
    """Return the matrices of a layer, as our kernels have them, whose format is not that of the layers, and which."""
    found = {kind: formats.of(f"model.layers.{layer}.{names[0]}") for kind, names in KINDS.items()}
    return tuple((kind, form) for kind, form in found.items() if form != formats.layers)


def _groups(shapes: Sequence[DecoderShape]) -> dict[str, tuple[DecoderShape, ...]]:
    """Return the layers of each dispatch by its name, which says its place alone: it is the same in all formats. They
    are as few as bindings allow, of nearly one size.
    """
    count = -(-len(shapes) // MAX_LAYERS)
    ends = [len(shapes) * number // count for number in range(count + 1)]
    return {f"{LAYERS}_{n}": tuple(shapes[a:b]) for n, (a, b) in enumerate(pairwise(ends))}


def _alike(groups: Mapping[str, tuple[DecoderShape, ...]]) -> list[list[str]]:
    """Return the names of the groups whose layers are the same: one text does for them, and it is long."""
    found: dict[tuple[DecoderShape, ...], list[str]] = {}
    for name, shapes in groups.items():
        found.setdefault(shapes, []).append(name)
    return list(found.values())


def rounded_to_bytes(activations: str) -> frozenset[str]:
    """Return the matrices for which our kernels round activations to one byte, by the library's names in a layer."""
    wide = TWO_BYTES[activations]
    of_layer = [name for kind, names in KINDS.items() if kind not in wide for name in names]
    return frozenset([*of_layer, *([] if "head" in wide else [TABLES[1]])])


def _put_in_tables(model: Any, shape: HeadShape, formats: Formats) -> None:
    """Replace embedding, final norm and head."""
    decoder = model.model
    tied = decoder.embed_tokens.weight is model.lm_head.weight
    model.lm_head = OwnHead(shape)
    rows = Rows(((TABLES[0], shape.vocabulary),))
    decoder.embed_tokens = (
        PanelEmbedding(model.lm_head) if tied else Embedding(RowMajor(rows, shape.width, formats.head))
    )
    decoder.norm = nn.Identity()


def look_kernel(model: Any) -> dict[str, str]:
    """Return the MLIR of the look-up by its name, where the token table of a model is its output matrix."""
    table = model.model.embed_tokens
    inner = table.table if isinstance(table, ScaledColumns) else table
    if not isinstance(inner, PanelEmbedding):
        return {}
    return {LOOK: look(LOOK, inner.head.shape, scaled=table is not inner)}


def rounding(model: Any) -> Callable[[int, str], Layout | None]:
    """Return by which layout our kernels in a model round what a matrix reads: one of a decoder layer, by the layer's
    number and its name in it, or the head, by its name alone. None where that is not rounded.
    """
    if not isinstance(model.lm_head, OwnHead):
        return lambda *_: None
    layers = [shape.layouts() for group in model.model.layers for shape in group.shapes]
    kinds = {name: kind for kind, names in KINDS.items() for name in names}

    def found(layer: int, name: str) -> Layout | None:
        layout = layers[layer].get(kinds.get(name, "")) if name != TABLES[1] else model.lm_head.shape.layout
        return layout if layout and (layout.block or layout.narrow) else None

    return found


def _shape(model: Any, context: int, cache: str, workers: int, formats: Formats, unit: Instructions) -> DecoderShape:
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
        cache=cache,
        workers=workers,
        weights=formats.layers,
        narrow=_narrow(unit, formats.layers),
        activation=ACTIVATIONS[known.activation],
        head_norms=known.head_norms,
        head_weights=formats.head,
    )


def _narrow(unit: Instructions, form: str) -> bool:
    return unit.kernels[family(form)].narrow
