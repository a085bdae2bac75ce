"""What a measurement ran on."""

from __future__ import annotations

from dataclasses import dataclass

NOWHERE = "0" * 64
"""Stands where a machine's fingerprint would: the variant was compiled and never measured."""


@dataclass(frozen=True)
class Machine:
    """One host; the digest of this record is the fingerprint of a measurement."""

    chip: str
    arch: str
    cores: int
    memory_gib: int
    system: str
    hypervisor: str
    governor: str
    runtime: str
    features: tuple[str, ...]

    def describe(self) -> str:
        """Return one line for people."""
        kind = f", VM ({self.hypervisor})" if self.hypervisor else ""
        return f"{self.chip}, {self.cores} cores, {self.memory_gib} GiB, {self.system}{kind}"
