"""The environment of a measurement: the machine, which names its readings, and the conditions, which accompany them.

A machine consists of what changes speed and is permanent on the host or its container: the chip and its instruction
sets, the GPUs with the major version of their driver, the CPUs that the host or the container's limits give to any
process, the nominal memory size, the kernel's release line, the hypervisor, the version of the runtime. Readings of
two machines are never compared, so a change of any of these requires new measurements.

Conditions are what one command or one hour may change (the CPUs a process is pinned to, the governor of the clock),
and what changes without changing speed (one kB of memory, a kernel's or a driver's patch level). A governor and
pinning do change speed, but not the machine: as part of its name, a laptop on battery or a build under `taskset` would
discard all known readings. So they are recorded with each reading, and readings taken while they slowed the machine
are marked; `llmbuild profile` takes them again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from llmbuild.system.strict_json import JsonObject

NOWHERE = "0" * 64
"""In place of a machine's fingerprint: the variant was compiled and never measured."""

FULL_SPEED = "performance"
"""The governor with which the clock does not lag behind the load."""

_SIZES_GIB = sorted({size << shift for size in (2, 3) for shift in range(20)} | {1})
"""Nominal memory sizes of hosts and of most virtual machines."""
_MORE = 1.12
"""Tolerance above a size: the first size within the tolerance is taken."""
_INSTRUCTIONS = re.compile(
    r"mmx|sse.*|ssse3|avx.*|amx-.*|fma4?|f16c|xop|bmi2?|lzcnt|popcnt|tbm|adx|v?aes|v?pclmul.*|gfni|sha.*|movbe"
    r"|neon|fp-armv8|fullfp16|fp16fml|dotprod|i8mm|bf16|f(32|64)mm|sve.*|sme.*|lse2?|rdm|crc|jsconv|complxnum|rcpc|pmull"
)
"""Features that code generation uses. The kernel lists many more, and each of its updates adds some."""


@dataclass(frozen=True)
class Machine:
    """One host; the digest of this record is the fingerprint of a measurement."""

    chip: str
    arch: str
    cores: int
    memory_gib: int
    system: str
    hypervisor: str
    runtime: str
    features: tuple[str, ...]

    def describe(self) -> str:
        """Return one line for people."""
        kind = f", VM ({self.hypervisor})" if self.hypervisor else ""
        return f"{self.chip}, {self.cores} cores, {self.memory_gib} GiB, {self.system}{kind}"

    def fields(self) -> dict[str, object]:
        """Return the inputs of the fingerprint by name; each feature under its own name, for a comparison."""
        told = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "features"}
        return {**told, "features": dict.fromkeys(self.features, True)}


@dataclass(frozen=True)
class Conditions:
    """The conditions of a reading. `pinned` are the CPUs of the process where it may not use all `cpus`."""

    system: str
    devices: str
    memory_bytes: int
    governor: str
    cpus: int
    pinned: str

    def note(self) -> str:
        """Return the record that is kept with a reading."""
        told = [self.system, self.devices, f"{self.memory_bytes >> 10} kB of memory" if self.memory_bytes else ""]
        told += [f"governor {self.governor}" if self.governor else "", self._pinned()]
        return ", ".join(text for text in told if text)

    def slowed(self) -> str:
        """Return what may have slowed the machine; empty where nothing did."""
        lazy = self.governor and self.governor != FULL_SPEED
        told = (self._pinned(), f"the clock follows the governor {self.governor}" if lazy else "")
        return ", ".join(text for text in told if text)

    def notes(self) -> dict[str, str]:
        """Return the notes of a reading under these conditions."""
        held = self.slowed()
        return {"conditions": self.note(), **({"held back": held} if held else {})}

    def _pinned(self) -> str:
        return f"pinned to CPU {self.pinned} of {self.cpus}" if self.pinned else ""


def machine_from(body: JsonObject) -> Machine:
    """Return the machine of a record of any llmbuild version: one machine has one digest.

    Raises:
        TypeError, KeyError, ValueError, AttributeError: not a record of a machine.
    """
    return Machine(
        chip=re.sub(r"(, driver \d+)[\d.]*", r"\1", body["chip"]),
        arch=body["arch"],
        cores=int(body["cores"]),
        memory_gib=memory_class(int(body["memory_gib"])),
        system=re.sub(r"^(\S+ \d+\.\d+).*", r"\1", body["system"]),
        hypervisor=body["hypervisor"],
        runtime=body["runtime"],
        features=instructions(body["features"]),
    )


def memory_class(gib: int) -> int:
    """Return the nominal size of memory of that many GiB; the kernel's own part is missing from it."""
    return next((size for size in _SIZES_GIB if gib <= size * _MORE), gib) if gib > 0 else 0


def instructions(features: Iterable[str]) -> tuple[str, ...]:
    """Return the CPU features that code generation uses, sorted."""
    return tuple(sorted({name for name in features if _INSTRUCTIONS.fullmatch(name)}))
