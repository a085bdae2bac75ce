"""Speculation by prompt lookup: guess the next tokens of a sequence from what followed the same tokens before.

A step computes the guesses of a sequence, its drafts, together with its last token. A draft is right where the token
that is chosen in its place is the same, so answers are those without drafts, token for token, whether they are greedy
or drawn. Nobody needs a second model.
Source: prompt lookup decoding (Saxena, 2023), which other servers call n-gram speculation.
"""

from __future__ import annotations

from collections.abc import Sequence
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


class Lookup:
    """The tokens of one sequence, and where each short run of them was last followed by something."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._behind: dict[tuple[int, ...], int] = {}
        """The place behind the latest earlier occurrence of a run."""
        self._next: int | None = None
        self._right, self._tried = 1.0, 2.0
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

    def judged(self, right: int, tried: int) -> None:
        """Take how many drafts of a step were right, of those that were tried: up to the first wrong one."""
        for number in range(tried):
            self._right = self._right * FORGET + (number < right)
            self._tried = self._tried * FORGET + 1

    @property
    def rate(self) -> float:
        """The share of drafts that are expected to be right, each behind a right one."""
        return self._right / self._tried


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

    def __init__(self, most_rows: int = MOST_ROWS) -> None:
        """Take the most rows of a step that has drafts, those of last tokens included."""
        self._most_rows, self._pace = most_rows, Pace()

    def drafts(self, asked: Sequence[tuple[Lookup, int]]) -> list[tuple[int, ...]]:
        """Return the drafts of sequences that decode, at most so many of each."""
        left = self._most_rows - len(asked)
        if left < 1:
            return [()] * len(asked)
        found = [lookup.drafts(min(most, left)) for lookup, most in asked]
        made = [Candidate(len(one), lookup.rate) for one, (lookup, _) in zip(found, asked, strict=True)]
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
