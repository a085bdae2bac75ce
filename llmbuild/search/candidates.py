"""Candidate points: all of a small space, a sample of a large one. A large space is never enumerated."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Iterator
from itertools import islice

from llmbuild.spec.space import Point, Space, Value

LISTED = 4096
"""Maximum number of points of a space that is enumerated."""

DRAWN = 1500
"""Number of points drawn from a larger space per ask."""


def draw(space: Space, source: random.Random) -> Point:
    """Return a point: a value for each active knob, uniformly drawn."""
    chosen: dict[str, Value] = {}
    for knob in space.knobs:
        chosen[knob.name] = source.choice(knob.domain) if space.active(knob, chosen) else knob.default
    return Point.of(chosen)


def neighbours(space: Space, point: Point) -> Iterator[Point]:
    """Yield the points that differ in the value of one knob, and in the knobs that depend on it."""
    values = point.as_dict()
    for knob in space.knobs:
        if space.active(knob, values):
            for value in knob.domain:
                if value != values[knob.name]:
                    other = space.complete({**values, knob.name: value})
                    if space.contains(other):
                        yield other


class Candidates:
    """The unevaluated points of a space."""

    def __init__(self, space: Space, source: random.Random) -> None:
        self.space, self.source = space, source
        listed = list(islice(space.points(), LISTED + 1))
        self.all = listed if len(listed) <= LISTED else None

    def unknown(self, known: Collection[Point], near: Iterable[Point]) -> list[Point]:
        """Return every unevaluated point, or of a large space a sample and the neighbours of the points `near`."""
        if self.all is not None:
            return [p for p in self.all if p not in known]
        drawn = [draw(self.space, self.source) for _ in range(DRAWN)]
        around = [n for p in near for n in neighbours(self.space, p)]
        return [p for p in dict.fromkeys([*around, *drawn]) if p not in known]

    def any(self, known: Collection[Point]) -> Point | None:
        """Return a random unevaluated point; None when there is none."""
        if self.all is not None:
            left = [p for p in self.all if p not in known]
            return self.source.choice(left) if left else None
        for _ in range(100):
            point = draw(self.space, self.source)
            if point not in known:
                return point
        return next((p for p in self.space.points() if p not in known), None)
