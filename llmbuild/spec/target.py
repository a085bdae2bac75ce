"""What code is compiled for."""

from __future__ import annotations

from dataclasses import dataclass

HOST = "host"


@dataclass(frozen=True)
class Target:
    """A named kind of hardware. `cpu` and `features` are LLVM's names; `host` never stays in a resolved target.

    `requires` are the CPU features that a host must have before an artifact of this target may be opened.
    """

    name: str
    backend: str
    arch: str
    cpu: str
    features: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    description: str = ""

    def identity(self) -> dict[str, object]:
        """Return what decides the code that is generated; the name and the description do not."""
        return {
            "backend": self.backend,
            "arch": self.arch,
            "cpu": self.cpu,
            "features": sorted(self.features),
            "requires": sorted(self.requires),
        }
