"""Joules and slot-seconds by what they were spent on; every slot of a node that is on is in one state at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Use = Literal["host", "bare", "boot", "change", "load", "parked", "decode", "prompt"]
USES: tuple[Use, ...] = ("host", "bare", "boot", "change", "load", "parked", "decode", "prompt")
"""What energy is spent on: hosts, empty slots, nodes that boot or take another layout; replicas that load, wait, decode
and compute prompts."""


@dataclass
class Meter:
    """Sums by use. `seconds` of hosts are node-seconds, all others slot-seconds."""

    joules: dict[Use, float] = field(default_factory=lambda: dict.fromkeys(USES, 0.0))
    seconds: dict[Use, float] = field(default_factory=lambda: dict.fromkeys(USES, 0.0))

    def add(self, use: Use, seconds: float, watts: float) -> None:
        """Add a time at a power."""
        self.joules[use] += seconds * watts
        self.seconds[use] += seconds

    @property
    def total(self) -> float:
        """Return all joules."""
        return sum(self.joules.values())

    @property
    def idle(self) -> float:
        """Return the joules that no token came from."""
        return self.total - self.joules["decode"] - self.joules["prompt"]
