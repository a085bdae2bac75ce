"""Whether a job has anything to do, and why: its keys compared with a catalog."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property

from llmbuild import digest
from llmbuild.build.job import Job
from llmbuild.catalog.known import Known, State
from llmbuild.spec.recipe import AUTO, Budget
from llmbuild.spec.trial import Finished

NEVER = "never built"
DISPLACED = "other inputs of this name stand: these are ranked again, and nothing is made"


@dataclass(frozen=True)
class Outcome:
    """The result of a build: the number of new trials, of known trials, and why it ended."""

    made: int
    known: int
    usable: int
    ended: str
    seconds: float


class Freshness:
    """A snapshot of a catalog's data on a job's build; each part is read on first access."""

    def __init__(self, job: Job, catalog: Known, budget: Budget, seed: int) -> None:
        self.job, self.catalog, self.budget = job, catalog, budget
        self.key = build_key(job, seed)

    @cached_property
    def state(self) -> State:
        """The build's progress: `seconds`, `raced`, `ended`."""
        return self.catalog.build_state(self.key) or {"seconds": 0.0, "raced": False, "ended": NEVER}

    @cached_property
    def finished(self) -> list[Finished]:
        """The finished trials of the job's space, without measurements."""
        space = self.job.space
        return [f for f in self.catalog.finished(self.job.scope) if f.is_default or space.contains(f.point)]

    @cached_property
    def lost(self) -> dict[str, set[str]]:
        """The variants, of this job or not, with missing or damaged artifacts or parameters, and which files."""
        return self.catalog.lost_blobs()

    @cached_property
    def missing(self) -> set[str]:
        """The files of the job's own variants that are missing or damaged."""
        return {name for f in self.finished for name in self.lost.get(f.variant, ())}

    @cached_property
    def stands(self) -> set[str | None]:
        """The inputs of the current standings of the recipe's name on its target and machine."""
        names = self.job.registered
        return self.catalog.rankings(self.job.recipe.name, names.target_digest, names.machine_digest)

    @property
    def displaced(self) -> bool:
        """Whether the current standings belong to other inputs while these are known: nothing need be built."""
        return bool(self.finished) and self.stands != {self.job.ranking}

    def plan(self) -> str:
        """Return why a build has something to do, if only to make its own standings current."""
        other = self.displaced and self.stands != {None}  # standings of an earlier schema do not record their inputs
        return self.reason() or (DISPLACED if other else "")

    def reason(self) -> str:
        """Return why the build has something to do; empty when it is up to date."""
        if self.state["ended"] == NEVER:
            return "changed: knobs, objectives, bounds, seed or sampler" if self.finished else NEVER
        if missing := self.missing:
            counts = Counter(self.catalog.kinds(missing).values())
            return f"{', '.join(f'{n} {_many(kind)}' for kind, n in sorted(counts.items()))} are missing or damaged"
        spent_up = self.state["seconds"] >= self.budget.seconds or self.state["ended"].startswith("every point")
        done = sum(not f.reused for f in self.finished)
        if done < self.budget.trials and not spent_up:
            return f"{self.budget.trials - done} of {self.budget.trials} trials to go"
        return "" if self.state["raced"] else "survivors have not been raced"

    def up_to_date(self, seconds: float) -> Outcome:
        """Return the outcome of a build that had nothing to do."""
        names = self.job.registered
        usable = self.catalog.usable(self.job.recipe.name, names.target_digest, names.machine_digest)
        return Outcome(0, len(self.finished), usable, "up to date", seconds)


def _many(kind: str) -> str:
    return kind if kind.endswith("s") else f"{kind}s"


def recognized(job: Job, catalog: Known) -> Job:
    """Return the job with the machine digest of an earlier llmbuild, if the catalog has it."""
    names = catalog.machine_known_as(digest.of(job.machine))
    jobs = [replace(job, known_as=name) for name in names]
    if len(jobs) == 1:
        return jobs[0]
    return next((one for one in jobs if catalog.finished(one.scope)), jobs[0])


def build_key(job: Job, seed: int) -> str:
    """Return the name of a build: the scope and the recipe's settings of the search."""
    recipe = job.recipe
    return digest.of(
        {
            "recipe": recipe.name,
            "scope": job.scope,
            "space": job.space,
            "objectives": recipe.objectives,
            "bounds": (*recipe.constraints, *recipe.quality.bounds),
            "seed": seed,
            **({} if recipe.sampler in ("auto", AUTO) else {"sampler": recipe.sampler}),
        }
    )
