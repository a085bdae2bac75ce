"""Choose the next token of one sequence from its logits, whatever else is in the batch.

Draws are numbered: the draw of a token is a function of the seed, the sequence and the token's place, so it is the same
whoever runs beside it and however often the sequence was interrupted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from llmbuild.runtime.draw import checked, drawn
from llmbuild.serve.events import Logprob
from llmbuild.serve.request import Request
from llmbuild.serve.step import Logits, Output

_WORD = 2**64 - 1


class Chooser:
    """Chooses the tokens of one sequence; `ends` are held back until it has `min_tokens`."""

    def __init__(self, request: Request, index: int, ends: Sequence[int]) -> None:
        self._params, self._seed, self._index = request.params, request.seed, index
        self._ends = list(ends)
        self._prompt = np.unique(np.array(request.prompt, np.int64)) if request.params.repetition_penalty != 1 else None
        self._counts: Counter[int] = Counter()
        self._matching = request.grammar.begin() if request.grammar is not None else None
        self._plain = request.params.plain and self._matching is None
        self._chosen = 0

    @property
    def reads(self) -> bool:
        """Whether the next choice reads logits."""
        return not self._plain or self._params.logprobs is not None

    def choose(self, output: Output) -> tuple[int, Logprob | None]:
        """Return the next token, and its log-probability where it is asked for.

        Raises:
            InputError: a logit is no number, or all tokens are ruled out.
        """
        params = self._params
        token = output.token if self._plain else self._read(output)
        self._chosen += 1
        if self._matching is not None:
            self._matching.take(token)
        if params.penalized:
            self._counts[token] += 1
        if params.logprobs is None:
            return token, None
        assert output.logits is not None
        return token, logprob(output.logits, token, params.logprobs)

    def forced(self) -> list[int]:
        """Return tokens that a grammar leaves no choice about, as they are usually split; a guess, to be chosen too."""
        return [] if self._matching is None else self._matching.forced()

    def _read(self, output: Output) -> int:
        """Return the token that the logits say, changed as asked for.

        What may follow by a grammar is asked of one token first, the likeliest or one that is drawn from all: most
        often it may. The likeliest is then that of those that may. A drawn one that may is taken, and else one is drawn
        of those that may: so each of these has its share of their probability, as if the others had been ruled out.
        """
        assert output.logits is not None
        params, made, matching = self._params, self._changed(output.logits), self._matching
        if matching is None:
            return self._found(made, 0)
        if params.temperature == 0 or not params.narrowed:
            token = self._found(made, 0)
            if matching.allows(token):
                return token
        allowed = matching.allowed()
        return int(allowed[self._found(made[allowed], 1)])

    def _found(self, logits: Logits, turn: int) -> int:
        """Return the likeliest token, or one that is drawn by the draw of a turn."""
        params = self._params
        if params.temperature == 0:
            return int(checked(logits).argmax())
        share = uniform(self._seed, self._index, self._chosen, turn)
        return drawn(logits, share, params.temperature, params.top_k, params.top_p, params.min_p)

    def _changed(self, logits: Logits) -> Logits:
        """Return logits with penalties and biases; the given ones are only read."""
        params = self._params
        barred = self._chosen < params.min_tokens
        if not (params.penalized or params.biases or barred):
            return logits
        made = logits.astype(np.float32, copy=True)
        if params.penalized:
            self._penalize(made)
        for token, bias in params.biases.items():
            made[token] += bias
        if barred:
            made[self._ends] = -np.inf
        return made

    def _penalize(self, made: Logits) -> None:
        params = self._params
        said = np.fromiter(self._counts.keys(), np.int64, len(self._counts))
        if self._prompt is not None:
            before = np.union1d(self._prompt, said)
            found = made[before]
            penalty = np.float32(params.repetition_penalty)
            made[before] = np.where(found > 0, found / penalty, found * penalty)
        if said.size:
            counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            made[said] -= np.float32(params.frequency_penalty) * counts + np.float32(params.presence_penalty)


def uniform(seed: int, sequence: int, place: int, turn: int = 0) -> float:
    """Return the draw from [0, 1) that belongs to a place of a sequence, and to a turn at this place."""
    key = np.array([seed & _WORD, sequence], np.uint64)
    bits = np.random.Philox(key=key, counter=np.array([place, turn, 0, 0], np.uint64))
    return float(np.random.Generator(bits).random())


def logprob(logits: Logits, token: int, count: int) -> Logprob:
    """Return the log-probability of a token, and the `count` most likely ones; equal ones in the order of ids."""
    wide = checked(logits).astype(np.float64)
    most = wide.max()
    made = wide - (most + np.log(np.exp(wide - most).sum()))
    count = min(count, logits.size)
    best: list[int] = []
    if count:
        found = np.flatnonzero(logits >= np.partition(logits, logits.size - count)[logits.size - count])
        best = found[np.argsort(-logits[found], kind="stable")][:count].tolist()
    return Logprob(token, _shown(made[token]), tuple((one, _shown(made[one])) for one in best))


def _shown(value: float) -> float:
    """Return a log-probability that JSON can hold: that of a token that cannot come is OpenAI's least number."""
    return max(float(value), -9999.0)
