"""The tensors that a model's class has places for, and whether what is stored fills them: all, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from llmbuild.frontend.documents import shown
from llmbuild.frontend.headers import Stored
from llmbuild.spec.model import ModelFacts

NUMBERS = ("F64", "F32", "F16", "BF16")
"""Element types that mean the numbers they hold; what 8 bits and integers mean, a scale beside them decides."""

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_PREFIX = "model."
_SILENT = re.compile(r"rotary_emb\.inv_freq$")
"""What older versions of the library stored and newer ones compute."""

_TOLD = 5
"""How many tensors are named for each fault."""


def places(facts: ModelFacts, layers: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that the first `layers` layers of a model have, by name."""
    sizes = facts.decoder
    hidden = sizes.hidden
    matrices = {
        "self_attn.q_proj": ((sizes.attended, hidden), facts.projection_biases),
        "self_attn.k_proj": ((sizes.cached, hidden), facts.projection_biases),
        "self_attn.v_proj": ((sizes.cached, hidden), facts.projection_biases),
        "self_attn.o_proj": ((hidden, sizes.attended), facts.output_bias),
        "mlp.gate_proj": ((sizes.inner, hidden), facts.mlp_biases),
        "mlp.up_proj": ((sizes.inner, hidden), facts.mlp_biases),
        "mlp.down_proj": ((hidden, sizes.inner), facts.mlp_biases),
    }
    norms = ("input_layernorm", "post_attention_layernorm")
    layer: dict[str, tuple[int, ...]] = {f"{norm}.weight": (hidden,) for norm in norms}
    for name, (shape, bias) in matrices.items():
        layer[f"{name}.weight"] = shape
        if bias:
            layer[f"{name}.bias"] = shape[:1]
    if sizes.head_norms:
        layer |= {f"self_attn.{norm}.weight": (sizes.head_dim,) for norm in ("q_norm", "k_norm")}
    found: dict[str, tuple[int, ...]] = {EMBEDDING: (sizes.vocabulary, hidden), "model.norm.weight": (hidden,)}
    for number in range(min(layers, facts.layers)):
        found |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    return found | {HEAD: (sizes.vocabulary, hidden)}


def misplaced(stored: Sequence[tuple[str, Stored]], facts: ModelFacts) -> list[str]:
    """Return what does not fit between stored tensors and the places of a model, by tensor."""
    wanted = places(facts, len(stored) + 1)  # a configuration may say more layers than fit into any memory
    filled: dict[str, Stored] = {}
    extra, twice, types, shapes = [], [], [], []
    for name, tensor in stored:
        place = place_of(name, wanted)
        if place is None:
            if not _SILENT.search(name):
                extra.append(f"{_named(name)} ({tensor.dtype} {_shape(tensor.shape)})")
            continue
        if place in filled:
            twice.append(f"{_named(name)} (in {tensor.file} and {filled[place].file})")
        filled[place] = tensor
        if tensor.dtype not in NUMBERS:
            types.append(f"{_named(name)} is {tensor.dtype}")
        if tensor.shape != wanted[place]:
            shapes.append(f"{_named(name)} is {_shape(tensor.shape)}, config.json makes it {_shape(wanted[place])}")
    tied = facts.tied and (EMBEDDING in filled or HEAD in filled)
    missing = [name for name in wanted if name not in filled and not (tied and name in (EMBEDDING, HEAD))]
    faults = (
        ("tensors that this model has no place for", extra),
        ("missing tensors", missing),
        ("tensors that are stored twice", twice),
        (f"types that are no plain numbers ({', '.join(NUMBERS)} are)", types),
        ("shapes that differ", shapes),
    )
    return [f"weights do not fit config.json: {what}: {_list(names)}" for what, names in faults if names]


def place_of(name: str, wanted: Mapping[str, Any]) -> str | None:
    """Return the place of a stored tensor; the library adds or takes away the name of the inner model."""
    for candidate in (name, _PREFIX + name, name.removeprefix(_PREFIX)):
        if candidate in wanted:
            return candidate
    return None


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _TOLD} more" if len(names) > _TOLD else ""
    return ", ".join(names[:_TOLD]) + more


def _named(name: str) -> str:
    return shown(name)[1:-1] if len(name) < 100 else shown(name)


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a single number"
