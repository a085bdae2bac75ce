"""Which of IREE's devices this host has: asked of the runtime's own tool, since loading a broken driver may crash."""

from __future__ import annotations

import importlib.util
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

CPU_DRIVERS = ("local-task", "local-sync")

_ABSENT = {
    "cuda": "no NVIDIA driver (libcuda)",
    "hip": "no AMD driver (libamdhip64)",
    "vulkan": "no Vulkan loader (libvulkan)",
}
SECONDS = 20.0


@dataclass(frozen=True)
class Devices:
    """The devices of one driver by URI and name, or why there are none."""

    found: tuple[str, ...]
    reason: str = ""


@cache
def find(driver: str) -> Devices:
    """Return what `driver` (the part of a device URI before `://`) finds on this host."""
    if driver in CPU_DRIVERS:
        return Devices((driver,))
    tool = _tool()
    if tool is None:
        return Devices((), "no IREE runtime: pip install iree-base-runtime")
    try:
        asked = [str(tool), f"--list_devices={driver}"]
        told = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Devices((), f"IREE's {driver} driver does not answer: {type(error).__name__}")
    return read(driver, told.returncode, told.stdout, told.stderr)


def lacks(driver: str) -> str:
    """Return why there is no device behind a driver; empty where there is."""
    return find(driver).reason


def read(driver: str, code: int, stdout: str, stderr: str) -> Devices:
    """Return what the tool told of a driver."""
    if "no driver" in stderr:
        return Devices((), f"the installed IREE runtime has no {driver} driver")
    if code:
        line = next((s.rpartition("; ")[2].strip() for s in stderr.splitlines() if driver in s and "; " in s), "")
        return Devices((), _ABSENT.get(driver, "") or line or f"IREE's {driver} driver does not start")
    devices = tuple(line.strip() for line in stdout.splitlines() if "://" in line)
    return Devices(devices, "" if devices else f"IREE's {driver} driver finds no device")


def _tool() -> Path | None:
    spec = importlib.util.find_spec("iree")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "_runtime_libs" / "iree-run-module"
        if path.is_file():
            return path
    return None
