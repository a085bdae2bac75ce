"""Disturbances of a measurement: time stolen by the hypervisor, other processes' CPU time, heat, clocks and load."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

STEAL_LIMIT = 0.02
"""Share of stolen CPU time above which readings are marked noisy."""

OTHERS_LIMIT = 0.05
"""Share of other processes' CPU time above which readings are marked noisy."""

CLOCK_LIMIT = 0.1
"""Change of the CPU clock above which readings are marked noisy."""

CPUS = Path("/sys/devices/system/cpu")


@dataclass(frozen=True)
class Snapshot:
    """Counters of /proc/stat in ticks; zero where the system has none."""

    stolen: int
    total: int
    busy: int = 0


STAT = Path("/proc/stat")


def cpus(stat: Path = STAT) -> int:
    """Return the number of CPUs in the counters: all that are online, not those of this process."""
    try:
        return len(re.findall(r"^cpu\d+ ", stat.read_text(), re.MULTILINE)) or os.cpu_count() or 1
    except OSError:
        return os.cpu_count() or 1


def snapshot(stat: Path = STAT) -> Snapshot:
    """Return the present counters."""
    try:
        ticks = [int(x) for x in stat.read_text().splitlines()[0].split()[1:9]]
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
    """Disturbances in a span: shares of CPU time, and whether the CPU was throttled."""

    stolen: float
    others: float
    throttled: bool = False

    @property
    def disturbed(self) -> bool:
        """Whether readings of this span should be dropped."""
        return self.stolen > STEAL_LIMIT or self.others > OTHERS_LIMIT or self.throttled


class Watch:
    """Watches the machine from its creation on; this process counts as one of the measured processes."""

    def __init__(self, processes: Iterable[int], root: Path = CPUS) -> None:
        self._processes, self._root = (*processes, os.getpid()), root
        self._throttles = throttles(root)
        self._before, self._ticks = snapshot(), cpu_ticks(self._processes)

    def shares(self) -> Shares:
        """Return the disturbances since then; zero where the system does not report them."""
        own = cpu_ticks(self._processes) - self._ticks
        return _shares(self._before, snapshot(), own, throttles(self._root) > self._throttles)


def _shares(before: Snapshot, after: Snapshot, own_ticks: int, throttled: bool = False) -> Shares:
    spent = after.total - before.total
    if spent <= 0:
        return Shares(0.0, 0.0, throttled)
    others = (after.busy - before.busy - own_ticks) / spent
    return Shares((after.stolen - before.stolen) / spent, max(0.0, others), throttled)


def throttles(root: Path = CPUS) -> int:
    """Return how often the CPUs were throttled for heat since boot; 0 where unknown."""
    return sum(_number(p) for p in root.glob("cpu[0-9]*/thermal_throttle/core_throttle_count"))


def clock_khz(root: Path = CPUS) -> int:
    """Return the present mean clock of the CPUs; 0 where unknown, as in most virtual machines."""
    found = [_number(p) for p in root.glob("cpu[0-9]*/cpufreq/scaling_cur_freq")]
    return round(sum(found) / len(found)) if found else 0


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0


def description(spans: Sequence[Shares], clocks_khz: Sequence[int] = ()) -> str:
    """Return what disturbed a measurement of several spans; empty when nothing did.

    The shares are means over the spans; `clocks_khz` are readings of the clock between them.
    """
    if not spans:
        return ""
    found = []
    stolen, others = (sum(getattr(s, name) for s in spans) / len(spans) for name in ("stolen", "others"))
    if stolen > STEAL_LIMIT:
        found.append(f"{stolen:.0%} of CPU time was stolen")
    if others > OTHERS_LIMIT:
        found.append(f"other processes took {others:.0%} of the CPUs")
    if any(s.throttled for s in spans):
        found.append(
            f"the CPU was slowed down for its heat in {sum(s.throttled for s in spans)} of {len(spans)} rounds"
        )
    known = [c for c in clocks_khz if c]
    if known and min(known) < (1 - CLOCK_LIMIT) * max(known):
        found.append(f"the CPU clock moved between {min(known) / 1e6:.2f} and {max(known) / 1e6:.2f} GHz")
    return ", ".join(found)


def verdict(before: Snapshot, after: Snapshot, own_threads: int, own_ticks: int | None = None) -> str:
    """Return what disturbed the readings between two snapshots; empty when nothing did.

    `own_ticks` is the CPU time of the measured processes in between: other processes used the rest of the busy time.
    """
    own = after.busy - before.busy if own_ticks is None else own_ticks
    found = [description([_shares(before, after, own)])]
    load = os.getloadavg()[0]
    if load > own_threads + 1.5:
        found.append(f"load average {load:.1f}")
    return ", ".join(text for text in found if text)
