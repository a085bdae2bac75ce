"""What steps take by their rows, and how many drafts pay by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

FOLLOW = 0.1
"""Share of the latest step in the mean of steps with as many rows."""
STALE = 512
"""Steps after which a time is not believed any more: one slow step must not rule drafts out for ever."""


class Pace:
    """Seconds that steps of single rows took lately, by the number of rows."""

    def __init__(self) -> None:
        self._mean_s: dict[int, float] = {}
        self._at: dict[int, int] = {}
        self._steps = 0
        self._found: dict[int, float] = {}
        """What was found since the last step."""

    def took(self, rows: int, seconds: float) -> None:
        """Take a step."""
        self.passed()
        before = self._mean_s.get(rows) if self._fresh(rows) else None
        self._mean_s[rows] = seconds if before is None else before + FOLLOW * (seconds - before)
        self._at[rows] = self._steps

    def passed(self) -> None:
        """Take that a step went by, of these or of others that go on meanwhile."""
        self._steps += 1
        self._found.clear()

    def seconds(self, rows: int) -> float:
        """Return what a step takes; what is not known is tried: it counts as the nearest smaller one that is."""
        if rows not in self._found:
            known = [one for one in self._mean_s if one <= rows and self._fresh(one)]
            self._found[rows] = self._mean_s[max(known)] if known else 0.0
        return self._found[rows]

    def _fresh(self, rows: int) -> bool:
        return rows in self._at and self._steps - self._at[rows] < STALE


@dataclass(frozen=True)
class Candidate:
    """A sequence that decodes: how many drafts it may have, and the share of them that is expected to be right."""

    drafts: int
    rate: float
    first: int = 0
    """Rows that a drafter computes for its first draft, and then one for each further one; 0 where drafts are there."""


@dataclass(frozen=True)
class Choice:
    """How many drafts of each sequence the next step computes, and the tokens a second that are expected of it."""

    counts: tuple[int, ...]
    tokens_per_s: float
    """0 where nothing is known."""


def choose(candidates: Sequence[Candidate], pace: Pace, most_rows: int, drafter: Pace | None = None) -> Choice:
    """Return how many drafts of each sequence the next step computes, so that most tokens a second are expected.

    Drafts are added one after another, the likeliest first; the number with the best rate is taken, none at equality.
    A drafter computes the first drafts of all sequences in a step of its own, then the second ones, and so on: its
    steps take what `drafter` says, before those of `pace`.
    """
    rows, drafting_s = len(candidates), 0.0
    found, levels, taken = [0] * rows, list[int](), float(rows)
    base_s = pace.seconds(rows)
    if not base_s:
        return Choice((0,) * rows, 0.0)
    best = Choice((0,) * rows, taken / base_s)
    heap = [(-one.rate, number) for number, one in enumerate(candidates) if one.drafts]
    heapify(heap)
    while heap and rows < most_rows:
        chance, number = heappop(heap)
        one = candidates[number]
        rows, taken = rows + 1, taken - chance
        if one.first and drafter is not None:
            drafting_s += _another(levels, found[number], one.first, drafter)
        found[number] += 1
        if found[number] < one.drafts:
            heappush(heap, (chance * one.rate, number))
        if (rate := taken / (max(pace.seconds(rows), base_s) + drafting_s)) > best.tokens_per_s:
            best = Choice(tuple(found), rate)
    return best


def _another(levels: list[int], level: int, first: int, drafter: Pace) -> float:
    """Add a sequence to a drafter's step, of which the rows are in `levels`; return by how much longer this takes."""
    if level == len(levels):
        levels.append(0)
    before_s = drafter.seconds(levels[level]) if levels[level] else 0.0
    levels[level] += 1 if level else first
    return drafter.seconds(levels[level]) - before_s
