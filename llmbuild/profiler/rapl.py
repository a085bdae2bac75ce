"""Package energy of the CPU by RAPL, through Linux's powercap."""

from __future__ import annotations

import os
from pathlib import Path
from time import monotonic

from llmbuild.profiler.energy import Absent, Clock, Counter, Source
from llmbuild.runtime import host

POWERCAP = Path("/sys/class/powercap")
STEP_S = 0.001
"""The counter is updated about a thousand times a second."""


def find(root: Path = POWERCAP, clock: Clock = monotonic, in_vm: bool | None = None) -> Counter | Absent:
    """Return the meter of this host's packages, parts of a package left out: they are counted in it.

    Inside a virtual machine the counter is the host's split by CPU time, attributed and not measured: `rapl_vm`.
    """
    in_vm = bool(host.machine().hypervisor) if in_vm is None else in_vm
    source: Source = "rapl_vm" if in_vm else "rapl"
    found = sorted(p for p in root.glob("*-rapl:*") if p.name.count(":") == 1) if root.is_dir() else []
    counters = [p / "energy_uj" for p in found if (p / "energy_uj").exists()]
    if not counters:
        return Absent("rapl", f"no energy counter: {root} has no RAPL package (usual in a virtual machine)")
    locked = next((c for c in counters if not os.access(c, os.R_OK)), None)
    if locked is not None:
        return Absent("rapl", f"no permission to read {locked}: run as root or change its mode")
    ranges = tuple(int((c.parent / "max_energy_range_uj").read_text()) for c in counters)

    def read() -> tuple[int, ...] | Absent:
        try:
            return tuple(int(c.read_text()) for c in counters)
        except (OSError, ValueError) as error:
            return Absent(source, f"the RAPL counter cannot be read any more: {error}")

    return Counter(source, "package", STEP_S, 1e-6, ranges, read, clock)
