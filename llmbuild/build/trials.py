"""Names, records and order of a build's trials: plain functions over a job's steps and the known trials."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from llmbuild import digest
from llmbuild.build.job import Job
from llmbuild.build.steps import Steps
from llmbuild.catalog.names import Owner
from llmbuild.search.front import standings, value_of
from llmbuild.spec.measurement import Measurement
from llmbuild.spec.program import Program
from llmbuild.spec.slo import METRICS
from llmbuild.spec.space import Point
from llmbuild.spec.trial import Standing, Trial
from llmbuild.spec.variant import Artifact, Failure


def finished_trials(steps: Steps) -> list[Trial]:
    """Return the finished trials of the job's scope; one with a transient failure is not finished."""
    return [t for t in steps.catalog.trials(steps.job.scope) if not (t.failure and not t.failure.lasting)]


def unique(trials: Sequence[Trial]) -> int:
    """Return the number of evaluations among trials: an executable that was measured before costs none."""
    return sum(1 for t in trials if not any("reused" in m.notes for m in t.measurements))


def stand(job: Job, trials: Iterable[Trial]) -> list[Standing]:
    """Return the standing of every trial on every workload."""
    recipe = job.recipe
    bounds = (*recipe.constraints, *recipe.quality.bounds)
    found = list(trials)
    return [s for w in recipe.workloads for s in standings(found, w.name, recipe.objectives, bounds)]


def owner(steps: Steps) -> Owner:
    """Return the fields that all variants of a job share; tokenizer and chat template are added to the store."""
    model, blobs = steps.job.model, steps.catalog.blobs
    tokenizer = blobs.put_file(model.tokenizer) if model.tokenizer else None
    chat = None if model.chat is None else blobs.put_bytes(model.chat)
    names = steps.registered
    job = steps.job
    shared = (job.recipe.name, names.target_digest, names.toolchain_digest, job.lineage)
    return Owner(*shared, tokenizer, job.source, chat)


def trial_of(
    steps: Steps,
    point: Point,
    program: Program | None,
    artifact: Artifact | None,
    measured: tuple[Measurement, ...],
    failure: Failure | None,
    number: int,
    seconds: float,
) -> Trial:
    """Return the record of an evaluated point; without a program, the variant is named by its inputs."""
    return Trial(
        scope=steps.job.scope,
        number=number,
        point=point,
        variant=steps.job.variant(program, point).digest if program else unmade(steps.job, point),
        is_default=point == steps.job.space.default(),
        program=digest.of(program) if program else None,
        artifact=artifact.digest if artifact else None,
        artifact_bytes=artifact.size_bytes if artifact else None,
        parameter_bytes=steps.catalog.blobs.path(program.parameters).stat().st_size if program else None,
        measurements=measured,
        failure=failure,
        seconds=seconds,
    )


def unmade(job: Job, point: Point) -> str:
    """Return the name of a variant without a program, from its inputs."""
    return digest.of({"lineage": job.lineage, "point": point.as_dict()})


def describe(job: Job, point: Point) -> str:
    """Return the differences of a point from the compiler's defaults."""
    default = job.space.default()
    return " ".join(f"{k}={v}" for k, v in point.values if v != default[k]) or "the compiler's defaults"


def rank(trial: Trial, objective: str) -> float:
    """Return the sort key of trials, the best first; a trial without the objective comes last."""
    value = value_of(trial, trial.measurements[0], objective) if trial.measurements else None
    if value is None:
        return math.inf
    return value if METRICS[objective].direction == "min" else -value


def best_of(trials: Sequence[Trial], objective: str) -> str:
    """Return the best median of an objective so far, formatted."""
    best = min(trials, key=lambda t: rank(t, objective))
    value = value_of(best, best.measurements[0], objective) if best.measurements else None
    return "" if value is None else f"{objective} {value:.3g}"


def scoped(measurement: Measurement, scope: str) -> Measurement:
    """Return the key of a measurement within its scope: builds with another text or workload have their own."""
    return replace(measurement, key=digest.of({"measurement": measurement.key, "scope": scope}))
