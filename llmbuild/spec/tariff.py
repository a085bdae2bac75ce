"""What a kilowatt-hour costs and emits by the hour of the day: factors on energy, never a part of it."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmbuild.spec.fleet import Basis

DAY_S = 86400.0
KWH_J = 3.6e6
"""Joules of a kilowatt-hour."""


@dataclass(frozen=True)
class Series:
    """Values that hold from an hour of the day on, up to the next one; every day is alike."""

    hours: tuple[float, ...]
    """Increasing, from 0."""
    values: tuple[float, ...]

    def at(self, second: float) -> float:
        """Return the value at a second since midnight of some day."""
        return self.values[bisect_right(self.hours, second % DAY_S / 3600) - 1]

    def integral(self, begin_s: float, end_s: float) -> float:
        """Return the integral over seconds since midnight of some day, in value-seconds."""
        return self._until(end_s) - self._until(begin_s)

    @property
    def mean(self) -> float:
        """Return the mean of a day."""
        return self._until(DAY_S) / DAY_S

    def _until(self, second: float) -> float:
        """Return the integral from midnight of the first day."""
        days, rest = divmod(second, DAY_S)
        whole = sum(self._parts(DAY_S)) if days else 0.0
        return days * whole + sum(self._parts(rest))

    def _parts(self, second: float) -> list[float]:
        ends = (*self.hours[1:], 24.0)
        return [
            value * max(0.0, min(second, end * 3600) - hour * 3600)
            for hour, end, value in zip(self.hours, ends, self.values, strict=True)
        ]


@dataclass(frozen=True)
class Tariff:
    """Grams of CO2 equivalent and money for a kilowatt-hour, where each is known."""

    carbon: Series | None
    price: Series | None
    begins_s: float
    """Second of the day at which a trace begins."""
    basis: Basis
    source: str
