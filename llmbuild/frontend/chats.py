"""Chats that a model itself writes, to be calibrated on: it answers prompts with tokens drawn as it expects them.

What a model says is nearer to what it will say than any given text (data-free calibration: LLM-QAT, arXiv:2305.17888).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from llmbuild.errors import InputError
from llmbuild.frontend import huggingface
from llmbuild.frontend.cache import cache_name
from llmbuild.frontend.huggingface import LIBRARY_ATTENTION

TOGETHER = 32
"""Windows that are written at once, one position after another."""


def written(model: str, prompts: Sequence[Sequence[int]], windows: int, length: int) -> np.ndarray:
    """Return texts i64[windows,length] in which a model answers prompts, each of tokens; the model is loaded whole.

    Window w begins with prompt w. Where the model ends its answer, prompt w + windows is next, and so on around.
    Each window has numbers of its own for what is drawn, so that it does not depend on the others.

    Raises:
        InputError: the model cannot be taken, or a prompt is not of its tokens.
    """
    built = huggingface.load(model, False, 0, LIBRARY_ATTENTION, length)
    if not prompts or not all(prompts) or not all(0 <= t < built.config.vocab_size for p in prompts for t in p):
        raise InputError(f"{model}: prompts must be tokens from 0 to {built.config.vocab_size - 1}")
    ends = frozenset(huggingface.eos_tokens(built))
    texts = [_Text(w, windows, prompts, ends) for w in range(windows)]
    with torch.inference_mode():
        for begin in range(0, windows, TOGETHER):
            _write(built, texts[begin : begin + TOGETHER], length)
    return np.array([text.tokens for text in texts], np.int64)


class _Text:
    """A window as it is written: tokens so far, and those of a prompt that come before the model is asked again."""

    def __init__(self, first: int, step: int, prompts: Sequence[Sequence[int]], ends: frozenset[int]) -> None:
        self.tokens: list[int] = []
        self._drawn, self._ends = np.random.default_rng(first), ends
        self._prompts = self._order(first, step, prompts)
        self._asked = list(next(self._prompts))

    @staticmethod
    def _order(first: int, step: int, prompts: Sequence[Sequence[int]]) -> Iterator[Sequence[int]]:
        while True:
            yield prompts[first % len(prompts)]
            first += step

    def add(self, logits: np.ndarray | None) -> None:
        """Add the next token of the prompt, or one that is drawn by logits f32[V]."""
        if self._asked:
            self.tokens.append(self._asked.pop(0))
            return
        assert logits is not None
        token = drawn(logits, self._drawn.random())
        self.tokens.append(token)
        if token in self._ends:
            self._asked = list(next(self._prompts))


def drawn(logits: np.ndarray, at: float) -> int:
    """Return the token whose part of the softmax of logits f32[V] a number of [0, 1) falls into."""
    weights = np.exp(logits - logits.max(), dtype=np.float64)
    sums = np.cumsum(weights)
    return int(np.searchsorted(sums, at * sums[-1], side="right"))


def _write(built: Any, texts: Sequence[_Text], length: int) -> None:
    from transformers import DynamicCache

    kept, logits = {cache_name(built): DynamicCache()}, None
    for at in range(length):
        for row, text in enumerate(texts):
            text.add(None if logits is None else logits[row])
        last = torch.tensor([text.tokens[at : at + 1] for text in texts])
        logits = built(input_ids=last, use_cache=True, **kept).logits[:, -1].numpy()
