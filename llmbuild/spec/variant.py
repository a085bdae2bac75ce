"""What is built: toolchain, variant, artifact, and the failure that stands where one could not be made."""

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
    """Versions of what turns a recipe into an artifact; a change of one makes everything after it stale."""

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
        """The name: 64 hex digits over everything that decides the bytes and how they are run."""
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
    """A tool did not do what it was asked: why, the command to paste, what it printed, and whether to try again.

    `lasting` says that the same inputs will fail again; a passing one (a time-out, a full disk) is tried anew.
    """

    stage: Stage
    reason: str
    command: str
    log: str
    lasting: bool
