"""Progress on stderr during a build: one line for each step that ends, suitable for a log file."""

from __future__ import annotations

import sys
from time import monotonic
from typing import TextIO

from llmbuild.build.events import Event
from llmbuild.system.terminal import clear_line, replace_line


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
        if event.step not in ("prefetch", "done", "front", "note", "skip") and self.live:
            self._replace(f"{clock} {count} {event.step} {event.text} ...")
            return
        if event.step in ("import", "compile", "profile"):
            return
        took = f" {event.seconds:.1f}s" if event.seconds is not None else ""
        best = f"  best so far: {event.best}" if event.best else ""
        self._line(f"{clock} {count} {event.step}{took}  {event.text}{best}")

    def say(self, text: str) -> None:
        """Print a line of text."""
        self._line(text)

    def _replace(self, text: str) -> None:
        replace_line(self.stream, text)

    def _line(self, text: str) -> None:
        clear_line()
        self.stream.write(text + "\n")
        self.stream.flush()
