"""What a build tells a person while it goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """Something to tell a person: which step, about what, how far, how long, and the best so far."""

    step: str
    text: str
    done: int = 0
    total: int = 0
    seconds: float | None = None
    best: str = ""


Tell = Callable[[Event], None]
