"""Chats that a model itself writes, to be calibrated on: it answers prompts with tokens drawn as it expects them.

What a model says is nearer to what it will say than any given text (data-free calibration: LLM-QAT, arXiv:2305.17888).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from llmbuild.errors import InputError
from llmbuild.frontend import huggingface
from llmbuild.frontend.cache import cache_name
from llmbuild.frontend.huggingface import LIBRARY_ATTENTION
from llmbuild.frontend.transcript import TOGETHER, Transcript


def written(
    model: str, prompts: Sequence[Sequence[int]], windows: int, length: int, transcript: Transcript | None = None
) -> np.ndarray:
    """Return texts i64[windows,length] in which a model answers prompts, each of tokens; the model is loaded whole.

    Window w begins with prompt w. Where the model ends its answer, prompt w + windows is next, and so on around.
    Each window has numbers of its own for what is drawn, so that it does not depend on the others. What a transcript
    has of an earlier run is not written again.

    Raises:
        InputError: the model cannot be taken, or a prompt is not of its tokens.
    """
    built = huggingface.load(model, False, 0, LIBRARY_ATTENTION, length)
    if not prompts or not all(prompts) or not all(0 <= t < built.config.vocab_size for p in prompts for t in p):
        raise InputError(f"{model}: prompts must be tokens from 0 to {built.config.vocab_size - 1}")
    ends = frozenset(huggingface.eos_tokens(built))
    known = transcript.tokens(windows) if transcript else [[] for _ in range(windows)]
    texts = [_Text(w, windows, prompts, ends, tokens) for w, tokens in enumerate(known)]

    def keep() -> None:
        if transcript:
            transcript.keep([text.tokens for text in texts])

    with torch.inference_mode():
        for begin in range(0, windows, TOGETHER):
            _write(built, texts[begin : begin + TOGETHER], length, keep)
    return np.array([text.tokens for text in texts], np.int64)


class _Text:
    """A window as it is written: tokens so far, and those of a prompt that come before the model is asked again."""

    def __init__(
        self, first: int, step: int, prompts: Sequence[Sequence[int]], ends: frozenset[int], known: Sequence[int]
    ) -> None:
        """Take the window's number, how many there are, and the tokens that it is known to begin with."""
        self.tokens: list[int] = []
        self._numbers, self._ends = np.random.default_rng(first), ends
        self._prompts = self._order(first, step, prompts)
        self.asked = list(next(self._prompts))
        """Tokens of a prompt that are next."""
        for token in known:
            if not self.asked:
                self._numbers.random()  # which drew it
            self._append(token)

    @staticmethod
    def _order(first: int, step: int, prompts: Sequence[Sequence[int]]) -> Iterator[Sequence[int]]:
        while True:
            yield prompts[first % len(prompts)]
            first += step

    def add(self, logits: np.ndarray | None) -> None:
        """Add the next token of the prompt, or one that is drawn by logits f32[V]."""
        if self.asked:
            self._append(self.asked[0])
            return
        assert logits is not None
        self._append(drawn(logits, self._numbers.random()))

    def _append(self, token: int) -> None:
        self.tokens.append(token)
        if self.asked:
            self.asked.pop(0)
        elif token in self._ends:
            self.asked = list(next(self._prompts))


def drawn(logits: np.ndarray, at: float) -> int:
    """Return the token whose part of the softmax of logits f32[V] a number of [0, 1) falls into."""
    weights = np.exp(logits - logits.max(), dtype=np.float64)
    sums = np.cumsum(weights)
    return int(np.searchsorted(sums, at * sums[-1], side="right"))


def _write(built: Any, texts: Sequence[_Text], length: int, keep: Callable[[], None]) -> None:
    """Write texts of as many tokens each up to a length; what is known of all of them is read in one call."""
    from transformers import DynamicCache

    for _ in range(min(length - len(texts[0].tokens), *(len(text.asked) for text in texts))):
        for text in texts:
            text.add(None)
    cached, read = {cache_name(built): DynamicCache()}, 0
    while (at := len(texts[0].tokens)) < length:
        fresh = torch.tensor([text.tokens[read:] for text in texts])
        logits, read = built(input_ids=fresh, use_cache=True, logits_to_keep=1, **cached).logits[:, -1].numpy(), at
        for row, text in enumerate(texts):
            text.add(logits[row])
        keep()
