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
from llmbuild.serve.grammar import Matching
from llmbuild.serve.request import Request
from llmbuild.serve.step import Logits, Output

_WORD = 2**64 - 1


class Chooser:
    """Chooses the tokens of one sequence; `ends` are held back until it has `min_tokens`."""

    def __init__(self, request: Request, index: int, ends: Sequence[int]) -> None:
        self._params = request.params
        self._ends = list(ends)
        self._prompt = np.unique(np.array(request.prompt, np.int64)) if request.params.repetition_penalty != 1 else None
        self._counts: Counter[int] = Counter()
        self._matching = request.grammar.begin() if request.grammar is not None else None
        self._plain = request.params.plain and self._matching is None
        self._numbers = None if request.params.temperature == 0 else Numbers(request.seed, index)
        self._wide = False
        """Whether most tokens could follow in the last place, as in the midst of a string."""
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
        """Return the token that the logits say, changed as asked for; a grammar has taken it."""
        assert output.logits is not None
        made, matching = self._changed(output.logits), self._matching
        if matching is None:
            return self._found(made, 0)
        token = self._tried(made, matching, output.token if made is output.logits else None)
        return self._restricted(made, matching) if token is None else token

    def _tried(self, made: Logits, matching: Matching, said: int | None) -> int | None:
        """Return a token that was chosen of all and may follow, or None: what may follow is asked of few tokens, where
        this is likely to be cheaper than to find all that may.

        The likeliest of all tokens, if it may follow, is the likeliest of those that may; `said` is what the device
        says it is. A token that is drawn of all is taken if it may follow, and else one is drawn of those that may: the
        second draw is another number, so both ways a token has its share of the probability of those that may, as if
        the others had been ruled out. For p(A) the probability of those that may follow, and t one of them:
        p(t) + (1 - p(A)) * p(t) / p(A) = p(t) / p(A). Whether a draw of all is tried depends on the tokens before
        alone. Draws of fewer than all tokens, by k or p, are of the k tokens or the p of those that may follow, so a
        draw of all says nothing of them.
        """
        params = self._params
        if params.temperature == 0:
            token = int(checked(made).argmax()) if said is None else said
        elif self._wide and not params.narrowed:
            token = self._found(made, 0)
        else:
            return None
        return token if matching.tries(token) else None

    def _restricted(self, made: Logits, matching: Matching) -> int:
        """Return a token that is chosen of those that may follow: where these are few, cheaper than to draw of all."""
        allowed = matching.allowed()
        self._wide = 2 * allowed.size > made.size
        token = int(allowed[self._found(made[allowed], 1)])
        matching.take(token)
        return token

    def _found(self, logits: Logits, turn: int) -> int:
        """Return the likeliest token, or one that is drawn by the draw of a turn."""
        params = self._params
        if self._numbers is None:
            return int(checked(logits).argmax())
        share = self._numbers.at(self._chosen, turn)
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


class Numbers:
    """The draws from [0, 1) of one sequence: each belongs to a place of it, and to a turn at this place."""

    def __init__(self, seed: int, sequence: int) -> None:
        self._bits = np.random.Philox(key=np.array([seed & _WORD, sequence], np.uint64))
        self._state = self._bits.state

    def at(self, place: int, turn: int = 0) -> float:
        """Return the draw of a place and a turn, whichever were asked for before."""
        counter = self._state["state"]["counter"]
        counter[0], counter[1] = place, turn
        self._bits.state = self._state  # a tenth of the time that a new generator takes
        return float((self._bits.random_raw() >> 11) * 2.0**-53)


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
