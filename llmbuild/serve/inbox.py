"""What other threads say to the engine: requests and cancellations, with the bound of the queue."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from threading import Condition
from typing import Literal

from llmbuild.serve.errors import QueueFull, RequestRefused, Unavailable
from llmbuild.serve.sequence import Sequence

Phase = Literal["open", "draining", "closed"]


@dataclass
class Inbox:
    """The only state that threads share; all of it is read and written under `changed`."""

    most: int
    """Sequences that may wait."""
    changed: Condition = field(default_factory=Condition)
    phase: Phase = "open"
    fault: str = ""
    arrivals: deque[Sequence] = field(default_factory=deque)
    cancelled: deque[str] = field(default_factory=deque)
    queued: int = 0
    """Sequences that arrived, and neither have a slot now nor have ended."""
    alive: int = 0
    """Sequences that arrived and have not ended."""
    busy_s: float = 0.0
    """When the last one arrived that found no other."""
    sequence_s: float = 0.0
    """A moving mean of the seconds between two ends, for the advice when to ask again."""

    def put(self, sequences: list[Sequence]) -> None:
        """Take the sequences of a request, all or none.

        Raises:
            RequestRefused, QueueFull, Unavailable: it is not taken.
        """
        count = len(sequences)
        with self.changed:
            if self.fault:
                raise Unavailable(f"the engine has failed: {self.fault}")
            if self.phase != "open":
                raise Unavailable("the server is shutting down")
            if count > self.most:
                raise RequestRefused(f"n is {count}; at most {self.most} sequences may wait", "n")
            if self.queued + count > self.most:
                told = f"{self.queued} sequences wait, and no more than {self.most} may"
                raise QueueFull(told, min(60, max(1, math.ceil(self.queued * self.sequence_s))))
            if not self.alive:
                self.busy_s = sequences[0].arrival_s
            self.queued += count
            self.alive += count
            self.arrivals.extend(sequences)
            self.changed.notify_all()

    def cancel(self, request: str) -> None:
        """Take a cancellation; one of a request that has ended does nothing."""
        with self.changed:
            self.cancelled.append(request)
            self.changed.notify_all()

    def taken(self) -> tuple[list[Sequence], list[str]]:
        """Return what came since the last call."""
        with self.changed:
            found = list(self.arrivals), list(self.cancelled)
            self.arrivals.clear()
            self.cancelled.clear()
            return found

    def admitted(self, count: int) -> None:
        """Note that sequences of the queue have slots now."""
        with self.changed:
            self.queued -= count

    def preempted(self) -> None:
        """Note that a sequence has no slot any more, and waits again."""
        with self.changed:
            self.queued += 1

    def ended(self, queued: int, running: int, each_s: float) -> None:
        """Note that sequences have ended, of the queue and of the slots, `each_s` seconds after those before."""
        with self.changed:
            self.queued -= queued
            self.alive -= queued + running
            self.sequence_s += (each_s - self.sequence_s) / 8
            self.changed.notify_all()

    def set(self, phase: Phase, fault: str = "") -> None:
        """Take no more requests."""
        with self.changed:
            self.phase, self.fault = phase, fault or self.fault
            self.changed.notify_all()
