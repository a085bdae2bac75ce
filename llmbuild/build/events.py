"""Progress events of a build."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """A progress event: the step, its object, progress, duration, and the best value so far."""

    step: str
    text: str
    done: int = 0
    total: int = 0
    seconds: float | None = None
    best: str = ""


Tell = Callable[[Event], None]
