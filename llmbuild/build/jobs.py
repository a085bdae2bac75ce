"""The jobs of a request: each recipe on each target, checked and reported before any work."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from llmbuild import digest
from llmbuild.build import toolchain
from llmbuild.build.farm import cluster_of, is_cluster
from llmbuild.build.freshness import recognized
from llmbuild.build.job import Job, make_job
from llmbuild.build.request import BuildRequest
from llmbuild.build.targets import find_target, highest_target
from llmbuild.catalog.known import Known, name_of
from llmbuild.catalog.place import exists
from llmbuild.compiler.calls import Runner, here
from llmbuild.compiler.resolved import Answers
from llmbuild.errors import InputError
from llmbuild.runtime import host
from llmbuild.search.knobs.space import for_cpus, with_tuning
from llmbuild.spec.files.reader import read_recipe
from llmbuild.spec.recipe import Budget, Recipe
from llmbuild.spec.target import HOST

if TYPE_CHECKING:
    from llmbuild.profiler.remote import Remote


def jobs_of(request: BuildRequest) -> list[Callable[[], Job]]:
    """Return a function that makes the job for each recipe on each target; errors are raised when it is called.

    A second recipe with the same name and other contents is refused: one would replace the other's standings.
    """
    place = place_of(request)
    names = request.targets or (HOST,)
    taken: dict[tuple[str, str], tuple[Path, str]] = {}

    def make(path: Path, target: str) -> Job:
        job = job_of(path, target, request, place.remote(target), place.run)
        named = (job.recipe.name, job.registered.target_digest)
        other, asked = taken.setdefault(named, (path, job.ranking))
        if other != path and asked != job.ranking:
            raise InputError(
                f"{path}: `name: {job.recipe.name}` is that of {other} too, which asks for other things: "
                "give one of them another name"
            )
        return job

    return [partial(make, path, name) for path in request.recipes for name in names]


def job_of(path: Path, target: str, request: BuildRequest, remote: Remote | None = None, run: Runner = here) -> Job:
    """Return the job of a recipe on a target.

    Raises:
        InputError: the recipe, the target, the model or a pin is invalid.
    """
    pinned = dict(request.pins)
    recipe = read_recipe(path)
    if request.random_init and not recipe.model.random_init:
        # A shape gets another name, so that its speed never replaces a real model's front.
        recipe = replace(read_recipe(path, random_init=True), name=f"{recipe.name}-random-init")
    recipe = replace(recipe, sampler=request.sampler or recipe.sampler)
    answers, tools, force = answers_of(request), toolchain.current(), request.force
    if remote is None:
        named = find_target(target)
        if left_out := for_cpus(recipe, named):
            tell_once(f"{recipe.name}: {named.name} is no CPU, so without its knobs {', '.join(sorted(left_out))}")
        return _with_notes(make_job(recipe, named, pinned, host.machine(), tools, force, answers, run=run))
    chosen = highest_target(remote.facts, answers) if target == HOST else find_target(target)
    return _with_notes(make_job(recipe, chosen, pinned, remote.machine, tools, force, answers, remote, run))


@dataclass(frozen=True)
class Where:
    """Who runs the compiler, and who measures a target: None is this host."""

    run: Runner = here
    remote: Callable[[str], Remote | None] = lambda _: None


def place_of(request: BuildRequest) -> Where:
    """Return where a request is built: on this host, or elsewhere.

    Raises:
        InputError: the place is not written as one, or no cluster answers.
    """
    if not request.on:
        return Where()
    if not is_cluster(request.on):
        from llmbuild.profiler.remote import Remote
        from llmbuild.profiler.remote import place_of as ssh_of

        remote = Remote(ssh_of(request.on))
        return Where(remote=lambda _: remote)
    cluster = cluster_of(request.on)
    measures = request.until in (None, "profile")
    return Where(cluster.run, cluster.remote if measures else lambda _: None)


def remote_of(request: BuildRequest) -> Remote | None:
    """Return the remote machine that measures what is compiled for any target; None for this host."""
    return place_of(request).remote(HOST)


def answers_of(request: BuildRequest) -> Answers | None:
    """Return where the compiler's test results for targets are cached: in the catalog, if there is one."""
    folder = request.catalog
    return Answers(folder / "targets", not request.dry_run) if folder and exists(folder) else None


def budget_of(recipe: Recipe, request: BuildRequest) -> Budget:
    """Return the recipe's budget, with the request's overrides."""
    budget = recipe.budget
    seconds = budget.seconds if request.budget_s is None else request.budget_s
    return replace(budget, seconds=seconds, trials=request.trials or budget.trials)


def with_tunings(job: Job, catalog: Known, request: BuildRequest) -> Job:
    """Return the job with the dispatch configurations that won on its target in any earlier build."""
    asked = {*dict(job.recipe.knobs), *dict(request.pins)}
    won = catalog.tunings(digest.of(job.target.identity()), job.toolchain.compiler)
    return recognized(replace(job, space=with_tuning(job.space, name_of(won), asked)), catalog)


def _with_notes(job: Job) -> Job:
    """Print a job's notes before any work, once for all targets."""
    for note in job.notes:
        tell_once(f"note: {job.recipe.name}: {note}")
    return job


@cache
def tell_once(text: str) -> None:
    """Print a line that was not printed before."""
    print(text, file=sys.stderr)
