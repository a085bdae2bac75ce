"""A farm on Slurm: compiles as jobs by submitit on any node, and which node a target is measured on."""

from __future__ import annotations

from collections.abc import Callable

from llmbuild.build.targets import find_target
from llmbuild.compiler.afar import TRIES, Gone, Made, Sent, work
from llmbuild.errors import InputError
from llmbuild.process.slurm import Asked, asked_of, connected
from llmbuild.process.slurm_jobs import Ended, Jobs, Running, Work, this_node, told_where
from llmbuild.profiler.allotted import Allotted
from llmbuild.profiler.remote import Place
from llmbuild.spec.target import HOST

LOOK_S = 60.0
"""Seconds that a job has to tell the name of its node."""


class SlurmFarm:
    """Compiles as jobs, one each; one whose node was lost is submitted again."""

    def __init__(self, jobs: Jobs, asked: Asked, text: str) -> None:
        self._jobs, self._asked, self._text = jobs, asked, text

    @staticmethod
    def at(text: str) -> SlurmFarm:
        """Return the place on Slurm that a text names.

        Raises:
            InputError: the text is not of this form, submitit is not installed, or no Slurm answers.
        """
        asked = asked_of(text)
        return SlurmFarm(Jobs(connected(asked)), asked, text)

    def submit(self, sent: Sent) -> tuple[Callable[[], Made], Callable[[], None]]:
        """Submit a job; return what waits for it, and what cancels it."""
        job = Work(told_where, (work, sent), sent.seconds, self._asked.compiling(), self._asked.cpus)
        try:
            running = Running(self._jobs, job, TRIES)
        except Ended as error:
            raise Gone(str(error)) from None

        def wait() -> Made:
            try:
                made: Made = running.wait()
            except Ended as error:
                raise Gone(f"Slurm has not compiled it: {error}") from None
            return made

        return wait, running.cancel

    def device(self, target: str) -> Place:
        """Return a node for a target; which, Slurm decides: the first that is free, and has the target's label.

        Raises:
            InputError: no node is such a one, or the job that asked for it was cancelled.
        """
        found = find_target(target)
        label = "" if target == HOST else f"llmbuild_target_{found.name}"
        asked = self._asked.measuring(label, not found.is_cpu)
        try:
            node = Running(self._jobs, Work(this_node, (), LOOK_S, asked), TRIES).wait()
        except Ended as error:
            needs = " ".join(asked.words())
            other = "constraint=, gres= and devices= in --on ask for another; with --until compile nothing is measured"
            raise InputError(f"no node of Slurm to measure {target} on ({needs}): {error}; {other}") from None
        options = self._asked.leasing(asked, node)
        return Allotted(destination=f"{node} of {self._text}", leased=True, options=options)
