"""What else the machine was doing: time stolen by the hypervisor, and the load."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

STEAL_LIMIT = 0.02
"""Share of CPU time stolen above which readings are called noisy."""


@dataclass(frozen=True)
class Snapshot:
    """Counters of /proc/stat in ticks; zero where the system has none."""

    stolen: int
    total: int


def snapshot() -> Snapshot:
    """Return the counters now."""
    try:
        ticks = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    except (OSError, ValueError, IndexError):
        return Snapshot(0, 0)
    return Snapshot(ticks[7] if len(ticks) > 7 else 0, sum(ticks))


def verdict(before: Snapshot, after: Snapshot, own_threads: int) -> str:
    """Return what disturbed the readings taken between two snapshots; empty when nothing did."""
    told = []
    spent = after.total - before.total
    if spent > 0 and (after.stolen - before.stolen) / spent > STEAL_LIMIT:
        told.append(f"{(after.stolen - before.stolen) / spent:.0%} of CPU time was stolen")
    load = os.getloadavg()[0]
    if load > own_threads + 1.5:
        told.append(f"load average {load:.1f}")
    return ", ".join(told)
