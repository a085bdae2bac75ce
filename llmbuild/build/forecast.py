"""What a job's build has to do, as its price is computed from: from the job, and its catalog where there is one."""

from __future__ import annotations

from itertools import cycle, islice, product

from llmbuild.build.freshness import Freshness
from llmbuild.build.job import Job
from llmbuild.build.price import Archive, Asked, Earlier, Price, price
from llmbuild.catalog.known import Known
from llmbuild.profiler.heldout import WINDOW
from llmbuild.search.warm_start import initial_points
from llmbuild.spec.formats import in_panels
from llmbuild.spec.recipe import Budget
from llmbuild.spec.space import Point

FORMAT = "weight_format"


def to_go(look: Freshness | None, budget: Budget) -> int:
    """Return how many trials a build makes at most; `look` is at its catalog, None where there is none."""
    return max(0, budget.trials - sum(not f.reused for f in look.finished)) if look else budget.trials


def forecast(
    job: Job, catalog: Known | None, look: Freshness | None, budget: Budget, raced: bool = True
) -> Price | None:
    """Return what is left of a job's build; None for a model whose sizes are not known.

    Under `-B` everything is left. The price leaves out what other builds of the catalog may have made already.
    """
    if job.facts is None:
        return None
    look = None if job.force else look
    trials, spent_s = to_go(look, budget), float(look.state["seconds"]) if look else 0.0
    done = [f.point for f in look.finished] if look else []
    race = raced and (trials > 0 or look is None or not look.state["raced"])
    machine = job.registered.machine_digest
    asked = Asked(
        facts=job.facts,
        trials=trials if spent_s < budget.seconds or not done else 0,
        archives=_archives(job, done, trials),
        reference_tokens=0 if done or job.scored() else _windows(job) * min(WINDOW, job.recipe.context),
        budget_s=max(0.0, budget.seconds - spent_s),
        race_s=race_s(job) if race else 0.0,
        first=(trials > 0 or race) and job.target.is_cpu and not (catalog and catalog.has_limits(machine)),
        earlier=[Earlier(*one) for one in catalog.earlier(machine)] if catalog else [],
    )
    return price(asked)


def race_s(job: Job) -> float:
    """Return the seconds that a race has at most."""
    return job.protocol.race_seconds * len(job.recipe.workloads)


def _windows(job: Job) -> int:
    return max(1, job.recipe.quality.tokens // min(WINDOW, job.recipe.context))


def _archives(job: Job, done: list[Point], trials: int) -> list[Archive]:
    """Return the archives that the trials to go import: of the first points, then one format after another."""
    known = {_archive(job, point) for point in done}
    first = [point for point in initial_points(job.space) if point not in done][:trials]
    new = {key: point for point in first if (key := _archive(job, point)) not in known}
    made = [Archive.of(point.as_dict()) for point in new.values()]
    domains = {knob.name: knob.domain for knob in job.space.knobs}
    choices = product(domains.get("kernel", ()), domains.get("layout", ()))
    panels = job.target.is_cpu and any(in_panels({"kernel": kernel, "layout": layout}) for kernel, layout in choices)
    rest = cycle([str(form) for form in domains.get(FORMAT, ("f32",))])
    return [*made, *(Archive(form, panels=panels) for form in islice(rest, max(0, trials - len(first))))]


def _archive(job: Job, point: Point) -> Point:
    return Point.of(job.space.level(point, "model"))
