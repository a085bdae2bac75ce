"""Progress events of a build, and the clock that tells the steps of a trial apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

Parts = tuple[tuple[str, float], ...]
"""Steps with their seconds, in the order in which they began."""


@dataclass(frozen=True)
class Event:
    """A progress event: the step, its object, progress, duration, and the best value so far.

    A trial's steps are `import`, `compile`, `reference` and `limits` (once), `check` (opening, numerics, quality) and
    `measure` (rounds); `rounds` are those of the race. `parts` are the steps of what is done, `left_s` the expected
    seconds until the build ends.
    """

    step: str
    text: str
    done: int = 0
    total: int = 0
    seconds: float | None = None
    best: str = ""
    parts: Parts = ()
    left_s: float | None = None


Tell = Callable[[Event], None]


class Stopwatch:
    """Seconds of the steps of a trial: a step lasts until another one begins, and may be taken up again."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock, self._seconds = clock, dict[str, float]()
        self._step, self._since = "", clock()

    def begin(self, step: str) -> None:
        """Begin a step, or go on with it."""
        self.stop()
        self._step = step
        self._seconds.setdefault(step, 0.0)

    def stop(self) -> None:
        """End the present step: what follows is part of none."""
        now = self._clock()
        if self._step:
            self._seconds[self._step] += now - self._since
        self._step, self._since = "", now

    @property
    def parts(self) -> Parts:
        """The steps so far."""
        return tuple(self._seconds.items())
