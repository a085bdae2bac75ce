"""The weights of a shape: names and sizes by its configuration, random values, and a Hugging Face folder of them.

Tensor by tensor, in pieces, so that a folder larger than the memory can be written. Needs numpy alone: the peers'
environment has no llmbuild.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Config = Mapping[str, Any]
Shape = tuple[int, ...]
WEIGHTS = "model.safetensors"
EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
KINDS = ("llama", "mistral", "qwen2", "qwen3")
SPREAD = 0.02
"""Standard deviation of matrices and biases; norms are all ones."""

AT_ONCE = 1 << 22
"""Weights that are drawn at once."""

_BYTES = {"BF16": 2, "F32": 4}


def head_dim(config: Config) -> int:
    """Return the size of an attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def shapes(config: Config) -> dict[str, Shape]:
    """Return the shape of every tensor by its name in the transformers library; one that is tied is not there twice.

    Raises:
        ValueError: not a plain Llama, Mistral, Qwen2 or Qwen3.
    """
    kind, biases = config["model_type"], [name for name in ("attention_bias", "mlp_bias") if config.get(name)]
    if kind not in KINDS or biases:
        told = f"{kind} with {' and '.join(biases)}" if biases else str(kind)
        raise ValueError(f"weights are written for plain models of {', '.join(KINDS)}, this is {told}")
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    attended = config["num_attention_heads"] * head_dim(config)
    cached = config["num_key_value_heads"] * head_dim(config)
    rows = {"q_proj": attended, "k_proj": cached, "v_proj": cached}
    layer: dict[str, Shape] = {"input_layernorm.weight": (hidden,)}
    layer |= {f"self_attn.{name}.weight": (count, hidden) for name, count in rows.items()}
    layer |= {f"self_attn.{name}.bias": (count,) for name, count in rows.items()} if kind == "qwen2" else {}
    norms = {f"self_attn.{name}.weight": (head_dim(config),) for name in ("q_norm", "k_norm")}
    layer |= norms if kind == "qwen3" else {}
    layer |= {"self_attn.o_proj.weight": (hidden, attended), "post_attention_layernorm.weight": (hidden,)}
    layer |= {f"mlp.{name}.weight": (inner, hidden) for name in ("gate_proj", "up_proj")}
    layer |= {"mlp.down_proj.weight": (hidden, inner)}
    found: dict[str, Shape] = {EMBEDDING: (vocabulary, hidden)}
    for number in range(config["num_hidden_layers"]):
        found |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    found[FINAL_NORM] = (hidden,)
    return found if config.get("tie_word_embeddings") else found | {HEAD: (vocabulary, hidden)}


def drawn(name: str, shape: Shape, seed: int) -> Iterator[NDArray[np.float32]]:
    """Yield the random values f32 of a tensor in pieces of whole rows: the same for the same name and seed."""
    if name.endswith("norm.weight"):
        yield np.ones(shape, np.float32)
        return
    stream = np.random.default_rng([seed, *hashlib.sha256(name.encode()).digest()[:8]])
    rows, columns = shape[0], prod(shape[1:])
    step = max(1, AT_ONCE // columns)
    for begin in range(0, rows, step):
        taken = (min(step, rows - begin), *shape[1:])
        yield stream.standard_normal(taken, np.float32) * np.float32(SPREAD)


def to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return the bits of f32 rounded to bf16, to nearest, ties to even."""
    bits = values.view(np.uint32)
    rounded: NDArray[np.uint16] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return rounded


def write(config: Config, folder: Path, seed: int, kind: str = "BF16") -> Path:
    """Write `config.json` and random weights in `kind`, BF16 as checkpoints have or F32, and return the folder.

    Weights that are there already are left as they are; a file appears whole or not at all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=1))
    if (folder / WEIGHTS).is_file():
        return folder
    header, end = {}, 0
    for name, shape in shapes(config).items():
        begin, end = end, end + prod(shape) * _BYTES[kind]
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    partial = folder / f"{WEIGHTS}.partial"
    with partial.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes(config).items():
            for piece in drawn(name, shape, seed):
                (to_bf16(piece) if kind == "BF16" else piece).tofile(out)
    partial.rename(folder / WEIGHTS)
    return folder
