"""One continuation of a prompt, from the queue to its last token."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmbuild.runtime.answers import Text
from llmbuild.serve.blocks import Names
from llmbuild.serve.choose import Chooser
from llmbuild.serve.events import Delta, Finish
from llmbuild.serve.guesses import Guesses
from llmbuild.serve.request import Request
from llmbuild.serve.schedule.state import Entry
from llmbuild.serve.step import Output, Rows


@dataclass(eq=False)
class Sequence:
    """A sequence and its state: it waits without a slot, runs with one, and has ended once `ended` is set.

    One that is preempted waits again, with the tokens that it has: they are computed again, and none is chosen again.
    """

    request: Request
    index: int
    """Which of the request's choices it is."""
    text: Text
    chooser: Chooser
    ends: frozenset[int]
    arrival_s: float
    deadline_s: float
    names: Names = ()
    """By what the beginning of its prompt, and of its answer so far, is known."""
    most: int = 0
    """Parts of the device's memory that it takes at most."""
    takes: int = 0
    """Parts that it is to find free when it is admitted."""
    number: int = 0
    """Its place in the order of arrivals."""
    slot: int | None = None
    computed: int = 0
    """Tokens whose keys and values are in the slot; while it waits, those that would be there at once."""
    cached: int = 0
    """Tokens of the prompt that were there when it was first admitted."""
    tokens: list[int] = field(default_factory=list)
    predicted: float | None = None
    """How many tokens it is expected to have, where answers before it tell."""
    guesses: Guesses | None = None
    """What guesses its next tokens, where they are."""
    ended: bool = False
    admitted_s: float | None = None
    """When it was first admitted."""
    first_s: float = 0.0
    last_s: float = 0.0

    @property
    def order(self) -> tuple[int, int]:
        """Its place among those that wait: by priority, then by arrival."""
        return self.request.priority, self.number

    @property
    def pending(self) -> int:
        """Tokens that are not computed yet: the last one at least."""
        return len(self.request.prompt) + len(self.tokens) - self.computed

    @property
    def decoding(self) -> bool:
        """Whether it runs, and all but its last token is computed."""
        return self.slot is not None and bool(self.tokens) and self.pending == 1

    @property
    def so_far(self) -> tuple[int, ...]:
        """The tokens of its prompt and its answer."""
        return (*self.request.prompt, *self.tokens)

    def entry(self) -> Entry:
        """Return what a scheduler sees. An answer of which nothing is known is expected to be as long as it may be."""
        most = self.request.params.max_tokens
        return Entry(
            self.number,
            self.pending,
            self.decoding,
            self.arrival_s,
            self.computed,
            len(self.tokens),
            len(self.request.prompt),
            self.request.tenant,
            self.request.priority,
            self.request.ttft_s,
            self.request.tpot_s,
            float(most) if self.predicted is None and most is not None else self.predicted,
            self.takes,
        )

    def most_drafts(self, context: int) -> int:
        """Return how many drafts its next step may have: no token behind its last one is computed."""
        most, room = self.request.params.max_tokens, context - self.computed - self.pending
        return max(0, room if most is None else min(room, most - len(self.tokens) - 1))

    def left(self, context: int) -> float:
        """Return how many tokens it is expected to have still: all that it may have, where nothing else is known."""
        most = float(self.most_drafts(context) + 1)
        return most if self.predicted is None else min(most, max(1.0, self.predicted - len(self.tokens)))

    def rows(self, count: int, drafts: tuple[int, ...] = ()) -> Rows:
        """Return the next `count` tokens to compute, and drafts behind them."""
        assert self.slot is not None
        start, prompt = self.computed, self.request.prompt
        first, end = start - len(prompt), start - len(prompt) + count
        tokens: tuple[int, ...] | list[int] = prompt[start : start + count] if first < 0 else self.tokens[first:end]
        if first < 0 < end:  # a preempted sequence computes its prompt and its answer again
            tokens = (*tokens, *self.tokens[:end])
        last = count == self.pending
        return Rows(self.slot, tokens, start, last and self.chooser.reads, drafts)

    def take(self, output: Output, context: int) -> Delta:
        """Take what the device says behind the last token: choose the next one and make text of it.

        Raises:
            InputError: nothing can be chosen.
        """
        token, logprob = self.chooser.choose(output)
        self.tokens.append(token)
        if self.guesses is not None:
            self.guesses.add(token)
        text = self.text.push(token)
        finish = self._finish(token, context)
        if finish is not None:
            text += self.text.end()
            if self.text.stopped:  # the held text that the end makes final may have one too
                finish = Finish("stop", self.text.stop)
        cached = self.cached if len(self.tokens) == 1 else 0
        return Delta(self.request.id, self.index, token, text, logprob, finish, cached)

    def _finish(self, token: int, context: int) -> Finish | None:
        params = self.request.params
        if self.text.stopped:
            return Finish("stop", self.text.stop)
        if token in self.ends:
            return Finish("stop", token if token in params.stop_tokens else None)
        full = len(self.request.prompt) + len(self.tokens) > context
        over = params.max_tokens is not None and len(self.tokens) >= params.max_tokens
        return Finish("length") if full or over else None
