"""What the rows of one build share, each named by digest."""

from __future__ import annotations

from dataclasses import dataclass

from llmbuild import digest
from llmbuild.spec.machine import Machine
from llmbuild.spec.target import Target
from llmbuild.spec.variant import Toolchain


@dataclass(frozen=True)
class Owner:
    """What every variant of one build shares: the recipe's name, and digests of target, toolchain and lineage.

    `tokenizer` is a blob, absent for a model without one; `source` is the digest of what the name stands for.
    """

    model: str
    target: str
    toolchain: str
    lineage: str
    tokenizer: str | None
    source: str | None = None


@dataclass(frozen=True)
class Ranking:
    """What the standings of one build share, by digest: all that decided them, what the name stands for, and the build.

    Nothing is known of it where rows are written that no recipe asked for.
    """

    ranking: str | None = None
    source: str | None = None
    tokenizer: str | None = None
    build: str | None = None


@dataclass(frozen=True)
class Registered:
    """The records every row of a build points at, named by digest."""

    target: Target
    machine: Machine
    toolchain: Toolchain
    known_as: str = ""
    """The digest that the catalog has the machine under, where that is not its fingerprint."""

    @property
    def target_digest(self) -> str:
        """Name of the target: what decides the code, and what people call it."""
        return digest.of({"name": self.target.name, **self.target.identity()})

    @property
    def machine_digest(self) -> str:
        """Fingerprint of the machine, or what a catalog of an earlier llmbuild knows it as."""
        return self.known_as or digest.of(self.machine)

    @property
    def toolchain_digest(self) -> str:
        """Name of the toolchain."""
        return digest.of(self.toolchain)
