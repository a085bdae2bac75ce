"""Joules and slot-seconds by what they were spent on; every slot of a node that is on is in one state at a time."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Literal

from llmbuild.spec.tariff import KWH_J, Series, Tariff

Use = Literal["host", "bare", "boot", "change", "load", "parked", "decode", "prompt"]
USES: tuple[Use, ...] = ("host", "bare", "boot", "change", "load", "parked", "decode", "prompt")
"""What energy is spent on: hosts, empty slots, nodes that boot or take another layout; replicas that load, wait, decode
and compute prompts."""


@dataclass
class Meter:
    """Sums by use. `seconds` of hosts are node-seconds, all others slot-seconds."""

    tariff: Tariff | None = None
    joules: dict[Use, float] = field(default_factory=lambda: dict.fromkeys(USES, 0.0))
    seconds: dict[Use, float] = field(default_factory=lambda: dict.fromkeys(USES, 0.0))
    grams: float = 0.0
    """CO2 equivalent, where the tariff knows it."""
    money: float = 0.0
    """What the energy costs, where the tariff knows it."""
    every_s: float = 0.0
    """Seconds of the intervals by which joules are told; 0: they are not."""
    drawn: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))
    """Joules by number of the interval."""

    def add(self, use: Use, begin_s: float, seconds: float, watts: float, slots: int = 1) -> None:
        """Add a time at a power, that of each slot."""
        self.joules[use] += seconds * watts * slots
        self.seconds[use] += seconds * slots
        if self.every_s:
            self._spread(begin_s, begin_s + seconds, watts * slots)
        if self.tariff is not None:
            self.grams += watts * slots * self._times(self.tariff.carbon, begin_s, seconds)
            self.money += watts * slots * self._times(self.tariff.price, begin_s, seconds)

    def _spread(self, begin_s: float, end_s: float, watts: float) -> None:
        """Add a time at a power to the intervals that it is in."""
        number = int(begin_s // self.every_s)
        while begin_s < end_s:
            until = min(end_s, (number + 1) * self.every_s)
            self.drawn[number] += (until - begin_s) * watts
            begin_s, number = until, number + 1

    def _times(self, factor: Series | None, begin_s: float, seconds: float) -> float:
        """Return a factor for each joule, times the seconds."""
        if factor is None or self.tariff is None:
            return 0.0
        begin_s += self.tariff.begins_s
        return factor.integral(begin_s, begin_s + seconds) / KWH_J

    @property
    def total(self) -> float:
        """Return all joules."""
        return sum(self.joules.values())

    @property
    def idle(self) -> float:
        """Return the joules that no token came from."""
        return self.total - self.joules["decode"] - self.joules["prompt"]
