"""From the engine's thread to the tasks of an event loop: the events of one HTTP request, numbered by choice."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from time import monotonic

from llmbuild.serve.api.asked import Asked
from llmbuild.serve.events import Delta, Ended, Event

Numbered = tuple[int, Event]
_IDLE = 4
"""Times that a timer finds nothing before it ends."""


class Answers:
    """The events of a request's answers; how many can be there is bounded by the tokens that were asked for."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._first = dict[str, int]()
        at = 0
        for one in asked.requests:
            self._first[one.id] = at
            at += one.params.n
        self._left = at
        self._events: list[Numbered] = []
        self._woken: asyncio.Future[None] | None = None
        """What the reader waits for, while it does: an event and a task of their own would cost more than a chunk."""
        self.completion_tokens = self.cached_tokens = 0

    @property
    def open(self) -> bool:
        """Whether an answer has not ended yet, as far as its reader knows."""
        return self._left > 0

    def put(self, event: Event) -> None:
        """Take an event, in the event loop."""
        self._events.append((self._first[event.request] + event.index, event))
        self._wake()

    async def some(self, most_s: float | None = None) -> list[Numbered]:
        """Return what has come since the last time, once there is something; nothing where it takes too many seconds.

        For one reader, while an answer is open.
        """
        if not self._events:
            loop = asyncio.get_running_loop()
            self._woken = loop.create_future()
            timer = None if most_s is None else loop.call_later(most_s, self._wake)
            try:
                await self._woken
            finally:
                self._woken = None
                if timer is not None:
                    timer.cancel()
        events, self._events = self._events, []
        for _, event in events:
            self._left -= isinstance(event, Ended) or event.finish is not None
            if isinstance(event, Delta):
                self.completion_tokens += 1
                self.cached_tokens += event.cached if event.index == 0 else 0  # a prompt is counted once
        return events

    def _wake(self) -> None:
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(None)


class Bridge:
    """Hands events to those who wait for them; what nobody waits for any more is dropped.

    A small model makes tokens faster than anybody reads them, and each time that the event loop is woken, and each
    chunk, costs as much as such a token. So while tokens come, a timer of the event loop hands on what has come every
    `interval_s` seconds, and an engine wakes nobody. First tokens of requests and ends are handed on at once.
    """

    def __init__(self, post: Callable[[Callable[[], None]], object], interval_s: float = 0.0) -> None:
        """Take the event loop's `call_soon_threadsafe`, and the seconds for which events may be held."""
        self._post, self._interval_s = post, interval_s
        self._waiting: dict[str, Answers] = {}
        self._lock = Lock()
        """Of the events that are held, and of whether the timer goes; the rest is the event loop's."""
        self._held: list[Event] = []
        self._timed = not interval_s
        """Whether the timer goes. Without an interval there is none, and everything is handed on at once."""
        self._handed_s = -math.inf
        self._idle = 0
        """Times that the timer found nothing since it found something."""

    def outlet(self, events: Sequence[Event]) -> None:
        """Take the events of a turn, in an engine's thread."""
        urgent = not self._interval_s or any(map(self._urgent, events))
        with self._lock:
            self._held += events
            begin, self._timed = not self._timed, True
        if urgent:
            self._post(self._hand_on)
        if begin:
            self._post(self._begin)

    def _urgent(self, event: Event) -> bool:
        if isinstance(event, Ended) or event.finish is not None:
            return True
        answers = self._waiting.get(event.request)
        return answers is not None and not answers.completion_tokens

    def _hand_on(self) -> None:
        """Deliver what is held, in the event loop."""
        with self._lock:
            events, self._held = self._held, []
        self._handed_s = monotonic()
        self._deliver(events)

    def _begin(self) -> None:
        """Hand on what came after a pause, and start the timer."""
        if monotonic() - self._handed_s >= self._interval_s:
            self._hand_on()
        self._idle = 0
        asyncio.get_running_loop().call_later(self._interval_s, self._due)

    def _due(self) -> None:
        """Hand on what has come, and go on for some times after the last."""
        with self._lock:
            self._idle = 0 if self._held else self._idle + 1
            self._timed = self._idle < _IDLE
        if not self._idle:
            self._hand_on()
        if self._timed:
            asyncio.get_running_loop().call_later(self._interval_s, self._due)

    @contextmanager
    def submitted(self, asked: Asked) -> Iterator[Answers]:
        """Submit requests to their engine, all or none; those that have not ended are cancelled at the exit.

        Raises:
            RequestRefused, QueueFull, Unavailable: as the engine's `submit`.
        """
        answers, engine = Answers(asked), asked.served.engine
        begun = []
        try:
            for one in asked.requests:
                self._waiting[one.id] = answers
                begun.append(one.id)
                engine.submit(one)
            yield answers
        finally:
            for name in begun:
                del self._waiting[name]
                if answers.open:
                    engine.cancel(name)

    def _deliver(self, events: Sequence[Event]) -> None:
        for event in events:
            answers = self._waiting.get(event.request)
            if answers is not None:
                answers.put(event)
