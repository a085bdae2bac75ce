"""One answer: its tokens as they are made, its text as it becomes certain, and why it ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import TypeVar

from llmbuild.errors import InputError
from llmbuild.runtime import checks
from llmbuild.runtime.detokenize import Decoder, overlap
from llmbuild.runtime.sampling import Sampler, Sampling
from llmbuild.runtime.session import Session

STOP, LENGTH, CONTEXT = "stop", "length", "context"
"""Why an answer ended: an end token or a stop string, as many tokens as were asked for, or a full context."""

T = TypeVar("T")


@dataclass(frozen=True)
class Asked:
    """A prompt of token ids, and how it is to be continued."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling

    @staticmethod
    def of(session: Session, name: str, prompt: object, max_new_tokens: object, sampling: Sampling | None) -> Asked:
        """Return what was asked, checked against what the artifact takes; nothing has run.

        Raises:
            InputError: what `name` holds is no prompt, is empty, has a token outside the vocabulary or does not fit.
        """
        tokens = session.prompt(name, prompt)
        most = checks.integer("max_new_tokens", max_new_tokens, 0)
        if not isinstance(sampling, Sampling | None):
            raise InputError(f"sampling is a {type(sampling).__name__}; it must be a `Sampling`")
        return Asked(tuple(tokens), most, sampling or Sampling())


def ended(session: Session, token: int, count: int, most: int, position: int) -> str | None:
    """Return why an answer of `count` tokens ends with `token`, whose place would be `position`; None if it goes on."""
    if token in session.abi.eos_tokens:
        return STOP
    if count >= most:
        return LENGTH
    return CONTEXT if position >= session.abi.context else None


class Stops:
    """Finds the stop string that a text comes to first, and holds back what may be the beginning of one.

    What is given is the same for every split of the text into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Take a piece and return the text that is certainly before any stop string."""
        if self.found:
            return ""
        self._held += text
        ends = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if ends:
            self.found = True
            return self._held[: min(ends)[1]]
        keep = max((overlap(self._held, stop) for stop in self._stops), default=0)
        certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return certain

    def end(self) -> str:
        """Return what was held back, for the text has ended without a stop string."""
        return "" if self.found else self._held


class Text:
    """The text of an answer, token by token. End tokens are no text, whether the tokenizer marks them or not."""

    def __init__(self, decoder: Decoder, ends: Sequence[int], stops: Sequence[str]) -> None:
        self._decoder, self._ends, self._stops = decoder, frozenset(ends), Stops(stops)

    @property
    def stopped(self) -> bool:
        """Say whether a stop string was found."""
        return self._stops.found

    def push(self, token: int) -> str:
        """Take a token and return the text that is certain now."""
        return "" if token in self._ends else self._stops.push(self._decoder.push(token))

    def end(self) -> str:
        """Return what was held back."""
        if self.stopped:
            return ""
        return self._stops.push(self._decoder.end()) + self._stops.end()


@dataclass(frozen=True)
class Completion:
    """A whole answer; `tokens` has an end token too, `text` has none."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: str


class Reading:
    """Gathers the text of an answer, and says when a stop string ends it."""

    def __init__(self, decoder: Decoder, ends: Sequence[int], stops: Sequence[str]) -> None:
        self._text, self._pieces = Text(decoder, ends, stops), list[str]()

    def push(self, token: int) -> bool:
        """Take a token and say whether the answer is over."""
        self._pieces.append(self._text.push(token))
        return self._text.stopped

    def whole(self, tokens: tuple[int, ...], finish_reason: str) -> Completion:
        """Return the answer, for it is over."""
        text = "".join([*self._pieces, self._text.end()])
        return Completion(text, tokens, STOP if self._text.stopped else finish_reason)


def stop_strings(value: object) -> tuple[str, ...]:
    """Return stop strings: one, or a list of them.

    Raises:
        InputError: they are none, or one is empty.
    """
    found = [checks.text("stop", value)] if isinstance(value, str) else checks.texts("stop", value)
    if "" in found:
        raise InputError("stop has an empty string: every text would end at once")
    return tuple(found)


@dataclass
class Ending:
    """Why an answer ended; None while it goes on."""

    reason: str | None = None


class Answer(Iterator[T]):
    """What an answer yields, one after another. Its place on the device is given back when it ends or is closed."""

    def __init__(self, steps: Iterator[T], ending: Ending, prompt: Sequence[int], before: Sequence[str] = ()) -> None:
        self._steps, self._ending = steps, ending
        self.prompt, self.before = tuple(prompt), tuple(before)
        """The tokens that are continued, and the names of those that stand before the text that was given."""

    @property
    def finish_reason(self) -> str | None:
        """`stop`, `length` or `context` once the answer is over, else None."""
        return self._ending.reason

    def __iter__(self) -> Answer[T]:
        return self

    def __next__(self) -> T:
        return next(self._steps)

    def close(self) -> None:
        """End the answer here."""
        self._steps.close()  # type: ignore[attr-defined]

    def __enter__(self) -> Answer[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def tokens(session: Session, turn: Lock, asked: Asked) -> Answer[int]:
    """Return the tokens of an answer. `turn` is held for each step: answers may be read in turns, also by threads."""
    ending = Ending()
    return Answer(_tokens(session, turn, asked, ending), ending, asked.prompt)


def _tokens(session: Session, turn: Lock, asked: Asked, ending: Ending) -> Iterator[int]:
    if asked.max_new_tokens == 0:
        ending.reason = LENGTH
        return
    choose, position, count = _chooser(session, asked.sampling), len(asked.prompt), 1
    with session.cache() as cache:
        with turn:
            token = choose(session.prefill(asked.prompt, cache=cache))
        while True:
            ending.reason = ended(session, token, count, asked.max_new_tokens, position)
            yield token
            if ending.reason:
                return
            with turn:
                token = choose(session.decode(token, position, cache=cache))
            position, count = position + 1, count + 1


def pieces(answer: Answer[int], text: Text, before: Sequence[str] = ()) -> Answer[str]:
    """Return the text of an answer, each piece as soon as it is certain; no piece is empty."""
    ending = Ending()
    return Answer(_pieces(answer, text, ending), ending, answer.prompt, before)


def _pieces(answer: Answer[int], text: Text, ending: Ending) -> Iterator[str]:
    with answer:
        for token in answer:
            if piece := text.push(token):
                yield piece
            if text.stopped:
                ending.reason = STOP
                return
        if piece := text.end():
            yield piece
        ending.reason = STOP if text.stopped else answer.finish_reason


def _chooser(session: Session, sampling: Sampling) -> Callable[[int], int]:
    """Return what turns the device's greedy token into the one to take."""
    if sampling.greedy:
        return lambda greedy: greedy
    sampler = Sampler(sampling)
    return lambda _: sampler.choose(session.peek())
