"""What the library's own model says, in f32 and untouched by any of our choices: the truth that quality is
measured against.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from llmbuild.errors import InputError
from llmbuild.frontend import huggingface
from llmbuild.frontend.huggingface import LIBRARY_ATTENTION
from llmbuild.frontend.layerwise import Layers, embedded, own_vectors, through_head


def _check_tokens(model: str, vocabulary: int, tokens: np.ndarray) -> None:
    if tokens.size == 0 or tokens.min() < 0 or tokens.max() >= vocabulary:
        raise InputError(f"{model}: tokens must be at least one, each from 0 to {vocabulary - 1}")


def reference_logits(model: str, random_init: bool, seed: int, windows: np.ndarray, out: Path) -> None:
    """Write logits f32[W,L,V] of windows i64[W,L], each read from its own first position, to an `.npy`.

    The library's layers are run one after another: memory is that of one layer, whatever the model's size.

    Raises:
        InputError: the model cannot be taken, or tokens that are not of it.
    """
    found = huggingface.source_of(model, random_init, seed, windows.shape[-1])
    config, weights = found.skeleton(LIBRARY_ATTENTION).model.config, found.weights
    _check_tokens(model, config.vocab_size, windows)
    layers = Layers(config, LIBRARY_ATTENTION)
    with torch.inference_mode():
        states = embedded(own_vectors(weights), windows)
        for index in range(config.num_hidden_layers):
            layers.layer(index, weights.whole)
            states = layers.run(states)
        states = layers.normalized(states, weights.whole("model.norm.weight"))
        shape = (*windows.shape, config.vocab_size)
        logits = np.lib.format.open_memmap(out, "w+", np.float32, shape)
        through_head(weights, states, logits)
        logits.flush()


def reference_greedy(model: str, random_init: bool, seed: int, prompt: np.ndarray, count: int) -> np.ndarray:
    """Return the `count` tokens i64[count] that the library's `generate` puts after the prompt i64[P], end tokens
    ignored.
    """
    built = huggingface.load(model, random_init, seed, LIBRARY_ATTENTION, prompt.size + count)
    _check_tokens(model, built.config.vocab_size, prompt)
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
