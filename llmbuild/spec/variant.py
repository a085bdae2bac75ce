"""The results of a build: toolchain, variant, artifact, and the failure in place of a missing one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from llmbuild import digest
from llmbuild.spec.program import Program
from llmbuild.spec.space import Point
from llmbuild.spec.target import Target

Stage = Literal["import", "compile", "check", "quality", "profile"]


@dataclass(frozen=True)
class Toolchain:
    """Versions of the tools from a recipe to an artifact; a change of one makes everything after it stale."""

    llmbuild: str
    importer: str
    compiler: str
    runtime: str


@dataclass(frozen=True)
class Variant:
    """Program × Target × Point × Toolchain; its digest is its name."""

    program: Program
    target: Target
    point: Point
    toolchain: Toolchain
    model: str = field(default="", compare=False)

    @property
    def digest(self) -> str:
        """The name: 64 hex digits over all inputs of the bytes and the run-time settings."""
        return digest.of(self.key())

    def key(self) -> dict[str, object]:
        """Return the inputs of the digest."""
        return {
            "program": digest.of(self.program),
            "target": self.target.identity(),
            "point": self.point.as_dict(),
            "toolchain": self.toolchain,
        }


@dataclass(frozen=True)
class Artifact:
    """A `.vmfb` by content digest; `runtime` is the version it needs."""

    digest: str
    size_bytes: int
    runtime: str


@dataclass(frozen=True)
class Failure:
    """A tool's failure: the reason, the command to repeat it, its output, and whether it is permanent.

    `lasting` means that the same inputs fail again; a transient failure (a time-out, a full disk) is tried again.
    """

    stage: Stage
    reason: str
    command: str
    log: str
    lasting: bool
