"""Write a model as a GGUF file that llama.cpp opens, tensor by tensor, without a tokenizer or with another file's.

Lives in the peers' environment, which has no llmbuild. Norms and biases are f32.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from math import pi
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comparison.checkpoint import EMBEDDING, FINAL_NORM, HEAD, Config, Shape, head_dim, shapes

Values = Callable[[str, Shape], Iterator[NDArray[np.float32]]]
"""The values f32 of a tensor by its name in the transformers library, in pieces of whole rows."""

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
ROTATES_PAIRS = ("llama",)
"""Architectures in which llama.cpp rotates neighbours, where the transformers library rotates two halves."""

ROPE_FACTORS = "rope_freqs.weight"
STORED = {"f16": "F16", "q8_0": "Q8_0", "q4_0": "Q4_0", "q4_1": "Q4_1"}
_WHOLE = {EMBEDDING: "token_embd.weight", FINAL_NORM: "output_norm.weight", HEAD: "output.weight"}
_PARTS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(?:self_attn\.|mlp\.)?(\w+)\.(weight|bias)")


def write(
    config: Config,
    values: Values,
    path: Path,
    kind: str,
    alike: bool = False,
    kinds: Mapping[str, str] = MappingProxyType({}),
    tokenizer: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write a model with matrices in `kind`, one of `STORED`, and those that are named in the format of `kinds`.

    Where layers are `alike`, all of them get the values of the first, which are encoded once: speed does not depend on
    values, and a large shape is written in seconds. `tokenizer` has the keys of a tokenizer, as GGUF's reader has them.

    Raises:
        ValueError: not a plain Llama, Mistral, Qwen2 or Qwen3.
    """
    import gguf

    def form_of(name: str) -> Any:
        return gguf.GGMLQuantizationType[STORED[kinds.get(name, kind)]]

    partial = path.with_suffix(".partial")
    out = gguf.GGUFWriter(str(partial), ARCHITECTURES[config["model_type"]])
    describe(out, config)
    _add_tokenizer(out, tokenizer)
    factors = rope_factors(config)
    if factors is not None:
        out.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
    for name, shape in shapes(config).items():
        if len(shape) == 1:
            out.add_tensor_info(tensor_name(name), shape, np.dtype(np.float32), 4 * shape[0])
        else:
            form = form_of(name)
            stored = gguf.quant_shape_to_byte_shape(shape, form)
            out.add_tensor_info(tensor_name(name), stored, np.dtype(np.uint8), stored[0] * stored[1], raw_dtype=form)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_ti_data_to_file()
    if factors is not None:
        out.write_tensor_data(factors)
    first: dict[str, NDArray[Any]] = {}
    for name, shape in shapes(config).items():
        key = re.sub(r"^model\.layers\.\d+\.", "model.layers.0.", name) if alike else name
        found = first.get(key)
        if found is None:
            found = _encoded(config, values, key, shape, form_of(name))
        if alike and key.startswith("model.layers."):
            first[key] = found
        out.write_tensor_data(found)
    out.close()
    partial.rename(path)


def _encoded(config: Config, values: Values, name: str, shape: Shape, form: Any) -> NDArray[Any]:
    pieces = values(name, shape)
    if len(shape) == 1 or (heads := _rotated_heads(config, name)):
        whole = np.concatenate(list(pieces))
        return whole if len(shape) == 1 else _bytes(pair_rotations(whole, heads), form)
    return np.concatenate([_bytes(piece, form) for piece in pieces])


def _rotated_heads(config: Config, name: str) -> int:
    """Return into how many heads the rows of a matrix that is rotated in pairs fall; 0 for any other."""
    if ARCHITECTURES[config["model_type"]] not in ROTATES_PAIRS:
        return 0
    part = name.split(".")[-2]
    return int({"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}.get(part, 0))


def _bytes(rows: NDArray[np.float32], form: Any) -> NDArray[np.uint8]:
    import gguf

    if form == gguf.GGMLQuantizationType.F16:
        return rows.astype(np.float16).view(np.uint8)
    found: NDArray[np.uint8] = gguf.quants.quantize(np.ascontiguousarray(rows), form)
    return found


def pair_rotations(values: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Return rows with the halves of each head taking turns."""
    rows, columns = values.shape
    return values.reshape(heads, 2, rows // heads // 2, columns).transpose(0, 2, 1, 3).reshape(rows, columns)


def tensor_name(name: str) -> str:
    """Return GGUF's name of a tensor of the transformers library."""
    found = _LAYER.fullmatch(name)
    return f"blk.{found[1]}.{_PARTS[found[2]]}.{found[3]}" if found else _WHOLE[name]


def stored(weights: Path) -> Values:
    """Return the values of a safetensors file."""
    from safetensors import safe_open

    file = safe_open(weights, framework="pt")

    def values(name: str, _: Shape) -> Iterator[NDArray[np.float32]]:
        yield file.get_tensor(name).float().numpy()

    return values


def rope_factors(config: Config) -> NDArray[np.float32] | None:
    """Return by what each rotation frequency is divided, f32 of half a head, where Llama 3 scales them.

    Raises:
        ValueError: another kind of scaling.
    """
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"rope_scaling of type {kind} is not written, llama3 is")
    half = head_dim(config) // 2
    lengths = 2 * pi * config["rope_theta"] ** (np.arange(half, dtype=np.float64) / half)
    turns = scaling["original_max_position_embeddings"] / lengths
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 / (kept + (1 - kept) / scaling["factor"])).astype(np.float32)


def describe(out: Any, config: Config) -> None:
    """Write the sizes of a model into GGUF's keys."""
    head = head_dim(config)
    out.add_context_length(config["max_position_embeddings"])
    out.add_embedding_length(config["hidden_size"])
    out.add_block_count(config["num_hidden_layers"])
    out.add_feed_forward_length(config["intermediate_size"])
    out.add_head_count(config["num_attention_heads"])
    out.add_head_count_kv(config["num_key_value_heads"])
    out.add_key_length(head)
    out.add_value_length(head)
    out.add_rope_dimension_count(head)
    out.add_rope_freq_base(config["rope_theta"])
    out.add_layer_norm_rms_eps(config["rms_norm_eps"])
    out.add_vocab_size(config["vocab_size"])


def _add_tokenizer(out: Any, keys: Mapping[str, Any]) -> None:
    """Write the keys of a tokenizer, or that there is none."""
    if not keys:
        out.add_tokenizer_model("no_vocab")
    for name, field in keys.items():
        sub = field.types[-1] if len(field.types) > 1 else None
        out.add_key_value(name, field.contents(), field.types[0], sub_type=sub)
