"""Answer many prompts with one artifact, as many together as it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from llmbuild.errors import InputError
from llmbuild.runtime.sampling import Sampler, Sampling
from llmbuild.runtime.session import Session

Choose = Callable[[NDArray[np.int64]], NDArray[np.int64]]


def answer(
    session: Session, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling
) -> list[list[int]]:
    """Return the continuation of each prompt, up to an end token or the end of the context.

    Prompts of one call may differ in length. Drawn tokens have a seed of their own in each sequence.

    Raises:
        InputError: a prompt is empty, has a token outside the vocabulary, or does not fit in the context.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise InputError("a prompt is empty: give at least one token")
    batch, found = session.abi.batch, list[list[int]]()
    for first in range(0, len(prompts), batch):
        taken = prompts[first : first + batch]
        filled = [*taken, *[taken[-1]] * (batch - len(taken))]
        found += _answer(session, filled, max_new_tokens, _choose(session, sampling, first))[: len(taken)]
    return found


def _answer(session: Session, prompts: Sequence[Sequence[int]], max_new_tokens: int, choose: Choose) -> list[list[int]]:
    lengths = np.array([len(prompt) for prompt in prompts])
    padded = np.array([[*prompt, *[prompt[-1]] * (lengths.max() - len(prompt))] for prompt in prompts], np.int64)
    greedy = session.prefill_batch(padded)
    if lengths.min() < lengths.max():  # the last call was about a filler in the shorter ones: it is written over
        greedy = session.decode_batch(padded[np.arange(len(prompts)), lengths - 1], lengths - 1)
    found: list[list[int]] = [[] for _ in prompts]
    positions, going = lengths, np.full(len(prompts), max_new_tokens > 0)
    while going.any():
        tokens = choose(greedy)
        for sequence in np.flatnonzero(going):
            found[sequence].append(int(tokens[sequence]))
        ended = np.isin(tokens, session.abi.eos_tokens) | (positions >= session.abi.context)
        going &= ~ended & (np.array([len(one) for one in found]) < max_new_tokens)
        if going.any():  # who has ended says its last token again where it stands
            greedy = session.decode_batch(tokens, np.minimum(positions, session.abi.context - 1))
            positions = positions + going
    return found


def _choose(session: Session, sampling: Sampling, first: int) -> Choose:
    """Return what turns the device's greedy tokens i64[B] into those to take."""
    if sampling.greedy:
        return lambda greedy: greedy
    samplers = [Sampler(replace(sampling, seed=sampling.seed + first + i)) for i in range(session.abi.batch)]

    def drawn(_: NDArray[np.int64]) -> NDArray[np.int64]:
        rows = zip(samplers, session.logits_batch(), strict=True)
        return np.array([sampler.choose(logits) for sampler, logits in rows], np.int64)

    return drawn
