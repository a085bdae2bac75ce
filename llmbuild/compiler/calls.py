"""One call of a compiler's tool as data, and who runs it: this machine, or a node of a cluster."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from llmbuild.compiler.iree import binary
from llmbuild.process.child import Limits, run
from llmbuild.spec.variant import Failure


@dataclass(frozen=True)
class Call:
    """A tool that reads one file and writes one or two."""

    tool: str
    source: Path
    flags: tuple[str, ...]
    output: Path
    beside: Path | None = None
    """A second file, which a flag names."""

    def command(self) -> list[str]:
        """Return the command line on this machine."""
        return [str(binary(self.tool)), str(self.source), *self.flags, "-o", str(self.output)]


class Runner(Protocol):
    """Runs calls."""

    def __call__(self, call: Call, limits: Limits) -> Failure | None:
        """Run a call; None where its files are written whole, else the failure."""


def here(call: Call, limits: Limits) -> Failure | None:
    """Run a call on this machine."""
    return run(call.command(), "compile", limits, call.output)
