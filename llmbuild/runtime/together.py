"""Answer many prompts with one artifact, in batches of its batch size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmbuild.errors import InputError
from llmbuild.runtime.answers import LENGTH, STOP, Asked, ended
from llmbuild.runtime.sampling import Sampler, Sampling
from llmbuild.runtime.session import Session

Choose = Callable[[NDArray[np.int64]], NDArray[np.int64]]

Watch = Callable[[int], bool]
"""Takes each token of an answer and returns whether the answer has ended."""


@dataclass(frozen=True)
class Continuation:
    """The tokens of one answer, and its finish reason."""

    tokens: tuple[int, ...]
    finish_reason: str


def answer(
    session: Session, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling
) -> list[list[int]]:
    """Return the continuation of each prompt, up to an end token or the end of the context.

    Prompts of one call may differ in length. Each sequence has its own random draws.

    Raises:
        InputError: a prompt is empty, has a token outside the vocabulary, or does not fit in the context.
    """
    return [list(one.tokens) for one in continued(session, prompts, max_new_tokens, sampling)]


def continued(
    session: Session,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    watches: Sequence[Watch] | None = None,
) -> list[Continuation]:
    """Return the continuation and finish reason of each prompt; `watches` may end each earlier.

    Raises:
        InputError: as `answer`; nothing has run.
    """
    if isinstance(prompts, (str, bytes)) or not isinstance(prompts, (Sequence, np.ndarray)):
        raise InputError(f"prompts is a {type(prompts).__name__}; it must be a list of lists of token ids")
    asked = [Asked.of(session, f"prompts[{i}]", one, max_new_tokens, sampling) for i, one in enumerate(prompts)]
    if not asked or asked[0].max_new_tokens == 0:
        return [Continuation((), LENGTH) for _ in asked]
    batch, found = session.abi.batch, list[Continuation]()
    seen = list(watches) if watches is not None else [_unwatched] * len(asked)
    for first in range(0, len(asked), batch):
        taken = asked[first : first + batch]
        choose = _choose(session, taken[0].sampling, first)
        found += _answer(session, taken, choose, seen[first : first + batch])
    return found


def _unwatched(_: int) -> bool:
    return False


def _answer(session: Session, asked: Sequence[Asked], choose: Choose, watches: Sequence[Watch]) -> list[Continuation]:
    """Answer as many prompts as the batch size, or fewer: the last one then fills the missing rows."""
    prompts = [one.prompt for one in asked]
    prompts += [prompts[-1]] * (session.abi.batch - len(asked))
    found: list[list[int]] = [[] for _ in asked]
    reasons: list[str | None] = [None] * len(asked)
    with session.cache() as cache:
        greedy, positions = _begin(session, prompts, cache)
        while None in reasons:
            tokens, going = choose(greedy), np.zeros(len(prompts), np.bool_)
            for n, token in enumerate(tokens[: len(asked)].tolist()):
                if reasons[n] is None:
                    found[n].append(token)
                    most = asked[n].max_new_tokens
                    over = STOP if watches[n](token) else None
                    reasons[n] = over or ended(session, token, len(found[n]), most, int(positions[n]))
                    going[n] = reasons[n] is None
            if going.any():  # a finished sequence repeats its last token at its position
                greedy = session.decode_batch(tokens, np.minimum(positions, session.abi.context - 1), cache=cache)
                positions = positions + going
    return [Continuation(tuple(mine), why or LENGTH) for mine, why in zip(found, reasons, strict=True)]


def _begin(
    session: Session, prompts: Sequence[Sequence[int]], cache: list[object]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Run the prompts; return the device's next tokens i64[B] and their positions."""
    lengths = np.array([len(prompt) for prompt in prompts])
    padded = np.array([[*prompt, *[prompt[-1]] * (lengths.max() - len(prompt))] for prompt in prompts], np.int64)
    greedy = session.prefill_batch(padded, cache=cache)
    if lengths.min() < lengths.max():  # about padding of the shorter prompts: the next call overwrites it
        greedy = session.decode_batch(padded[np.arange(len(prompts)), lengths - 1], lengths - 1, cache=cache)
    return greedy, lengths


def _choose(session: Session, sampling: Sampling, first: int) -> Choose:
    """Return the function that maps the device's greedy tokens i64[B] to the tokens to take."""
    if sampling.greedy:
        return lambda greedy: greedy
    samplers = [Sampler(sampling, first + i) for i in range(session.abi.batch)]

    def drawn(_: NDArray[np.int64]) -> NDArray[np.int64]:
        rows = zip(samplers, session.logits_batch(), strict=True)
        return np.array([sampler.choose(logits) for sampler, logits in rows], np.int64)

    return drawn
