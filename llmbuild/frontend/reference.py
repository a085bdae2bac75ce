"""What the library's own model says, in f32 and untouched by any of our choices: the truth that quality is
measured against.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from llmbuild.errors import InputError
from llmbuild.frontend import huggingface

LIBRARY_ATTENTION = "eager"


def _model(model: str, random_init: bool, seed: int, tokens: np.ndarray, length: int) -> Any:
    built = huggingface.load(model, random_init, seed, LIBRARY_ATTENTION, length)
    vocabulary = built.config.vocab_size
    if tokens.size == 0 or tokens.min() < 0 or tokens.max() >= vocabulary:
        raise InputError(f"{model}: tokens must be at least one, each from 0 to {vocabulary - 1}")
    return built


def reference_logits(model: str, random_init: bool, seed: int, windows: np.ndarray) -> np.ndarray:
    """Return logits f32[W,L,V] of windows i64[W,L], each read from its own first position."""
    built = _model(model, random_init, seed, windows, windows.shape[-1])
    with torch.inference_mode():
        rows = [built(torch.from_numpy(window[None]), use_cache=False).logits[0] for window in windows]
    return torch.stack(rows).float().numpy()


def reference_greedy(model: str, random_init: bool, seed: int, prompt: np.ndarray, count: int) -> np.ndarray:
    """Return the `count` tokens i64[count] that the library's `generate` puts after the prompt i64[P], end tokens
    ignored.
    """
    built = _model(model, random_init, seed, prompt, prompt.size + count)
    tokens = torch.from_numpy(prompt[None])
    with torch.inference_mode():
        text = built.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=count,
            min_new_tokens=count,
            eos_token_id=None,
            pad_token_id=0,
        )
    new: np.ndarray = text[0, len(prompt) :].numpy()
    return new
