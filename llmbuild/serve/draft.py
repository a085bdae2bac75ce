"""A drafter: a smaller variant of the same tokenizer that guesses the tokens of the one that answers.

It has its own cache, in which it keeps up with the sequences that it drafts for. Its tokens are greedy, and computed
for all of them together: the first of each in one step, then the second ones, and so on.
Source: speculative decoding (Leviathan, Kalman, Matias, 2023), with drafts that count only where they are the answer's
own tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Protocol

from llmbuild.serve.blocks import Names, Tables
from llmbuild.serve.guesses import Guesses, Rate
from llmbuild.serve.pace import Pace
from llmbuild.serve.step import Output, Rows, Step

CATCH_UP = 256
"""Rows of a step that computes what a drafter has missed: all answers wait for it."""


class DraftStep(Step, Protocol):
    """A step that can be ahead of what is known to be right."""

    @property
    def tables(self) -> Tables:
        """The blocks of each slot."""

    def ahead(self, batch: Sequence[Rows]) -> Sequence[Output]:
        """Run guessed tokens: nobody finds their blocks until `keep` takes them as right, and others overwrite them."""


@dataclass
class Slots:
    """The slots of a drafter's step, and those that are free."""

    step: DraftStep
    free: list[int]


class Drafted(Guesses):
    """A sequence as a drafter knows it: its tokens, how many of them are computed, and what is guessed behind them."""

    def __init__(self, tokens: Sequence[int], salt: bytes, slots: Slots, all_of: Rate) -> None:
        """Take the share of the drafter's drafts that were right, of all sequences: it is what is expected here."""
        super().__init__(all_of.share)
        self.tokens = list(tokens)
        self.slot: int | None = None
        self.computed = 0
        """Tokens whose keys and values are in the slot."""
        self.made: list[int] = []
        """Guesses that follow all tokens, and that nobody has judged."""
        self.there = 0
        """The first of them whose keys and values are in the slot, too; then those of all tokens are."""
        self._salt, self._slots, self._all_of = salt, slots, all_of
        self._names: Names | None = None

    def add(self, token: int) -> None:
        """Go on with a token: what is guessed behind it stands where the first guess is the token, else it falls."""
        self.tokens.append(token)
        if not self.made or self.made.pop(0) != token:
            self.made, self.there = [], 0
        elif self.there:
            assert self.slot is not None
            self._slots.step.keep(self.slot, (token,))
            self.computed, self.there = self.computed + 1, self.there - 1

    def drafts(self, most: int) -> list[int]:
        """Return guesses that were made before and that no step has taken: others are to be computed."""
        return self.made[:most]

    def judged(self, right: int, tried: int) -> None:
        """Take how many drafts of a step were right, of those that were tried: up to the first wrong one."""
        super().judged(right, tried)
        self._all_of.judged(right, tried)

    def released(self) -> None:
        """Take that the sequence has lost its place, or has ended: the drafter frees its own."""
        if self.slot is not None:
            self._slots.step.end(self.slot)
            self._slots.free.append(self.slot)
        self.slot, self.computed, self.made, self.there, self._names = None, 0, [], 0, None

    @property
    def missing(self) -> int:
        """Tokens that are not computed: the last one at least, where no guess is left."""
        return len(self.tokens) - (self._slots.step.known(self._known_by()) if self.slot is None else self.computed)

    def begin(self) -> None:
        """See that it has a slot: there is one for each sequence that runs."""
        if self.slot is None:
            self.slot = self._slots.free.pop()
            self.computed = self._slots.step.begin(self.slot, self.tokens, self._known_by(), self._salt)

    def _known_by(self) -> Names:
        if self._names is None:
            self._names = self._slots.step.names(self.tokens, self._salt)
        return self._names


class Drafter:
    """The step of the variant that drafts, what its steps take, and how often its drafts were right."""

    def __init__(self, step: DraftStep, clock: Callable[[], float] = monotonic) -> None:
        """Take a step with a slot for each sequence that may run, which is the drafter's to close."""
        self._slots, self._clock = Slots(step, list(range(step.slots))), clock
        self._step, self._rate = step, Rate(0.5, 2.0)
        self.pace = Pace()
        """Of the steps that draft."""
        self._row = Pace()
        """Of one row of the steps that catch up."""
        self.spent_s = 0.0
        """Seconds of all its steps."""

    def of(self, tokens: Sequence[int], salt: bytes) -> Drafted:
        """Return a new sequence; `salt` keeps apart what may not be shared.

        Each one counts as a draft of which nothing is known: what was wrong long ago is tried again.
        """
        self._rate.one(0.5)
        return Drafted(tokens, salt, self._slots, self._rate)

    def most(self, one: Drafted, most: int) -> int:
        """Return how many drafts a sequence may have, of so many: the last one's keys and values are not computed."""
        return max(0, min(most, self._step.context - len(one.tokens) + 1))

    def costs(self, rows: int) -> float:
        """Return the seconds in which it catches up with so many tokens; 0 where it has not lately."""
        return rows * self._row.seconds(1)

    def catch_up(self, ones: Sequence[Drafted]) -> None:
        """Compute what it has missed of sequences, but for the last token of each, as far as one step goes."""
        left, batch, going = CATCH_UP, list[Rows](), list[tuple[Drafted, int]]()
        for one, _ in self._fitting([(one, 0) for one in ones]):
            count = min(one.missing - 1, left)
            if count > 0:
                batch.append(_rows(one, count))
                going.append((one, count))
                left -= count
        if not batch:
            return
        self._row.took(1, self._timed(self._step.run, batch)[1] / (CATCH_UP - left))
        for one, count in going:
            one.computed += count

    def draft(self, asked: Sequence[tuple[Drafted, int]]) -> list[tuple[int, ...]]:
        """Return drafts of sequences that have none left, so many of each; none where it has no memory for them."""
        going = self._fitting(asked)
        for level in range(max((count for _, count in going), default=0)):
            going = [(one, count) for one, count in going if count > level]
            rows = [_ahead(one) if level else _rows(one, one.missing) for one, _ in going]
            outputs, seconds = self._timed(self._step.ahead if level else self._step.run, rows)
            self.pace.took(sum(len(each.tokens) for each in rows), seconds)
            for (one, _), output in zip(going, outputs, strict=True):
                one.computed, one.there = len(one.tokens), level
                one.made.append(output.token)
        return [tuple(one.made) for one, _ in asked]

    def passed(self) -> None:
        """Take a step of the other variant: what this one took long before is not believed for ever."""
        self.pace.passed()
        self._row.passed()

    def close(self) -> None:
        """Free what it holds on the device."""
        self._step.close()

    def _fitting(self, asked: Sequence[tuple[Drafted, int]]) -> list[tuple[Drafted, int]]:
        """Give sequences slots, and return those for whose tokens and drafts there is memory."""
        tables, taken, found = self._step.tables, 0, []
        for one, count in asked:
            one.begin()
            assert one.slot is not None
            grows = tables.takes(len(one.tokens) + max(0, count - 1)) - tables.held(one.slot)
            if taken + max(0, grows) <= tables.blocks.free:
                taken += max(0, grows)
                found.append((one, count))
            else:
                one.released()
        return found

    def _timed(
        self, run: Callable[[Sequence[Rows]], Sequence[Output]], rows: Sequence[Rows]
    ) -> tuple[Sequence[Output], float]:
        begun = self._clock()
        outputs = run(rows)
        seconds = self._clock() - begun
        self.spent_s += seconds
        return outputs, seconds


def _rows(one: Drafted, count: int) -> Rows:
    """Return the next tokens of a sequence that are to be computed."""
    assert one.slot is not None and count > 0
    return Rows(one.slot, tuple(one.tokens[one.computed : one.computed + count]), one.computed, False)


def _ahead(one: Drafted) -> Rows:
    """Return the last guess of a sequence, to be computed."""
    assert one.slot is not None
    return Rows(one.slot, (one.made[-1],), len(one.tokens) + len(one.made) - 1, False)
