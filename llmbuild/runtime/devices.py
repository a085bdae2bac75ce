"""Which of IREE's devices this host has: the runtime's own tool lists them, since loading a broken driver may crash."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path

CPU_DRIVERS = ("local-task", "local-sync")

_ABSENT = {
    "cuda": "no NVIDIA driver (libcuda)",
    "hip": "no AMD driver (libamdhip64)",
    "vulkan": "no Vulkan loader (libvulkan) or no driver under it",
}
SECONDS = 20.0


_ASKED = {"vulkan": "--dump_devices"}
"""How to query a driver where more than its devices' names is needed."""

_SUBGROUP = "subgroup-size-"
_COMPUTE_STAGE = 0x20


@dataclass(frozen=True)
class Devices:
    """The devices of one driver by name, or by URI where the driver reports no name, or why there are none.

    `features` are those of the first device, which is the one that is opened, in the terms of targets' `requires`;
    None where unknown.
    """

    found: tuple[str, ...]
    reason: str = ""
    features: frozenset[str] | None = None


@cache
def find(driver: str) -> Devices:
    """Return the devices that `driver` (the part of a device URI before `://`) finds on this host."""
    if driver in CPU_DRIVERS:
        return Devices((driver,))
    tool = _tool()
    if tool is None:
        return Devices((), "no IREE runtime: pip install iree-base-runtime")
    try:
        asked = [str(tool), f"{_ASKED.get(driver, '--list_devices')}={driver}"]
        told = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Devices((), f"IREE's {driver} driver does not answer: {type(error).__name__}")
    return read(driver, told.returncode, told.stdout, told.stderr)


def lacks(driver: str, requires: Collection[str] = ()) -> str:
    """Return why a driver has no device with a target's required features; empty where it has one."""
    there = find(driver)
    missing = sorted(set(requires) - there.features) if there.features is not None else []
    if there.reason or not missing:
        return there.reason
    return f"{there.found[0]} lacks {' '.join(missing)}, it has {' '.join(sorted(there.features or ())) or 'nothing'}"


def read(driver: str, code: int, stdout: str, stderr: str) -> Devices:
    """Parse the tool's output for a driver."""
    if "no driver" in stderr:
        return Devices((), f"the installed IREE runtime has no {driver} driver")
    if code:
        line = next((s.rpartition("; ")[2].strip() for s in stderr.splitlines() if driver in s and "; " in s), "")
        return Devices((), _ABSENT.get(driver, "") or line or f"IREE's {driver} driver does not start")
    names = re.findall(r"^name: (.*)$", stdout, re.MULTILINE)
    devices = tuple(names or (line.strip() for line in stdout.splitlines() if "://" in line))
    return Devices(devices, "" if devices else f"IREE's {driver} driver finds no device", features(stdout))


def features(told: str) -> frozenset[str] | None:
    """Return the features of the first device in a Vulkan driver's description: its subgroup sizes.

    A reduction over subgroups of another size runs, and gives wrong results.
    """
    match = re.search(r"^subgroup: (.*)$", told, re.MULTILINE)
    if not match:
        return None
    said = dict(pair.split("=", 1) for pair in match[1].split() if "=" in pair)
    try:
        usual, least, most = (int(said[name]) for name in ("size", "minSubgroupSize", "maxSubgroupSize"))
        chosen = int(said["requiredSubgroupSizeStages"], 0) & _COMPUTE_STAGE and "subgroupSizeControl=yes" in told
    except (KeyError, ValueError):
        return None
    sizes = [n for n in (1 << i for i in range(8)) if least <= n <= most] if chosen else [usual]
    return frozenset(f"{_SUBGROUP}{n}" for n in sizes)


def _tool() -> Path | None:
    spec = importlib.util.find_spec("iree")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "_runtime_libs" / "iree-run-module"
        if path.is_file():
            return path
    return None
