"""Energy counters. Absent is absent: a reading is None with a reason, never 0, and nothing is modelled here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Zone:
    """One RAPL package: its counter in microjoules, which starts over after `range_uj`."""

    counter: Path
    range_uj: int


@dataclass(frozen=True)
class RaplMeter:
    """Package energy by RAPL. Where it cannot be read, `zones` is empty and `reason` says why."""

    zones: tuple[Zone, ...]
    reason: str
    source: str = "rapl"
    boundary: str = "package"

    def read(self) -> tuple[int, ...]:
        """Return every zone's counter in microjoules."""
        return tuple(int(zone.counter.read_text()) for zone in self.zones)

    def joules(self, before: tuple[int, ...], after: tuple[int, ...]) -> float | None:
        """Return the energy between two reads, at most one wrap-around apart; None where there is no counter."""
        if not self.zones:
            return None
        total = 0
        for zone, begin, end in zip(self.zones, before, after, strict=True):
            total += end - begin if end >= begin else end - begin + zone.range_uj
        return total / 1e6


def rapl(root: Path = POWERCAP) -> RaplMeter:
    """Return the meter of this host's packages, empty with its reason where there is none to read."""
    found = sorted(p for p in root.glob("*-rapl:*") if p.name.count(":") == 1) if root.is_dir() else []
    packages = [p for p in found if (p / "energy_uj").exists()]
    if not packages:
        return RaplMeter((), f"no energy counter: {root} has no RAPL package (usual in a virtual machine)")
    locked = [p for p in packages if not os.access(p / "energy_uj", os.R_OK)]
    if locked:
        return RaplMeter((), f"no permission to read {locked[0] / 'energy_uj'}: run as root or change its mode")
    return RaplMeter(tuple(Zone(p / "energy_uj", int((p / "max_energy_range_uj").read_text())) for p in packages), "")
