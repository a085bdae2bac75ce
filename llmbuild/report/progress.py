"""Progress on stderr during a build: one line for each step that ends, suitable for a log file."""

from __future__ import annotations

import sys
from time import monotonic
from typing import TextIO

from llmbuild.build.events import Event
from llmbuild.build.price import duration
from llmbuild.system.terminal import clear_line, replace_line

ENDED = ("prefetch", "done", "front", "note", "skip")
"""Events that have a line of their own everywhere."""

RUNNING = ("import", "chats", "compile", "reference", "limits", "check", "measure", "rounds", "profile")
"""Events that a log has no line for: they are part of what ends later."""

LEAST_S = 0.05
"""Seconds of a step below which its time is not told: it was known, or nothing had to be done."""


class Progress:
    """Prints events; on a terminal, the running step is shown on a line that the next one replaces."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self.begin = monotonic()

    def __call__(self, event: Event) -> None:
        """Print one event."""
        clock = f"{monotonic() - self.begin:6.1f}s"
        count = f"[{event.done}/{event.total}]" if event.total else ""
        left = f"some {duration(event.left_s)} left" if event.left_s else ""
        if event.step not in ENDED and self.live:
            # what is left comes before the point, which may be cut off
            self._replace(" ".join(t for t in (clock, count, event.step, left and f"({left})", event.text, "...") if t))
            return
        if event.step in RUNNING:
            return
        took = f" {event.seconds:.1f}s" if event.seconds is not None else ""
        parts = " ".join(f"{name} {seconds:.1f}s" for name, seconds in event.parts if seconds >= LEAST_S)
        more = [f"best so far: {event.best}" if event.best else "", left]
        told = "".join(f"  {text}" for text in (f"({parts})" if parts else "", event.text, *more) if text)
        self._line(f"{clock} {count} {event.step}{took}{told}")

    def say(self, text: str) -> None:
        """Print a line of text."""
        self._line(text)

    def _replace(self, text: str) -> None:
        replace_line(self.stream, text)

    def _line(self, text: str) -> None:
        clear_line()
        self.stream.write(text + "\n")
        self.stream.flush()
