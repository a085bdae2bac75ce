"""GPUs of this host with their driver, for the machine record: readings of one board do not apply to another.

Read from the kernel's sysfs, which is cheap; in containers that hide it, from the driver's own library. Both give the
same strings, so that a loader, a build and a packed folder on one host record the same machine.
"""

from __future__ import annotations

import ctypes
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

NVIDIA = Path("/proc/driver/nvidia")
KFD = Path("/sys/class/kfd/kfd/topology/nodes")
AMDGPU = Path("/sys/module/amdgpu/version")
PCI = Path("/sys/bus/pci/devices")
_MAKERS = {"0x10de": "NVIDIA", "0x1002": "AMD", "0x8086": "Intel"}
_DISPLAY = "0x03"
"""Prefix of the PCI class of a display controller, with or without an output."""
_NAME_BYTES, _VERSION_BYTES = 96, 80


def boards(
    nvidia: Path = NVIDIA,
    kfd: Path = KFD,
    amdgpu: Path = AMDGPU,
    library: Callable[[str], Any] = ctypes.CDLL,
    pci: Path = PCI,
) -> tuple[str, ...]:
    """Return each kind of GPU with its driver, such as `2 x NVIDIA H200, driver 550.54.15`; empty where there is
    none.

    A GPU that only Vulkan drives is named by its PCI ids and its kernel driver: `Intel GPU 56a0, driver i915`. That
    driver's version is the kernel's. A GPU of a chip without a PCI bus is not listed.
    """
    found = _named(_shown(nvidia), _shown_driver(nvidia)) or _from_driver(library)
    found = (*found, *_named(_amd(kfd), _text(amdgpu)))
    known = {words for text in found for words in text.split()}
    return (*found, *_on_bus(pci, {maker for maker in _MAKERS.values() if maker not in known}))


def _named(chips: Iterable[str], driver: str) -> tuple[str, ...]:
    told = f", driver {driver}" if driver else ""
    return tuple(f"{f'{n} x ' if n > 1 else ''}{chip}{told}" for chip, n in sorted(Counter(chips).items()))


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _shown(nvidia: Path) -> list[str]:
    models = (re.search(r"^Model:\s*(.+?)\s*$", _text(p), re.MULTILINE) for p in nvidia.glob("gpus/*/information"))
    return [found[1] for found in models if found]


def _shown_driver(nvidia: Path) -> str:
    found = re.search(r"Kernel Module\b.*?\s(\d+\.\d+(?:\.\d+)*)\s", _text(nvidia / "version"))
    return found[1] if found else ""


def _from_driver(library: Callable[[str], Any]) -> tuple[str, ...]:
    """Return the GPUs that NVML reports, by its C interface: the loader has no package for it."""
    try:
        nvml = library("libnvidia-ml.so.1")
    except OSError:
        return ()
    if nvml.nvmlInit_v2():
        return ()
    try:
        count, driver = ctypes.c_uint(), ctypes.create_string_buffer(_VERSION_BYTES)
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) or nvml.nvmlSystemGetDriverVersion(driver, _VERSION_BYTES):
            return ()
        return _named([chip for n in range(count.value) if (chip := _chip(nvml, n))], driver.value.decode())
    finally:
        nvml.nvmlShutdown()


def _chip(nvml: Any, number: int) -> str:
    handle, name = ctypes.c_void_p(), ctypes.create_string_buffer(_NAME_BYTES)
    if nvml.nvmlDeviceGetHandleByIndex_v2(number, ctypes.byref(handle)):
        return ""
    return "" if nvml.nvmlDeviceGetName(handle, name, _NAME_BYTES) else name.value.decode(errors="replace")


def _amd(kfd: Path) -> list[str]:
    """Return AMD GPUs by LLVM's names: `gfx_target_version 90402` is gfx942, 90010 is gfx90a; CPUs have 0."""
    versions = (
        re.search(r"^gfx_target_version (\d+)$", _text(p), re.MULTILINE) for p in sorted(kfd.glob("*/properties"))
    )
    numbers = [int(found[1]) for found in versions if found]
    return [f"AMD gfx{n // 10000}{n // 100 % 100:x}{n % 100:x}" for n in numbers if n]


def _on_bus(pci: Path, makers: Collection[str]) -> tuple[str, ...]:
    """Return the GPUs of some vendors on the PCI bus."""
    drivers: dict[str, list[str]] = {}
    for device in sorted(pci.glob("*")):
        maker = _MAKERS.get(_text(device / "vendor"), "")
        if maker in makers and _text(device / "class").startswith(_DISPLAY):
            link = device / "driver"
            driver = link.resolve().name if link.exists() else ""
            drivers.setdefault(driver, []).append(f"{maker} GPU {_text(device / 'device').removeprefix('0x')}")
    return tuple(text for driver in sorted(drivers) for text in _named(drivers[driver], driver))
