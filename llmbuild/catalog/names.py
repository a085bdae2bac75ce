"""The shared fields of a build's rows, each named by digest."""

from __future__ import annotations

from dataclasses import dataclass

from llmbuild import digest
from llmbuild.spec.machine import Machine
from llmbuild.spec.target import Target
from llmbuild.spec.variant import Toolchain


@dataclass(frozen=True)
class Owner:
    """The shared fields of a build's variants: the recipe's name, and digests of target, toolchain and lineage.

    `tokenizer` and `chat`, the chat template, are blobs, absent for a model without one; `source` is the digest of the
    weights and the tokenizer.
    """

    model: str
    target: str
    toolchain: str
    lineage: str
    tokenizer: str | None
    source: str | None = None
    chat: str | None = None


@dataclass(frozen=True)
class Ranking:
    """The shared digests of a build's standings: their inputs, their source, and the build.

    Empty for rows that no recipe requested.
    """

    ranking: str | None = None
    source: str | None = None
    tokenizer: str | None = None
    build: str | None = None
    chat: str | None = None


@dataclass(frozen=True)
class Registered:
    """The records that every row of a build refers to, named by digest."""

    target: Target
    machine: Machine
    toolchain: Toolchain
    known_as: str = ""
    """The machine's digest in the catalog, where it is not the fingerprint."""

    @property
    def target_digest(self) -> str:
        """The target's digest: over what decides the code, and its name."""
        return digest.of({"name": self.target.name, **self.target.identity()})

    @property
    def machine_digest(self) -> str:
        """Fingerprint of the machine, or its digest in a catalog of an earlier llmbuild."""
        return self.known_as or digest.of(self.machine)

    @property
    def toolchain_digest(self) -> str:
        """The toolchain's digest."""
        return digest.of(self.toolchain)
