"""Speculation: guess the next tokens of a sequence: from its grammar, from what followed the same tokens before, or by
a smaller variant of the same tokenizer.

A step computes the guesses of a sequence, its drafts, together with its last token. A draft is right where the token
that is chosen in its place is the same, so answers are those without drafts, token for token, whether they are greedy
or drawn. Tokens that a grammar leaves no choice about are always guessed, others where it is asked for.
Source: prompt lookup decoding (Saxena, 2023), which other servers call n-gram speculation; `serve/draft.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import mean
from typing import NamedTuple

from llmbuild.serve.draft import Drafted, Drafter
from llmbuild.serve.guesses import Forced, Guesses, Lookup
from llmbuild.serve.pace import Candidate, Choice, Pace, choose

NONE, NGRAM, DRAFT = "none", "ngram", "draft"
NAMES = (NONE, NGRAM, DRAFT)
"""How drafts are made, by name."""

MOST_ROWS = 12
"""Rows of a step with drafts: the weights are read once for them, and their products hardly show up to some six."""


class Asked(NamedTuple):
    """A sequence that decodes."""

    guesses: Guesses | None
    most: int
    """Drafts that it may have."""
    left: float
    """Tokens that it is expected to have still."""


class Speculation:
    """How many drafts sequences have in a step: as many as pay by what steps took and how often drafts were right."""

    def __init__(self, lookup: bool = True, most_rows: int = MOST_ROWS, drafter: Drafter | None = None) -> None:
        """Take whether tokens are looked up, the most rows of a step that has drafts, last tokens included, and who
        guesses the tokens that are not looked up.
        """
        self._lookup, self._most_rows, self._pace, self._drafter = lookup, most_rows, Pace(), drafter

    @property
    def spent_s(self) -> float:
        """Seconds that a drafter's steps took, all together."""
        return 0.0 if self._drafter is None else self._drafter.spent_s

    def of(self, prompt: Sequence[int], forced: Callable[[], list[int]] | None, salt: bytes = b"") -> Guesses | None:
        """Return what guesses the tokens of a sequence, by its prompt and by what its grammar forces; or None.

        What a drafter computes of sequences with another `salt` is kept apart.
        """
        found: Guesses | None = Lookup(prompt) if self._lookup else None
        if self._drafter is not None:
            found = self._drafter.of(prompt, salt)
        return found if forced is None else Forced(forced, found)

    def drafts(self, asked: Sequence[Asked]) -> list[tuple[int, ...]]:
        """Return the drafts of sequences that decode."""
        left = self._most_rows - len(asked)
        if left < 1:
            return [()] * len(asked)
        found = [one.guesses.drafts(min(one.most, left)) if one.guesses else [] for one in asked]
        if self._drafter is not None:
            return self._computed(self._drafter, Turn(asked, found, self._pace, self._most_rows, self._drafter))
        if not any(found):
            return [()] * len(asked)
        counts = choose(_there(asked, found), self._pace, self._most_rows).counts
        return [tuple(one[:count]) for one, count in zip(found, counts, strict=True)]

    def took(self, rows: int, seconds: float) -> None:
        """Take the seconds of a step in which all sequences decoded, with its rows."""
        self._pace.took(rows, seconds)
        if self._drafter is not None:
            self._drafter.passed()

    def close(self) -> None:
        """Free what a drafter holds on the device."""
        if self._drafter is not None:
            self._drafter.close()

    def _computed(self, drafter: Drafter, turn: Turn) -> list[tuple[int, ...]]:
        """Return the drafts of sequences, where a drafter computes those that are not there if this pays."""
        chosen = turn.choose()
        if behind := turn.worth(chosen):
            drafter.catch_up(behind)
            chosen = turn.choose()
        going = [number for number, count in enumerate(chosen.counts) if count and number in turn.ones]
        drafts = drafter.draft([(turn.ones[number], chosen.counts[number]) for number in going])
        computed = dict(zip(going, drafts, strict=True))
        return [computed.get(i, tuple(turn.found[i][:count])) for i, count in enumerate(chosen.counts)]


class Turn:
    """The sequences of a step, and what a drafter may do for those that have no drafts."""

    def __init__(
        self, asked: Sequence[Asked], found: Sequence[list[int]], pace: Pace, most_rows: int, drafter: Drafter
    ) -> None:
        """Take sequences with the drafts that are there, and what steps take."""
        self.found, self.ones = found, dict(_to_compute(asked, found))
        self._asked, self._pace, self._most_rows, self._drafter = asked, pace, most_rows, drafter

    def choose(self, as_if: bool = False) -> Choice:
        """Return how many drafts pay. Sequences of which the drafter has missed more than a few tokens have none; or
        those that they would have, had it missed none.
        """
        made = _there(self._asked, self.found)
        for number, one in self.ones.items():
            asked, far = self._asked[number], self._far(one)
            if as_if or not far:
                most = self._drafter.most(one, min(asked.most, self._most_rows - len(self._asked)))
                made[number] = Candidate(most, _rate(asked), 1 if far else one.missing)
        return choose(made, self._pace, self._most_rows, self._drafter.pace)

    def worth(self, now: Choice) -> list[Drafted]:
        """Return the sequences that the drafter should catch up with: all that it has missed much of, where this costs
        less than what their drafts are expected to save until they end; else none. `now` is what is chosen without.
        """
        behind = {number: one for number, one in self.ones.items() if self._far(one)}
        if not behind or not now.tokens_per_s:
            return []
        then = self.choose(as_if=True)
        behind = {number: one for number, one in behind.items() if then.counts[number]}
        tokens = len(self._asked) * mean(self._asked[number].left for number in behind) if behind else 0.0
        saved_s = tokens * (1 / now.tokens_per_s - 1 / then.tokens_per_s)
        missed = sum(one.missing - 1 for one in behind.values())
        return list(behind.values()) if saved_s > self._drafter.costs(missed) else []

    def _far(self, one: Drafted) -> bool:
        """Return whether more is missing than a step of drafts computes beside them."""
        return one.missing > self._most_rows


def _there(asked: Sequence[Asked], found: Sequence[list[int]]) -> list[Candidate]:
    """Return what drafts are there."""
    return [Candidate(len(one), _rate(each)) for one, each in zip(found, asked, strict=True)]


def _rate(one: Asked) -> float:
    return one.guesses.rate if one.guesses else 0.0


def _to_compute(asked: Sequence[Asked], found: Sequence[list[int]]) -> Iterable[tuple[int, Drafted]]:
    """Yield the sequences that have no drafts, and for which a drafter may compute some."""
    for number, one in enumerate(asked):
        if one.guesses is not None and not found[number] and isinstance(by := one.guesses.by, Drafted) and one.most:
            yield number, by
