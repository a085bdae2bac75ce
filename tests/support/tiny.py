"""Tiny Hugging Face models with random weights, written as folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
}


def write(folder: Path, seed: int = 0, kind: str = "Llama", **changes: Any) -> Path:
    """Write a model of `SHAPE` with `changes` into `folder` and return it; `kind` as the library names it."""
    import torch
    import transformers

    library: Any = transformers
    torch.manual_seed(seed)
    config = getattr(library, f"{kind}Config")(**{**SHAPE, **changes})
    getattr(library, f"{kind}ForCausalLM")(config).save_pretrained(folder)
    return folder
