"""Score logits on held-out windows against the logits of the f32 model: the same sums for every runtime. Needs numpy.

As llmbuild's profiler does: the first `prompt` tokens of a window are given together, the others one by one, and each
answer but the last is held against the reference. So every position from `prompt` on is scored, whoever runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Answer = Callable[[list[int], int], NDArray[np.float32]]
"""Runs tokens from a position on, and returns the logits f32[V] after the last of them."""


def score(reference: Path, prompt: int, answer: Answer) -> dict[str, Any]:
    """Return KL divergence, top-1 agreement and perplexity per scored token, the standard error of KL, and the count.

    `reference` is an `.npz` of `tokens` i64[W,L] and `logits` f32[W,L,V]. The standard error treats windows as units.
    """
    with np.load(reference) as data:
        windows, logits = data["tokens"], data["logits"]
    kl, agree, loss = [], [], []
    for tokens, expected in zip(windows, logits, strict=True):
        actual = _log_softmax(_answers(tokens.tolist(), prompt, answer))
        wanted = _log_softmax(expected[prompt - 1 : -1])
        kl.append(np.sum(np.exp(wanted) * (wanted - actual), axis=-1))
        agree.append(actual.argmax(-1) == wanted.argmax(-1))
        loss.append(-actual[np.arange(len(actual)), tokens[prompt:]])
    means = np.array([each.mean() for each in kl])
    return {
        "quality_kl": max(0.0, float(np.mean(np.concatenate(kl)))),
        "kl_error": float(means.std(ddof=1) / len(means) ** 0.5) if len(means) > 1 else 0.0,
        "quality_top1": float(np.mean(np.concatenate(agree))),
        "quality_perplexity": float(np.exp(np.mean(np.concatenate(loss)))),
        "scored": int(sum(map(len, kl))),
    }


def greedy(prompts: list[list[int]], stops: list[int], count: int, answer: Answer) -> list[list[int]]:
    """Return up to `count` most likely tokens behind each prompt, without the one of `stops` that ends an answer."""
    found = []
    for prompt in prompts:
        logits, tokens = answer(prompt, 0), list[int]()
        while (token := int(logits.argmax())) not in stops:
            tokens.append(token)
            if len(tokens) == count:
                break
            logits = answer([token], len(prompt) + len(tokens) - 1)
        found.append(tokens)
    return found


def along(reference: Path, answer: Answer) -> dict[str, Any]:
    """Return the mean KL divergence of the next token along given answers, its standard error, and the tokens scored.

    `reference` is an `.npz` of texts one behind the other: `tokens` i64[N], where each ends in it `ends` i64[Q], the
    length of the prompt that each begins with `asked` i64[Q], and `logits` f32[M,V] that each token of an answer is
    drawn from. The standard error treats answers as units.
    """
    with np.load(reference) as data:
        tokens, ends, asked, logits = (data[name] for name in ("tokens", "ends", "asked", "logits"))
    kl, at = [], 0
    for text, prompt in zip(np.split(tokens, ends[:-1]), asked.tolist(), strict=True):
        wanted = _log_softmax(logits[at : at + len(text) - prompt])
        actual = _log_softmax(_answers(text.tolist(), prompt, answer)[: len(wanted)])
        kl.append(np.sum(np.exp(wanted) * (wanted - actual), axis=-1))
        at += len(wanted)
    means = np.array([each.mean() for each in kl if len(each)])
    return {
        "answers_kl": max(0.0, float(np.mean(np.concatenate(kl)))),
        "answers_kl_error": float(means.std(ddof=1) / len(means) ** 0.5) if len(means) > 1 else 0.0,
        "answers_scored": int(sum(map(len, kl))),
    }


def exact(reference: Path, prompt: int) -> dict[str, Any]:
    """Return the score of the reference itself: KL is 0, and perplexity is that of the f32 model."""
    with np.load(reference) as data:
        windows, logits = data["tokens"], data["logits"]
    at = iter(range(len(windows)))
    current: list[NDArray[np.float32]] = []

    def answer(tokens: list[int], past: int) -> NDArray[np.float32]:
        if past == 0:
            current[:] = [logits[next(at)]]
        found: NDArray[np.float32] = current[0][past + len(tokens) - 1]
        return found

    return score(reference, prompt, answer)


def _answers(tokens: list[int], prompt: int, answer: Answer) -> NDArray[np.float32]:
    """Return logits f32[L-prompt,V] after the prompt and after each later token but the last."""

    def rows() -> Iterable[NDArray[np.float32]]:
        yield answer(tokens[:prompt], 0)
        for past in range(prompt, len(tokens) - 1):
            yield answer(tokens[past : past + 1], past)

    return np.stack(list(rows()))


def _log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    x = logits.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    found: NDArray[np.float64] = x - np.log(np.exp(x).sum(-1, keepdims=True))
    return found
