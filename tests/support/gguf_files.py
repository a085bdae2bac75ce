"""GGUF files written by the gguf package, as llama.cpp's converter lays a model out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from llmbuild.errors import InputError
from llmbuild.frontend.source import FoundModel, find_model
from llmbuild.spec.recipe import ModelSource
from tests.support import folders

Kind = gguf.GGMLQuantizationType

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""llama.cpp's names of the library's."""

SHAPE: dict[str, Any] = {"num_hidden_layers": 1, "intermediate_size": 64}
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
"""Wide enough for blocks of 256."""


def configuration(kind: str = "llama", **changes: Any) -> dict[str, Any]:
    """Return the configuration of the model that `write` writes."""
    return folders.shape(kind, **{**SHAPE, **changes})


def named(name: str) -> str:
    """Return llama.cpp's name of a tensor."""
    stem, _, last = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{NAMES[part]}.{last}"
    return f"{NAMES[stem]}.{last}"


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Return rows [N,...] as llama.cpp's converter stores those of Llama's queries and keys."""
    parts = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return parts.swapaxes(1, 2).reshape(rows.shape)


def stored(values: np.ndarray, kind: str) -> np.ndarray:
    """Return values as a file keeps them; types that the package cannot round to get bytes drawn at random."""
    if kind in ("F32", "F16"):
        return values.astype(np.float32 if kind == "F32" else np.float16)
    try:
        return gguf.quants.quantize(values, Kind[kind])
    except NotImplementedError:
        size = gguf.quants.quant_shape_to_byte_shape(values.shape, Kind[kind])
        return np.random.default_rng(0).integers(0, 256, size, np.uint8)


def metadata(config: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """Return the metadata of a configuration."""
    heads = config["num_attention_heads"]
    head_dim = config["head_dim"]
    below = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": 10000.0,
        "vocab_size": config["vocab_size"],
    }
    if architecture == "llama":
        below["rope.dimension_count"] = head_dim
    return {
        "general.type": "model",
        "general.name": "tiny",
        **{f"{architecture}.{key}": value for key, value in below.items()},
        "tokenizer.ggml.eos_token_id": config["eos_token_id"],
    }


def write(
    path: Path,
    kind: str = "llama",
    stored_as: str = "F32",
    keys: Mapping[str, Any] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
    **changes: Any,
) -> Path:
    """Write a tiny model and return the path; `keys` change metadata, `...` leaves a key out."""
    config = configuration(kind, **changes)
    tensors = {}
    for name, value in folders.tensors(config).items():
        if kind == "llama" and (".q_proj." in name or ".k_proj." in name):
            heads = "num_attention_heads" if ".q_proj." in name else "num_key_value_heads"
            value = interleave(value, config[heads])
        tensors[named(name)] = (value, stored_as if value.ndim > 1 else "F32")
    tensors |= {name: (value, "F32") for name, value in (extra or {}).items()}
    return write_file(path, kind, {**metadata(config, kind), **(keys or {})}, tensors)


def write_file(
    path: Path, architecture: str, keys: Mapping[str, Any], tensors: Mapping[str, tuple[np.ndarray, str]], **how: Any
) -> Path:
    """Write a file of these keys and tensors, each with its type."""
    writer = gguf.GGUFWriter(path, architecture, **how)
    for key, value in keys.items():
        _add(writer, key, value)
    for name, (value, kind) in tensors.items():
        writer.add_tensor(name, stored(value, kind), raw_dtype=Kind[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: Any, key: str, value: Any) -> None:
    if value is ...:
        return
    adders: Sequence[tuple[type, str]] = (
        (bool, "add_bool"),
        (int, "add_uint32"),
        (float, "add_float32"),
        (str, "add_string"),
        (list, "add_array"),
    )
    getattr(writer, next(name for kind, name in adders if isinstance(value, kind)))(key, value)


def found(path: Path | str, random_init: bool = False, context: int = 64, seed: int = 0) -> FoundModel:
    """Return the model of a file as a recipe names it."""
    return find_model(ModelSource("gguf", str(path), random_init, seed), context)


def refused(path: Path | str, **how: Any) -> str:
    """Return why a file is refused."""
    with pytest.raises(InputError) as caught:
        found(path, **how)
    return str(caught.value)
