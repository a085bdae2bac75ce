"""The choices: a knob, the space of all knobs, and a point in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Value = str | int | bool
Level = Literal["model", "codegen", "runtime"]

TUNING, UNTUNED = "tuning", "none"
"""The knob whose other values name configurations in a catalog, and its default."""
MATVEC, AUTO = "matvec", "auto"
"""The knob that divides matrix-vector products on GPUs, and its default."""
WRITTEN = {TUNING: UNTUNED, MATVEC: AUTO}
"""Knobs without a flag: they are written into the front half. And their defaults."""


@dataclass(frozen=True)
class Condition:
    """A knob is active only where `knob` has one of `values`; elsewhere it keeps its default."""

    knob: str
    values: tuple[Value, ...]


@dataclass(frozen=True)
class Knob:
    """A named choice. `default` is the compiler's behaviour without a choice.

    `level` is the cost of a change: an import and a compile (model), a compile (codegen), nothing (runtime).
    `backends` are the knob's backends; `features` the CPU features that each value needs. `searched` is the part of
    the domain that a search uses by default; all of it when empty.
    """

    name: str
    level: Level
    domain: tuple[Value, ...]
    default: Value
    meaning: str
    when: tuple[Condition, ...] = ()
    backends: tuple[str, ...] = ()
    features: tuple[tuple[Value, tuple[str, ...]], ...] = ()
    searched: tuple[Value, ...] = ()


@dataclass(frozen=True)
class Point:
    """One value for each knob, sorted by name; the order of creation does not matter."""

    values: tuple[tuple[str, Value], ...]

    @staticmethod
    def of(values: Mapping[str, Value]) -> Point:
        """Return the point with these values."""
        return Point(tuple(sorted(values.items())))

    def as_dict(self) -> dict[str, Value]:
        """Return the values by knob name."""
        return dict(self.values)

    def __getitem__(self, knob: str) -> Value:
        return dict(self.values)[knob]


@dataclass(frozen=True)
class Space:
    """All knobs of one build, in the order of selection: a condition names an earlier knob."""

    knobs: tuple[Knob, ...]

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for knob in self.knobs:
            missing = [c.knob for c in knob.when if c.knob not in seen]
            if missing:
                raise ValueError(f"knob {knob.name} depends on {missing}, which does not come before it")
            seen.add(knob.name)

    def default(self) -> Point:
        """Return point 0, the compiler's defaults, even where the domains exclude them."""
        return Point.of({k.name: k.default for k in self.knobs})

    def active(self, knob: Knob, values: Mapping[str, Value]) -> bool:
        """Return whether `knob` is active, given the values of the knobs before it."""
        return not knob.when or all(values[c.knob] in c.values for c in knob.when)

    def complete(self, values: Mapping[str, Value]) -> Point:
        """Return the point with these values; a knob that is missing or not active takes its default."""
        done: dict[str, Value] = {}
        for knob in self.knobs:
            chosen = values.get(knob.name, knob.default)
            done[knob.name] = chosen if self.active(knob, done) else knob.default
        return Point.of(done)

    def level(self, point: Point, *levels: Level) -> dict[str, Value]:
        """Return the part of `point` that belongs to these levels."""
        names = {k.name for k in self.knobs if k.level in levels}
        return {name: value for name, value in point.values if name in names}

    def contains(self, point: Point) -> bool:
        """Return whether the space contains `point`, without an enumeration."""
        values = point.as_dict()
        if values.keys() != self._names:
            return False
        return all(
            values[k.name] in k.domain if self.active(k, values) else values[k.name] == k.default for k in self.knobs
        )

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(k.name for k in self.knobs)

    def points(self) -> Iterator[Point]:
        """Yield every distinct point of the space, in no particular order."""
        yield from map(Point.of, self._from(0, {}))

    def _from(self, index: int, chosen: dict[str, Value]) -> Iterator[dict[str, Value]]:
        """Yield every completion of the values of the knobs before `index`."""
        if index == len(self.knobs):
            yield chosen
            return
        knob = self.knobs[index]
        for value in knob.domain if self.active(knob, chosen) else (knob.default,):
            yield from self._from(index + 1, {**chosen, knob.name: value})

    def size(self) -> int:
        """Return the number of distinct points."""
        return sum(1 for _ in self.points())
