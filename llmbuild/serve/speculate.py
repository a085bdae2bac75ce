"""Speculation: guess the next tokens of a sequence, from its grammar or from what followed the same tokens before.

A step computes the guesses of a sequence, its drafts, together with its last token. A draft is right where the token
that is chosen in its place is the same, so answers are those without drafts, token for token, whether they are greedy
or drawn. Nobody needs a second model. Tokens that a grammar leaves no choice about are always guessed, others where it
is asked for.
Source: prompt lookup decoding (Saxena, 2023), which other servers call n-gram speculation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

NONE, NGRAM = "none", "ngram"
NAMES = (NONE, NGRAM)
"""How drafts are made, by name."""

GRAMS = (4, 3, 2)
"""Lengths of what is looked up; the longest that was there before counts."""

MOST_ROWS = 12
"""Rows of a step with drafts: the weights are read once for them, and their products hardly show up to some six."""

FOLLOW = 0.1
"""Share of the latest step in the mean of steps with as many rows."""
STALE = 512
"""Steps after which a time is not believed any more: one slow step must not rule drafts out for ever."""
FORGET = 0.95
"""What an older draft counts, compared with the next newer one."""


class Guesses:
    """What guesses the next tokens of one sequence, and how often it was right lately."""

    def __init__(self, right: float, tried: float) -> None:
        """Take what share of the first drafts is expected to be right, and how many drafts this is worth."""
        self._right, self._tried = right, tried

    def add(self, token: int) -> None:
        """Go on with a token."""

    def drafts(self, most: int) -> list[int]:
        """Return the tokens that are expected next, at most so many."""
        raise NotImplementedError

    def judged(self, right: int, tried: int) -> None:
        """Take how many drafts of a step were right, of those that were tried: up to the first wrong one."""
        for number in range(tried):
            self._right = self._right * FORGET + (number < right)
            self._tried = self._tried * FORGET + 1

    @property
    def rate(self) -> float:
        """The share of drafts that are expected to be right, each behind a right one."""
        return self._right / self._tried


class Lookup(Guesses):
    """The tokens of one sequence, and where each short run of them was last followed by something."""

    def __init__(self, tokens: Sequence[int]) -> None:
        super().__init__(1.0, 2.0)
        self._tokens: list[int] = []
        self._behind: dict[tuple[int, ...], int] = {}
        """The place behind the latest earlier occurrence of a run."""
        self._next: int | None = None
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        """Go on with a token."""
        self._tokens.append(token)
        self._next, count = None, len(self._tokens)
        for length in GRAMS:
            if length > count:
                continue
            run = tuple(self._tokens[-length:])
            if self._next is None:
                self._next = self._behind.get(run)
            self._behind[run] = count

    def drafts(self, most: int) -> list[int]:
        """Return what followed the last tokens before, at most so many; what repeats itself is gone on with."""
        if self._next is None:
            return []
        found: list[int] = []
        for place in range(self._next, self._next + most):
            behind = place - len(self._tokens)
            found.append(self._tokens[place] if behind < 0 else found[behind])
        return found


class Forced(Guesses):
    """The tokens that a grammar forces, and where it forces none, those of another guess."""

    def __init__(self, forced: Callable[[], list[int]], other: Guesses | None = None) -> None:
        super().__init__(1.8, 2.0)
        self._forced, self._other = forced, other
        self._by: Guesses = self
        """What made the last drafts."""

    def add(self, token: int) -> None:
        """Go on with a token."""
        if self._other is not None:
            self._other.add(token)

    def drafts(self, most: int) -> list[int]:
        """Return the next tokens, at most so many."""
        found, self._by = self._forced()[:most], self
        if not found and self._other is not None:
            found, self._by = self._other.drafts(most), self._other
        return found

    def judged(self, right: int, tried: int) -> None:
        """Take how many of the last drafts were right, of those that were tried."""
        if self._by is self:
            super().judged(right, tried)
        else:
            self._by.judged(right, tried)

    @property
    def rate(self) -> float:
        """The share of the last drafts that is expected to be right, each behind a right one."""
        return super().rate if self._by is self else self._by.rate


class Pace:
    """Seconds that steps of single rows took lately, by the number of rows."""

    def __init__(self) -> None:
        self._mean_s: dict[int, float] = {}
        self._at: dict[int, int] = {}
        self._steps = 0

    def took(self, rows: int, seconds: float) -> None:
        """Take a step."""
        self._steps += 1
        before = self._mean_s.get(rows) if self._fresh(rows) else None
        self._mean_s[rows] = seconds if before is None else before + FOLLOW * (seconds - before)
        self._at[rows] = self._steps

    def seconds(self, rows: int) -> float:
        """Return what a step takes; what is not known is tried: it counts as the nearest smaller one that is."""
        known = [one for one in self._mean_s if one <= rows and self._fresh(one)]
        return self._mean_s[max(known)] if known else 0.0

    def _fresh(self, rows: int) -> bool:
        return rows in self._at and self._steps - self._at[rows] < STALE


class Speculation:
    """How many drafts sequences have in a step: as many as pay by what steps took and how often drafts were right."""

    def __init__(self, lookup: bool = True, most_rows: int = MOST_ROWS) -> None:
        """Take whether tokens are looked up, and the most rows of a step that has drafts, last tokens included."""
        self._lookup, self._most_rows, self._pace = lookup, most_rows, Pace()

    def of(self, prompt: Sequence[int], forced: Callable[[], list[int]] | None) -> Guesses | None:
        """Return what guesses the tokens of a sequence, by its prompt and by what its grammar forces; or None."""
        looked = Lookup(prompt) if self._lookup else None
        return looked if forced is None else Forced(forced, looked)

    def drafts(self, asked: Sequence[tuple[Guesses | None, int]]) -> list[tuple[int, ...]]:
        """Return the drafts of sequences that decode, at most so many of each."""
        left = self._most_rows - len(asked)
        if left < 1:
            return [()] * len(asked)
        found = [guesses.drafts(min(most, left)) if guesses else [] for guesses, most in asked]
        made = [
            Candidate(len(one), guesses.rate if guesses else 0.0)
            for one, (guesses, _) in zip(found, asked, strict=True)
        ]
        taken = counts(made, self._pace, self._most_rows)
        return [tuple(one[:count]) for one, count in zip(found, taken, strict=True)]

    def took(self, rows: int, seconds: float) -> None:
        """Take the seconds of a step in which all sequences decoded, with its rows."""
        self._pace.took(rows, seconds)


@dataclass(frozen=True)
class Candidate:
    """A sequence that decodes: how many drafts it has, and the share of them that is expected to be right."""

    drafts: int
    rate: float


def counts(candidates: Sequence[Candidate], pace: Pace, most_rows: int) -> list[int]:
    """Return how many drafts of each sequence the next step computes, so that most tokens a second are expected.

    Drafts are added one after another, the likeliest first; the number with the best rate is taken, none at equality.
    """
    rows = len(candidates)
    found, best, taken = [0] * rows, [0] * rows, float(rows)
    base_s = pace.seconds(rows)
    if not base_s:
        return best
    highest, heap = taken / base_s, list[tuple[float, int]]()
    for number, one in enumerate(candidates):
        if one.drafts:
            heappush(heap, (-one.rate, number))
    while heap and rows < most_rows:
        chance, number = heappop(heap)
        rows, taken = rows + 1, taken - chance
        found[number] += 1
        if found[number] < candidates[number].drafts:
            heappush(heap, (chance * candidates[number].rate, number))
        if (rate := taken / max(pace.seconds(rows), base_s)) > highest:
            highest, best = rate, list(found)
    return best
