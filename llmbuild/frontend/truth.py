"""What the library's own untouched model says on a few tokens, and whether the model as we run it says the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from llmbuild.errors import InputError
from llmbuild.frontend import attention
from llmbuild.frontend.cache import head_size, layer_buffers
from llmbuild.frontend.checkpoint import Model
from llmbuild.frontend.huggingface import LIBRARY_ATTENTION
from llmbuild.frontend.layerwise import Cached, Layers, embedded, own_vectors, through_head
from llmbuild.kernels.kept import keys_and_values
from llmbuild.spec.program import Abi

CHECK_PROMPT, CHECK_FORCED = 16, 8

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

    def texts(self, forced: int | None = None) -> Texts:
        """Return the texts whose logits are compared, with this many of the forced tokens, or all of them."""
        lines: list[np.ndarray] = []
        picked: list[list[tuple[int, int]]] = []
        for prompt, then, start in zip(self.prompt, self.forced[:, :forced], self.start, strict=True):
            own = len(lines)
            lines.append(np.concatenate([prompt[:start], then]))
            first = (own, len(prompt) - 1)
            if start != len(prompt):
                lines.append(prompt)
                first = (own + 1, len(prompt) - 1)
            picked.append([first, *((own, int(start) + step) for step in range(len(then)))])
        return Texts(tuple(lines), tuple(zip(*picked, strict=True)))


@dataclass(frozen=True)
class Texts:
    """Texts i64[T], each read from position 0 on; `picked[r][b]` is the text and position of row r of sequence b."""

    lines: tuple[np.ndarray, ...]
    picked: tuple[tuple[tuple[int, int], ...], ...]

    def rows(self, states: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return states f32[R,B,hidden] of the picked positions."""
        return torch.stack([torch.stack([states[text][0, at] for text, at in row]) for row in self.picked])


def check_tokens(abi: Abi, seed: int) -> CheckTokens:
    """Return tokens drawn from the vocabulary: a model without a tokenizer is tried as well."""
    drawn, length = np.random.default_rng(seed), min(CHECK_PROMPT, abi.context // 2)
    prompt = drawn.integers(0, abi.vocabulary, (abi.batch, length))
    forced = drawn.integers(0, abi.vocabulary, (abi.batch, min(CHECK_FORCED, abi.context - length)))
    return CheckTokens(prompt, forced, length - np.arange(abi.batch) % length)


def cached(config: Any, kind: str, own: bool = False) -> Cached:
    """Return our attention over a cache of a kind, for one layer of a program; `own` is that of our kernels for
    CPUs.
    """
    sizes = {"kv_heads": config.num_key_value_heads, "head_dim": head_size(config)}
    if own and keys_and_values(kind, sizes["head_dim"])[0].is_integer:
        return Cached(partial(layer_buffers, "f32", **sizes), kind)
    return Cached(partial(layer_buffers, kind, **sizes))


def truth(config: Any, model: Model, abi: Abi, tokens: CheckTokens) -> np.ndarray:
    """Return logits f32[1+D,B,V] of the library's model, without a cache: after the prompts, then after each token.

    Raises:
        InputError: our attention and cache say something else, so that every program of this model would.
    """
    attention.register()
    theirs, ours = Layers(config, LIBRARY_ATTENTION), Layers(config, attention.NAME, cached(config, "f32"))
    texts = tokens.texts()
    with torch.inference_mode():
        states = [embedded(own_vectors(model), line[None]) for line in texts.lines]
        moved = list(states)
        for index in range(config.num_hidden_layers):
            theirs.layer(index, model.whole)
            ours.module.load_state_dict(theirs.module.state_dict(), assign=True)
            states = [theirs.run(state) for state in states]
            moved = [ours.run(state) for state in moved]
        norm = model.whole("model.norm.weight")
        rows = torch.stack([theirs.normalized(texts.rows(found), norm) for found in (states, moved)])
        found = np.empty((*rows.shape[:-1], abi.vocabulary), np.float32)
        through_head(model, rows, found)
    _compare(model.name, found[1], found[0])
    return np.ascontiguousarray(found[0])


def _compare(name: str, ours: np.ndarray, theirs: np.ndarray) -> None:
    if not np.isfinite(theirs).all():
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
