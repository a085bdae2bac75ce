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
from llmbuild.spec.machine import Conditions, Machine, machine_from
from llmbuild.system import resources

GOVERNORS = "sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor"

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
"""Linux names of CPU features to LLVM's; the others differ by underscores at most."""


def llvm_features(flags: list[str]) -> frozenset[str]:
    """Return LLVM's names for the feature flags of /proc/cpuinfo."""
    return frozenset(_LLVM_NAMES.get(f, f.replace("_", "") if f.startswith("avx512") else f) for f in flags)


@cache
def features() -> frozenset[str]:
    """Return this host's CPU features by LLVM's names; empty where the system does not report them."""
    match = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", _cpuinfo(), re.MULTILINE)
    if match:
        return llvm_features(match[1].split())
    return frozenset(_darwin_features())


def architecture() -> str:
    """Return `x86_64` or `aarch64`, or the system's own name."""
    machine = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


@cache
def runtime_version() -> str:
    """Return the version of the installed IREE runtime, `absent` without one."""
    try:
        return version("iree-base-runtime")
    except PackageNotFoundError:
        return "absent"


def cores(root: Path = resources.ROOT) -> int:
    """Return the number of CPUs this process may keep busy now: those it is pinned to, and no more than its quota.

    A quota of 1.5 CPUs counts as one: a second thread would be throttled for half of every period, and the first
    would wait for it.
    """
    pinned = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return _within_quota(pinned, root)


def machine_cores(root: Path = resources.ROOT) -> int:
    """Return the number of CPUs that this host or its container gives to any process; `taskset` is not considered."""
    online = resources.host_cpus(root) or frozenset(range(os.cpu_count() or 1))
    given = resources.group_cpus(root)
    return _within_quota(len(online & given if given else online) or 1, root)


def _within_quota(cpus: int, root: Path) -> int:
    quota = resources.cpu_quota(root)
    return cpus if quota is None else max(1, min(cpus, int(quota)))


def available_memory_bytes(root: Path = resources.ROOT) -> int | None:
    """Return how much memory a new process could use, in the container too; None where unknown."""
    free = resources.memory_available(root)
    return None if free is None else free.bytes


@cache
def machine() -> Machine:
    """Return this host as a machine record."""
    return machine_from(
        {
            "chip": "; ".join((*boards(), _chip())),
            "arch": architecture(),
            "cores": machine_cores(),
            "memory_gib": round((resources.meminfo("MemTotal") or 0) / (1 << 30)),
            "system": _system(),
            "hypervisor": _hypervisor(),
            "runtime": runtime_version(),
            "features": sorted(features()),
        }
    )


def conditions(root: Path = resources.ROOT) -> Conditions:
    """Return the current conditions that are noted with a reading."""
    cpus = machine_cores(root)
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return Conditions(
        system=_system(),
        devices="; ".join(boards()),
        memory_bytes=resources.meminfo("MemTotal", root) or 0,
        governor=" ".join(sorted({name for path in root.glob(GOVERNORS) if (name := _first_line(path))})),
        cpus=cpus,
        pinned=",".join(map(str, allowed)) if 0 < len(allowed) < cpus else "",
    )


def _system() -> str:
    return f"{platform.system()} {platform.release()}"


@cache
def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


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
