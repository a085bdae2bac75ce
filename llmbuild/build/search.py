"""The search loop: ask a study for points, evaluate them, tell it the results, until the budget is spent."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from llmbuild.build.evaluate import Evaluator
from llmbuild.spec.space import Point

if TYPE_CHECKING:
    from llmbuild.search.study import TrialStudy

LESSONS = 4
"""Maximum number of other studies of the catalog that a search learns from, the latest first."""


def search(evaluator: Evaluator, seed: int, spent: Callable[[], float]) -> str:
    """Evaluate points until the budget is spent or all are known; return why it ended.

    `spent` returns the seconds that the build has taken.
    """
    study, results, budget = study_of(evaluator, seed), evaluator.results, evaluator.budget
    while True:
        if results.evaluations >= budget.trials:
            return f"{budget.trials} trials done"
        if results.known and spent() >= budget.seconds:
            return f"{budget.seconds:.0f} s spent"
        batch = _next_batch(study, evaluator)
        if not batch:
            return "every point of the space is known"
        done = evaluator.evaluate(batch)
        for trial in done:
            study.tell(trial)
        for point in {*batch} - {t.point for t in done}:
            study.refuse(point)


def study_of(evaluator: Evaluator, seed: int) -> TrialStudy:
    """Return the study of a job: its known trials, and lessons from other studies of the catalog."""
    from llmbuild.search.study import TrialStudy
    from llmbuild.search.transfer import lesson, shipped

    job, catalog, recipe = evaluator.job, evaluator.catalog, evaluator.job.recipe
    bounds = (*recipe.constraints, *recipe.quality.bounds)
    related = catalog.fronts_elsewhere(recipe.name, evaluator.steps.registered.target_digest)
    elsewhere = catalog.trials_elsewhere(job.scope, job.target.backend, LESSONS)
    found = [lesson(trials, recipe.objectives) for trials in elsewhere]
    lessons = [*shipped(job.target.backend), *(one for one in found if one)]
    known = evaluator.results.known
    return TrialStudy(job.space, recipe.objectives, seed, known, bounds, related, lessons, recipe.sampler)


def _next_batch(study: TrialStudy, evaluator: Evaluator) -> list[Point]:
    """Ask for as many points as compile in parallel; point 0 alone, since all others are paired with it."""
    results = evaluator.results
    wanted = min(evaluator.jobs, evaluator.budget.trials - results.evaluations) if results.known else 1
    asked = (study.ask() for _ in range(wanted))
    return [point for point in asked if point is not None]
