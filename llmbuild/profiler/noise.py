"""What else the machine was doing: time stolen by the hypervisor, CPU time that others took, and the load."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

STEAL_LIMIT = 0.02
"""Share of CPU time stolen above which readings are called noisy."""

OTHERS_LIMIT = 0.05
"""Share of CPU time taken by other processes above which readings are called noisy."""


@dataclass(frozen=True)
class Snapshot:
    """Counters of /proc/stat in ticks; zero where the system has none."""

    stolen: int
    total: int
    busy: int = 0


def snapshot() -> Snapshot:
    """Return the counters now."""
    try:
        ticks = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    except (OSError, ValueError, IndexError):
        return Snapshot(0, 0)
    stolen = ticks[7] if len(ticks) > 7 else 0
    return Snapshot(stolen, sum(ticks), sum(ticks) - sum(ticks[3:5]) - stolen)


def cpu_ticks(processes: Iterable[int]) -> int:
    """Return the CPU time, in ticks, that processes have taken so far; one that has ended counts as zero."""
    taken = 0
    for number in processes:
        try:
            fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
            taken += int(fields[11]) + int(fields[12])
        except (OSError, ValueError, IndexError):
            continue
    return taken


@dataclass(frozen=True)
class Shares:
    """What share of the CPU time of a span was stolen by the hypervisor, and what share other processes took."""

    stolen: float
    others: float


class Watch:
    """Watches the machine from its making on, on behalf of the processes that are measured (this one is theirs too)."""

    def __init__(self, processes: Iterable[int]) -> None:
        self._processes = (*processes, os.getpid())
        self._before, self._ticks = snapshot(), cpu_ticks(self._processes)

    def shares(self) -> Shares:
        """Return what was taken from the measured processes since then; nothing where the system does not tell."""
        after, own = snapshot(), cpu_ticks(self._processes) - self._ticks
        spent = after.total - self._before.total
        if spent <= 0:
            return Shares(0.0, 0.0)
        others = (after.busy - self._before.busy - own) / spent
        return Shares((after.stolen - self._before.stolen) / spent, max(0.0, others))


def verdict(before: Snapshot, after: Snapshot, own_threads: int, own_ticks: int | None = None) -> str:
    """Return what disturbed the readings taken between two snapshots; empty when nothing did.

    `own_ticks` is the CPU time that the measured processes took between them: what is busy beyond it was others.
    """
    told = []
    spent = after.total - before.total
    if spent > 0 and (after.stolen - before.stolen) / spent > STEAL_LIMIT:
        told.append(f"{(after.stolen - before.stolen) / spent:.0%} of CPU time was stolen")
    others = (after.busy - before.busy - own_ticks) / spent if own_ticks is not None and spent > 0 else 0.0
    if others > OTHERS_LIMIT:
        told.append(f"other processes took {others:.0%} of the CPUs")
    load = os.getloadavg()[0]
    if load > own_threads + 1.5:
        told.append(f"load average {load:.1f}")
    return ", ".join(told)
