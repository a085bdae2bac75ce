"""Facts of this host, read with the standard library alone: CPU features, memory, and the machine record."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from llmbuild.runtime.boards import boards
from llmbuild.spec.machine import Machine

_LLVM_NAMES = {
    "pni": "sse3",
    "sse4_1": "sse4.1",
    "sse4_2": "sse4.2",
    "abm": "lzcnt",
    "lahf_lm": "sahf",
    "sha_ni": "sha",
    "bmi1": "bmi",
    "pclmulqdq": "pclmul",
    "3dnowprefetch": "prfchw",
    "rdrand": "rdrnd",
    "avx_vnni": "avxvnni",
    "avx512_4vnniw": "avx5124vnniw",
    "amx_tile": "amx-tile",
    "amx_int8": "amx-int8",
    "amx_bf16": "amx-bf16",
    "asimd": "neon",
    "asimddp": "dotprod",
    "asimdhp": "fullfp16",
    "atomics": "lse",
    "asimdrdm": "rdm",
    "crc32": "crc",
    "fp": "fp-armv8",
    "jscvt": "jsconv",
    "fcma": "complxnum",
    "lrcpc": "rcpc",
    "asimdfhm": "fp16fml",
    "uscat": "lse2",
    "dcpop": "ccpp",
    "sve2": "sve2",
}
"""Linux names of CPU features to LLVM's; the rest differ by underscores at most."""


def llvm_features(flags: list[str]) -> frozenset[str]:
    """Return LLVM's names for the feature flags of /proc/cpuinfo."""
    return frozenset(_LLVM_NAMES.get(f, f.replace("_", "") if f.startswith("avx512") else f) for f in flags)


@cache
def features() -> frozenset[str]:
    """Return this host's CPU features by LLVM's names; empty where the system does not tell."""
    match = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", _cpuinfo(), re.MULTILINE)
    if match:
        return llvm_features(match[1].split())
    return frozenset(_darwin_features())


def architecture() -> str:
    """Return `x86_64` or `aarch64`, or what the system says."""
    machine = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


@cache
def runtime_version() -> str:
    """Return the version of the installed IREE runtime, `absent` without one."""
    try:
        return version("iree-base-runtime")
    except PackageNotFoundError:
        return "absent"


def cores() -> int:
    """Return the number of CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def available_memory_bytes() -> int | None:
    """Return how much memory a new process could use; None where the system does not tell."""
    return _meminfo("MemAvailable")


@cache
def machine() -> Machine:
    """Return this host as a machine record."""
    total = _meminfo("MemTotal") or 0
    return Machine(
        chip="; ".join((*boards(), _chip())),
        arch=architecture(),
        cores=cores(),
        memory_gib=round(total / (1 << 30)),
        system=f"{platform.system()} {platform.release()}",
        hypervisor=_hypervisor(),
        governor=_first_line(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        runtime=runtime_version(),
        features=tuple(sorted(features())),
    )


@cache
def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def _meminfo(name: str) -> int | None:
    try:
        match = re.search(rf"^{name}:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(match[1]) * 1024 if match else None


def _chip() -> str:
    def field(name: str) -> str:
        match = re.search(rf"^{name}\s*:\s*(.*)$", _cpuinfo(), re.MULTILINE)
        return match[1].strip() if match else ""

    name = field("model name") or _sysctl("machdep.cpu.brand_string") or platform.processor() or architecture()
    family = field("cpu family")
    return f"{name} (family {family} model {field('model')})" if family else name


def _hypervisor() -> str:
    if re.search(r"^flags\s*:.*\bhypervisor\b", _cpuinfo(), re.MULTILINE):
        return _first_line(Path("/sys/class/dmi/id/sys_vendor")) or "unnamed"
    return ""


def _first_line(path: Path) -> str:
    try:
        return path.read_text().splitlines()[0].strip()
    except (OSError, IndexError):
        return ""


def _darwin_features() -> list[str]:
    found = []
    for name, feature in (
        ("FEAT_DotProd", "dotprod"),
        ("FEAT_I8MM", "i8mm"),
        ("FEAT_BF16", "bf16"),
        ("FEAT_FP16", "fullfp16"),
    ):
        if _sysctl(f"hw.optional.arm.{name}") == "1":
            found.append(feature)
    return ["neon", *found] if architecture() == "aarch64" and platform.system() == "Darwin" else found


def _sysctl(name: str) -> str:
    if platform.system() != "Darwin":
        return ""
    done = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=False)
    return done.stdout.strip()
