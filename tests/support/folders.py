"""Model folders written without any library: a configuration, weights of its shape, and files beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from llmbuild.frontend.tensors import EMBEDDING, HEAD, places
from llmbuild.spec.model import facts_of

SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}
CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def shape(kind: str = "llama", **changes: Any) -> dict[str, Any]:
    """Return a small configuration; a change to `...` leaves the key out."""
    window = {"sliding_window": None} if kind == "mistral" else {}
    said = {**SHAPE, "model_type": kind, "architectures": [CLASSES[kind]], **window, **changes}
    return {key: value for key, value in said.items() if value is not ...}


def tensors(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Return weights for a configuration, without the head of a tied one."""
    drawn = np.random.default_rng(seed)
    wanted = places(facts_of(config), config["num_hidden_layers"])
    if config.get("tie_word_embeddings"):
        wanted.pop(HEAD)
    found = {name: drawn.normal(0, 0.2, size).astype(np.float32) for name, size in wanted.items()}
    return {name: value + 1 if "norm" in name else value for name, value in found.items()}


def write(folder: Path, kind: str = "llama", seed: int = 0, **changes: Any) -> Path:
    """Write a model folder and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = shape(kind, **changes)
    configure(folder, config)
    save_file(tensors(config, seed), folder / "model.safetensors", {"format": "pt"})
    return folder


def configure(folder: Path, config: dict[str, Any], **layout: Any) -> None:
    """Write a configuration, laid out as `json.dumps` is asked to."""
    (folder / "config.json").write_text(json.dumps(config, **layout))


def shard(folder: Path, *names: str) -> None:
    """Spread the weights of a folder over files of these names, by an index."""
    from safetensors.numpy import load_file

    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {name: names[number % len(names)] for number, name in enumerate(sorted(weights))}
    for file in names:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        save_file({n: weights[n] for n in where if where[n] == file}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


__all__ = ["EMBEDDING", "HEAD", "configure", "shape", "shard", "tensors", "write"]
