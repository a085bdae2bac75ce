"""One answer: its tokens as they are generated, its text once it is final, and its finish reason."""

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
"""Finish reasons: an end token or a stop string, the requested number of tokens, or a full context."""

T = TypeVar("T")


@dataclass(frozen=True)
class Asked:
    """A prompt of token ids, and the options of its continuation."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling
    ends: tuple[int, ...] = ()
    """Tokens that end this answer, besides the model's end tokens."""

    @staticmethod
    def of(session: Session, name: str, prompt: object, max_new_tokens: object, sampling: Sampling | None) -> Asked:
        """Return the checked request; nothing runs on the device.

        Raises:
            InputError: `name` is not a prompt, is empty, has a token outside the vocabulary or does not fit.
        """
        tokens = session.prompt(name, prompt)
        most = checks.integer("max_new_tokens", max_new_tokens, 0)
        if not isinstance(sampling, Sampling | None):
            raise InputError(f"sampling is a {type(sampling).__name__}; it must be a `Sampling`")
        return Asked(tuple(tokens), most, sampling or Sampling())


def ended(session: Session, token: int, count: int, most: int, position: int, ends: Sequence[int] = ()) -> str | None:
    """Return the finish reason if an answer of `count` tokens ends with `token` at `position`; None if it continues.

    `ends` are end tokens of this answer, besides the model's.
    """
    if token in session.abi.eos_tokens or token in ends:
        return STOP
    if count >= most:
        return LENGTH
    return CONTEXT if position >= session.abi.context else None


class Stops:
    """Finds the first stop string in a text, and withholds a suffix that may begin one.

    The output does not depend on how the text is split into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False
        self.which = ""
        """The stop string that was found."""

    def push(self, text: str) -> str:
        """Take a piece and return the text that precedes any possible stop string."""
        if self.found:
            return ""
        self._held += text
        ends = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if ends:
            self.found = True
            end, at = min(ends)
            self.which = self._held[at:end]
            return self._held[:at]
        keep = max((overlap(self._held, stop) for stop in self._stops), default=0)
        certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return certain

    def end(self) -> str:
        """Return the withheld text: the text ended without a stop string."""
        return "" if self.found else self._held


class Text:
    """The text of an answer, token by token. End tokens are never text, even if not marked special."""

    def __init__(self, decoder: Decoder, ends: Sequence[int], stops: Sequence[str]) -> None:
        self._decoder, self._ends, self._stops = decoder, frozenset(ends), Stops(stops)

    @property
    def stopped(self) -> bool:
        """Return whether a stop string was found."""
        return self._stops.found

    @property
    def stop(self) -> str:
        """The stop string that was found; empty where none was."""
        return self._stops.which

    def push(self, token: int) -> str:
        """Take a token and return the text that is now final."""
        return "" if token in self._ends else self._stops.push(self._decoder.push(token))

    def end(self) -> str:
        """Return the withheld text."""
        if self.stopped:
            return ""
        return self._stops.push(self._decoder.end()) + self._stops.end()


@dataclass(frozen=True)
class Completion:
    """A complete answer; `tokens` includes an end token, `text` does not."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: str


class Reading:
    """Collects the text of an answer, and detects a stop string."""

    def __init__(self, decoder: Decoder, ends: Sequence[int], stops: Sequence[str]) -> None:
        self._text, self._pieces = Text(decoder, ends, stops), list[str]()

    def push(self, token: int) -> bool:
        """Take a token and return whether the answer has ended."""
        self._pieces.append(self._text.push(token))
        return self._text.stopped

    def whole(self, tokens: tuple[int, ...], finish_reason: str) -> Completion:
        """Return the complete answer."""
        text = "".join([*self._pieces, self._text.end()])
        return Completion(text, tokens, STOP if self._text.stopped else finish_reason)


def stop_strings(value: object) -> tuple[str, ...]:
    """Return the stop strings, given as one string or a list.

    Raises:
        InputError: not strings, or one is empty.
    """
    found = [checks.text("stop", value)] if isinstance(value, str) else checks.texts("stop", value)
    if "" in found:
        raise InputError("stop has an empty string: every text would end at once")
    return tuple(found)


@dataclass
class Ending:
    """The finish reason; None while the answer continues."""

    reason: str | None = None


class Answer(Iterator[T]):
    """An iterator over an answer. Its KV cache on the device is released when it ends or is closed."""

    def __init__(self, steps: Iterator[T], ending: Ending, prompt: Sequence[int], before: Sequence[str] = ()) -> None:
        self._steps, self._ending = steps, ending
        self.prompt, self.before = tuple(prompt), tuple(before)
        """The prompt's tokens, and the names of the tokens that precede the given text."""

    @property
    def finish_reason(self) -> str | None:
        """`stop`, `length` or `context` once the answer has ended, else None."""
        return self._ending.reason

    def __iter__(self) -> Answer[T]:
        return self

    def __next__(self) -> T:
        return next(self._steps)

    def close(self) -> None:
        """End the answer now."""
        self._steps.close()  # type: ignore[attr-defined]

    def __enter__(self) -> Answer[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def tokens(session: Session, turn: Lock, asked: Asked) -> Answer[int]:
    """Yield the tokens of an answer. Each step holds `turn`: answers may be interleaved, also across threads."""
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
            ending.reason = ended(session, token, count, asked.max_new_tokens, position, asked.ends)
            yield token
            if ending.reason:
                return
            with turn:
                token = choose(session.decode(token, position, cache=cache))
            position, count = position + 1, count + 1


def pieces(answer: Answer[int], text: Text, before: Sequence[str] = ()) -> Answer[str]:
    """Yield the text of an answer, each piece once it is final; no piece is empty."""
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
    """Return the function that maps the device's greedy token to the token to take."""
    if sampling.greedy:
        return lambda greedy: greedy
    sampler = Sampler(sampling)
    return lambda _: sampler.choose(session.peek())
