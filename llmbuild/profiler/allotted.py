"""Measure on a node of Slurm: the server of remote measurements behind `srun`, which has the node for itself.

`srun` stands where `ssh` does for another machine: it passes on what is said in both directions, and the lease is its
job. A keeper holds it, so that the job is given back however the build ends, also one that still waits for its node.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from llmbuild.process import child
from llmbuild.process.slurm import NAME, NO_OPTIONS, Options
from llmbuild.profiler.remote import Place, alone


@dataclass(frozen=True)
class Allotted(Place):
    """A node of Slurm, in place of a machine for ssh."""

    options: Options = NO_OPTIONS

    def command(self, script: str) -> list[str]:
        """Return the command that runs a Python script there while it has the node."""
        return child.python("llmbuild.process.keeper", *self.words(), sys.executable, *alone(script))

    def words(self) -> list[str]:
        """Return the command that runs something there.

        Not `--unbuffered`: it gives the server a terminal, which changes bytes. One task would be bound to one core.
        """
        fixed = ("--nodes=1", "--ntasks=1", "--cpu-bind=none", "--mpi=none", "--quiet")
        return ["srun", f"--job-name={NAME}", *fixed, *self.options.words()]

    def pasted(self, command: str) -> str:
        """Return a command of that node, to be given here."""
        return f"{' '.join(self.words())} {command}"
