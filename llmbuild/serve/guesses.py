"""What guesses the next tokens of a sequence: its grammar, or what followed the same tokens before."""

from __future__ import annotations

from collections.abc import Callable, Sequence

GRAMS = (4, 3, 2)
"""Lengths of what is looked up; the longest that was there before counts."""

FORGET = 0.95
"""What an older draft counts, compared with the next newer one."""


class Rate:
    """The share of drafts that were right lately."""

    def __init__(self, expected: float, worth: float) -> None:
        """Take what is expected at first, and how many drafts this is worth."""
        self._right, self._tried = expected * worth, worth

    def judged(self, right: int, tried: int) -> None:
        """Take how many drafts of a step were right, of those that were tried: up to the first wrong one."""
        for number in range(tried):
            self.one(float(number < right))

    def one(self, right: float) -> None:
        """Take one draft: whether, or to which part, it was right."""
        self._right, self._tried = self._right * FORGET + right, self._tried * FORGET + 1

    @property
    def share(self) -> float:
        """The share, between 0 and 1."""
        return self._right / self._tried


class Guesses:
    """What guesses the next tokens of one sequence, and how often it was right lately."""

    def __init__(self, expected: float, worth: float = 2.0) -> None:
        """Take what share of the first drafts is expected to be right, and how many drafts this is worth."""
        self._rate = Rate(expected, worth)

    def add(self, token: int) -> None:
        """Go on with a token."""

    def drafts(self, most: int) -> list[int]:
        """Return the tokens that are expected next, at most so many."""
        raise NotImplementedError

    def judged(self, right: int, tried: int) -> None:
        """Take how many drafts of a step were right, of those that were tried: up to the first wrong one."""
        self._rate.judged(right, tried)

    def released(self) -> None:
        """Take that the sequence has lost its place, or has ended."""

    @property
    def rate(self) -> float:
        """The share of drafts that are expected to be right, each behind a right one."""
        return self._rate.share

    @property
    def by(self) -> Guesses:
        """What makes the next drafts, or has made the last ones."""
        return self


class Lookup(Guesses):
    """The tokens of one sequence, and where each short run of them was last followed by something."""

    def __init__(self, tokens: Sequence[int]) -> None:
        super().__init__(0.5)
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
        super().__init__(0.9)
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

    def released(self) -> None:
        """Take that the sequence has lost its place, or has ended."""
        if self._other is not None:
            self._other.released()

    @property
    def by(self) -> Guesses:
        """What has made the last drafts; or, where a grammar forces none, what may make some."""
        return self._by

    @property
    def rate(self) -> float:
        """The share of the last drafts that is expected to be right, each behind a right one."""
        return super().rate if self._by is self else self._by.rate
