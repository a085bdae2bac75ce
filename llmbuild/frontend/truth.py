"""What the library's own untouched model says on a few tokens, and whether the model as we run it says the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llmbuild.errors import InputError
from llmbuild.frontend.cache import layer_buffers, new_cache
from llmbuild.frontend.entry import Decode, Prefill
from llmbuild.spec.program import Abi

CHECK_PROMPT, CHECK_FORCED = 16, 8
FIRST = 2
"""Forced tokens that an import is held against the library on, before any choice is applied."""

DIFFERS = 1e-3
"""How far logits in f32 may be from the library's, root mean square over their own: only sums are ordered otherwise."""


@dataclass(frozen=True)
class CheckTokens:
    """Tokens that a program is tried on: prompts i64[B,P], and i64[B,D] put in from the positions `start` i64[B] on.

    The forced tokens of the sequences of a batch begin at positions of their own, within what was the prompt.
    """

    prompt: np.ndarray
    forced: np.ndarray
    start: np.ndarray


def check_tokens(abi: Abi, seed: int) -> CheckTokens:
    """Return tokens drawn from the vocabulary: a model without a tokenizer is tried as well."""
    drawn, length = np.random.default_rng(seed), min(CHECK_PROMPT, abi.context // 2)
    prompt = drawn.integers(0, abi.vocabulary, (abi.batch, length))
    forced = drawn.integers(0, abi.vocabulary, (abi.batch, min(CHECK_FORCED, abi.context - length)))
    return CheckTokens(prompt, forced, length - np.arange(abi.batch) % length)


def library_says(model: Any, tokens: CheckTokens) -> np.ndarray:
    """Return logits f32[1+D,B,V] of the library's model, without a cache: after the prompts, then after each token."""
    rows = []
    with torch.inference_mode():
        for prompt, forced, start in zip(tokens.prompt, tokens.forced, tokens.start, strict=True):
            first, then = (_whole(model, line) for line in (prompt, np.concatenate([prompt[:start], forced])))
            rows.append(torch.cat([first[-1:], then[start:]]))
    found: np.ndarray = torch.stack(rows, 1).numpy()
    return found


def _whole(model: Any, tokens: np.ndarray) -> torch.Tensor:
    logits: torch.Tensor = model(torch.from_numpy(tokens[None]), use_cache=False).logits[0].float()
    return logits


def check_import(model: Any, name: str, abi: Abi, tokens: CheckTokens, truth: np.ndarray) -> None:
    """Hold the model, still with its own weights but with our attention and cache, against what the library said.

    Raises:
        InputError: the logits differ, so that every program of this model would compute something else.
    """
    config = model.config
    buffers = layer_buffers("f32", abi.batch * abi.context, *abi.kv[0].shape[1:]) * config.num_hidden_layers
    with torch.inference_mode():
        ours = run_eagerly(model, abi, tokens, FIRST, new_cache(buffers))
    theirs = truth[: len(ours)]
    if not np.isfinite(truth).all():
        raise InputError(f"{name}: the library's own model answers with numbers that are NaN or infinite")
    off = distance(ours, theirs)
    if not off < DIFFERS:
        raise InputError(
            f"{name}: this model is not taken: its import computes other logits than the library's own model, "
            f"by {off:.2g} of their size where {DIFFERS:g} are allowed"
        )


def distance(found: np.ndarray, wanted: np.ndarray) -> float:
    """Return the root mean square of a difference over that of what is wanted."""
    off, size = (np.sqrt(np.square(x, dtype=np.float64).mean()) for x in (found - wanted, wanted))
    return float(off / max(size, np.finfo(np.float32).tiny))


def run_eagerly(
    model: Any, abi: Abi, tokens: CheckTokens, count: int, cache: Sequence[torch.Tensor] | None = None
) -> np.ndarray:
    """Return logits f32[1+count,B,V]: of the prompts' last tokens, then of the first forced tokens."""
    kv = new_cache(abi.kv) if cache is None else list(cache)
    prefill, decode = Prefill(model, abi.context), Decode(model, abi.context)
    rows = [prefill(torch.from_numpy(tokens.prompt), torch.zeros(abi.batch, dtype=torch.int64), kv)[1]]
    for offset, forced in enumerate(tokens.forced.T[:count].copy()):
        rows.append(decode(torch.from_numpy(forced), torch.from_numpy(tokens.start + offset), kv)[1])
    found: np.ndarray = torch.stack(rows).view(len(rows), abi.batch, -1).numpy()
    return found
