"""Energy of the CPU's packages by RAPL, through Linux's powercap.

A package's counter includes its cores and its uncore. It excludes the memory, which has its own zone, `dram`, where
the chip has one, and is in no zone elsewhere. `psys` covers the whole platform, packages included, so it is never
added to them. Zones are identified by their names; some chips list a package twice, in registers and mapped in memory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from time import monotonic

from llmbuild.profiler.meters.meter import Absent, Clock, Counter, Source
from llmbuild.runtime import host

POWERCAP = Path("/sys/class/powercap")
STEP_S = 0.001
"""The counter is updated about a thousand times a second."""
PACKAGE, MEMORY = re.compile(r"package-\d+(-die-\d+)?"), "dram"
_ZONE = re.compile(r"[\w-]*rapl[\w-]*:\d+")
WITHOUT_MEMORY = "without DRAM, which has a zone of its own"
MEMORY_UNKNOWN = "without DRAM, which has no zone"


def find(root: Path = POWERCAP, clock: Clock = monotonic, in_vm: bool | None = None) -> Counter | Absent:
    """Return the meter of this host's packages, each counted once, and nothing else.

    Inside a virtual machine the counter is the host's, attributed by CPU time and not measured: `rapl_vm`.
    """
    in_vm = bool(host.machine().hypervisor) if in_vm is None else in_vm
    source: Source = "rapl_vm" if in_vm else "rapl"
    zones = _zones(root)
    packages = {name: zone for name, zone in zones.items() if PACKAGE.fullmatch(name)}
    if not packages:
        there = f"only {', '.join(sorted(zones))}" if zones else "no RAPL package (usual in a virtual machine)"
        return Absent("rapl", f"no energy counter of a package: {root} has {there}")
    counters = [zone / "energy_uj" for _, zone in sorted(packages.items())]
    locked = next((c for c in counters if not os.access(c, os.R_OK)), None)
    if locked is not None:
        return Absent("rapl", f"no permission to read {locked}: run as root or change its mode")
    try:
        ranges = tuple(int((c.parent / "max_energy_range_uj").read_text()) for c in counters)
    except (OSError, ValueError) as error:
        return Absent("rapl", f"the RAPL counter's range is unknown: {error}")

    def read() -> tuple[int, ...] | Absent:
        try:
            return tuple(int(c.read_text()) for c in counters)
        except (OSError, ValueError) as error:
            return Absent(source, f"the RAPL counter cannot be read any more: {error}")

    told: dict[str, float | str] = {"zones": " ".join(sorted(packages)), "memory": _memory(packages)}
    return Counter(source, "package", STEP_S, 1e-6, ranges, read, clock, lambda: dict(told))


def _zones(root: Path) -> dict[str, Path]:
    """Return the top-level zones that have a counter, by name; of two with one name, the one in registers."""
    found: dict[str, Path] = {}
    folders = sorted(root.glob("*rapl*:*"), key=lambda p: ("mmio" in p.name, p.name)) if root.is_dir() else []
    for zone in folders:
        if _ZONE.fullmatch(zone.name) and (zone / "energy_uj").exists():
            found.setdefault(_name(zone), zone)
    return found


def _name(zone: Path) -> str:
    try:
        return (zone / "name").read_text().strip()
    except OSError:
        return zone.name  # no package: the content of an unnamed zone is unknown


def _memory(packages: Mapping[str, Path]) -> str:
    """Return where the memory's energy is counted: never in a package's counter."""
    parts = {_name(part) for zone in packages.values() for part in zone.parent.glob(f"{zone.name}:*")}
    return WITHOUT_MEMORY if MEMORY in parts else MEMORY_UNKNOWN
