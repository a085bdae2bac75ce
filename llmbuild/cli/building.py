"""The build commands without parsing and printing: a request in, plain rows out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from llmbuild import digest
from llmbuild.build.build import Build
from llmbuild.build.forecast import forecast, to_go
from llmbuild.build.freshness import Freshness, Outcome, recognized
from llmbuild.build.job import Job
from llmbuild.build.jobs import budget_of, jobs_of, remote_of, tell_once, with_tunings
from llmbuild.build.plan import changes, explained, left_out, plan, until
from llmbuild.build.price import Price
from llmbuild.build.request import BuildRequest
from llmbuild.build.steps import Steps
from llmbuild.build.trials import describe
from llmbuild.catalog.known import Known, known_in, looked_at
from llmbuild.digest import plain
from llmbuild.errors import InputError, LlmbuildError
from llmbuild.report.progress import Progress
from llmbuild.report.targets import runs_here
from llmbuild.runtime import host, reader
from llmbuild.spec.program import Program
from llmbuild.spec.recipe import Budget
from llmbuild.spec.rows import Row
from llmbuild.spec.slo import order
from llmbuild.spec.space import Point
from llmbuild.spec.trial import FRONT
from llmbuild.spec.variant import Artifact, Failure
from llmbuild.system.strict_json import dumps

if TYPE_CHECKING:
    from llmbuild.catalog.writer import Catalog


@dataclass(frozen=True)
class Built:
    """The output of a build: rows of the front and the default, or the plan of a dry run."""

    rows: list[Row]
    usable: bool
    advice: str
    plan: list[dict[str, object]] | None = None
    made: list[dict[str, object]] | None = None
    """The result of an import or a compile, in place of rows: printed unchanged."""


def prefetch(jobs: Sequence[Callable[[], Job]], request: BuildRequest) -> None:
    """With `-j`, build the first points of several jobs in parallel, before any of them measures.

    A job's errors are reported in its turn. Under `-B` each job builds its own points.
    """
    alone = len(jobs) < 2 or request.jobs < 2
    if alone or request.force or request.dry_run or request.until == "import":
        return
    from llmbuild.build.prefetch import make_first_points
    from llmbuild.catalog.writer import Catalog

    catalog = Catalog(request.folder)
    try:
        builds = [build for make in jobs if (build := _startable(make, catalog, request))]
        if len(builds) > 1:
            make_first_points(builds, request.jobs, Progress())
    finally:
        catalog.close()


def _startable(make: Callable[[], Job], catalog: Catalog, request: BuildRequest) -> Build | None:
    """Return the build of a job that has work to do."""
    try:
        job = with_tunings(make(), catalog, request)
        budget = budget_of(job.recipe, request)
    except LlmbuildError:
        return None
    if request.until != "compile" and not Freshness(job, catalog, budget, request.seed).reason():
        return None
    return Build(Steps(job, catalog), budget, request.seed, 1, lambda _: None)


def build(job: Job, request: BuildRequest) -> Built:
    """Build one job up to a step, or return its plan."""
    if request.until in (None, "profile"):
        _runnable(job)
    budget, folder = budget_of(job.recipe, request), request.folder
    for refusal in left_out(job.recipe, job.refused):
        tell_once(f"{job.recipe.name} on {job.target.name}: left out for this model: {refusal}")
    if request.dry_run:
        with looked_at(folder) as known:
            if request.until in (None, "profile"):
                _tell_price(job, known, budget, request)
            return Built([], True, "", _planned(job, known, budget, request))
    known = known_in(folder)
    done = _nothing_to_do(job, known, budget, request) if known else None
    if done:
        return done
    from llmbuild.catalog.phases import winners_of
    from llmbuild.catalog.writer import Catalog

    catalog = Catalog(folder)
    try:
        # the row by which a compile finds the configurations: a merge may have added a set without a name here
        winners_of(catalog, digest.of(job.target.identity()), job.toolchain.compiler)
        job = with_tunings(job, catalog, request)
        if request.explain:
            _explain_to(Progress().say, job, catalog, budget, request)
        return _build(job, catalog, budget, request)
    finally:
        catalog.close()


def _nothing_to_do(job: Job, known: Known, budget: Budget, request: BuildRequest) -> Built | None:
    """Return the output of an up-to-date build; None where there is work to do, or every step is forced."""
    if request.force or request.until or request.explain:
        return None
    begin = monotonic()
    look = Freshness(with_tunings(job, known, request), known, budget, request.seed)
    if look.reason() or look.displaced:
        return None
    done = look.up_to_date(monotonic() - begin)
    talk = Progress()
    talk.say(f"{_named(job)}: up to {budget.trials} trials")
    talk.say(_closing(done, ""))
    return _built(job, known.folder, done)


def _tell_price(job: Job, known: Known | None, budget: Budget, request: BuildRequest) -> None:
    """Print what a build would cost; nothing for one that has nothing to do."""
    job = with_tunings(job, known, request) if known else job
    look = Freshness(job, known, budget, request.seed) if known else None
    if look is None or job.force or look.reason():
        cost = forecast(job, known, look, budget, raced=request.until is None)
        Progress().say(_opening(job, budget, None if job.force else look, cost))


def _planned(job: Job, known: Known | None, budget: Budget, request: BuildRequest) -> list[dict[str, object]]:
    job = with_tunings(job, known, request) if known else job
    steps = until(plan(job, known, budget, request.seed), request.until)
    fields = explained(job, known) if request.explain else {}
    more = [{"key": p.key, "changed": fields if p.reason else {}} if request.explain else {} for p in steps]
    names = {"recipe": job.recipe.name, "target": job.target.name}
    return [{**names, **p.row(), **extra} for p, extra in zip(steps, more, strict=True)]


def _explain_to(say: Callable[[str], None], job: Job, catalog: Catalog, budget: Budget, request: BuildRequest) -> None:
    for step in until(plan(job, catalog, budget, request.seed), request.until):
        say(f"{step.step:<8} {step.reason or 'fresh':<40} {digest.short(step.key)}")
    for name, (was, now) in explained(job, catalog).items():
        say(f"  {name}: {dumps(was)} -> {dumps(now)}")


def _build(job: Job, catalog: Catalog, budget: Budget, request: BuildRequest) -> Built:
    talk = Progress()
    reason = changes(job, catalog)
    doing = Build(Steps(job, catalog), budget, request.seed, request.jobs, talk)
    if request.until == "import":
        return _imported(job, doing.import_())
    if request.until == "compile":
        return _compiled(job, doing.compile())
    cost = forecast(job, catalog, doing.freshness, budget, raced=request.until is None)
    talk.say(_opening(job, budget, None if job.force else doing.freshness, cost))
    if job.remote is None and (held := host.conditions().slowed()):
        talk.say(f"readings will be marked: {held}")
    if catalog.sources(job.recipe.name) - {job.source}:
        talk.say(f"{job.recipe.name} names another model than before: its weights or its tokenizer are new here")
    done = doing.run(raced=request.until is None)
    talk.say(_closing(done, reason))
    return _built(job, catalog.folder, done)


def _named(job: Job) -> str:
    return f"{job.recipe.name} on {job.target.name} ({job.target.cpu})"


def _opening(job: Job, budget: Budget, look: Freshness | None, cost: Price | None) -> str:
    """Return the first line of a build: what there is to do, how long that takes, and what it adds to the catalog."""
    count = to_go(look, budget)
    what = f"up to {count} trials"
    if look and look.finished:
        what = f"{count} of {budget.trials} trials to go" if count else look.plan() or "all trials are known"
    return f"{_named(job)}: {what}" + (f"; {cost.told()}" if cost and cost.seconds else "")


def tune(variant: str, catalog: Path) -> list[dict[str, object]]:
    """Tune the dispatches of a variant and return one row for each kind that matters."""
    from llmbuild.build.tune import Tuner

    talk = Progress()
    tuner = Tuner(catalog, variant, talk)
    try:
        done = tuner.run()
    finally:
        tuner.catalog.close()
    if done.ratio is None:
        talk.say("nothing new won: the catalog's configurations stay as they are")
    else:
        told = f"time per token {done.ratio.median:.3f} [{done.ratio.low:.3f}, {done.ratio.high:.3f}] of that without"
        talk.say(f"whole model: {told}; " + (f"builds try tuning={done.name}" if done.name else "nothing is kept"))
    return [plain(kind) for kind in done.kinds]


def _imported(job: Job, done: Sequence[tuple[Point, Program | Failure]]) -> Built:
    rows = [_made_row(job, point, made, "program") for point, made in done]
    return Built([], any(r["program"] for r in rows), f"nothing imported: {_first_failure(rows)}", made=rows)


def _compiled(job: Job, done: Sequence[tuple[Point, Artifact | Failure]]) -> Built:
    rows = [_made_row(job, point, made, "artifact") for point, made in done]
    return Built([], any(r["artifact"] for r in rows), f"nothing compiled: {_first_failure(rows)}", made=rows)


def _first_failure(rows: Sequence[dict[str, object]]) -> str:
    return next((str(r["failure"]) for r in rows if r["failure"]), "no point to try")


def _closing(done: Outcome, reason: str) -> str:
    if not done.made and done.ended == "up to date":
        return f"nothing to do: all {done.known} trials are up to date ({done.seconds:.2f} s)"
    why = f" ({reason})" if reason else ""
    return f"{done.made} trials made{why}, {done.known} known, {done.usable} usable; {done.ended}, {done.seconds:.0f} s"


def _built(job: Job, folder: Path, done: Outcome) -> Built:
    machine = digest.of(job.machine)
    rows = reader.variants(folder, job.recipe.name, job.target.name, everything=not done.usable, default=True)
    mine = [r for r in rows if r["machine_digest"] == machine and (r["default"] or r["status"] in FRONT)]
    failed = [r for r in rows if r["status"] in ("failed", "infeasible")]
    why = "; ".join(sorted({str(r["reason"])[:160] for r in failed})[:3])
    return Built(
        sorted(mine, key=order("tpot_s")),
        done.usable > 0,
        f"nothing usable came of {done.known} trials: {why}; `llmbuild query --all` lists them",
    )


def _runnable(job: Job) -> None:
    """Refuse to measure code that the measuring host cannot run."""
    facts = job.remote.facts if job.remote is not None else None
    where = job.remote.place.destination if job.remote is not None else "this host"
    sign, _, why = runs_here(job.target, facts).partition(": ")
    if sign == "no":
        raise InputError(
            f"target {job.target.name} cannot run on {where}: {why}. `llmbuild compile -t {job.target.name}` makes "
            "its artifacts here, `llmbuild profile` measures them on a host that has it"
        )


def compile_only(job: Job, request: BuildRequest) -> Built:
    """Compile the points that are tried first, for any target."""
    return build(job, replace(request, until="compile"))


def _made_row(job: Job, point: Point, made: Program | Artifact | Failure, kind: str) -> dict[str, object]:
    row: dict[str, object] = {"model": job.recipe.name, "target": job.target.name, "choices": describe(job, point)}
    row[kind] = "" if isinstance(made, Failure) else made.digest if isinstance(made, Artifact) else digest.of(made)
    if kind == "artifact":
        row["artifact_bytes"] = made.size_bytes if isinstance(made, Artifact) else None
    return {**row, "failure": f"{made.stage}: {made.reason}" if isinstance(made, Failure) else ""}


def profile(what: Sequence[str], request: BuildRequest) -> Built:
    """Measure compiled variants: every compiled point of recipes, or single variants again."""
    files, variants = _files_and_variants(what)
    jobs = jobs_of(replace(request, recipes=files))
    built = [_profile_recipe(job(), request) for job in jobs]
    if variants:
        from llmbuild.build.remeasure import remeasure

        built.append(Built(remeasure(request.folder, variants, Progress(), remote_of(request)), True, ""))
    return Built([r for b in built for r in b.rows], all(b.usable for b in built), "; ".join(b.advice for b in built))


def profile_load(
    what: Sequence[str], request: BuildRequest, budget: str | None, sequences: int | None
) -> list[dict[str, object]]:
    """Measure the load curves of variants, or of a recipe's front, on this machine, and return a row for each.

    Raises:
        InputError: another machine is asked for, or nothing can be measured.
    """
    from llmbuild.build.loads import Asked, front_of, measure_loads
    from llmbuild.build.request import seconds_of
    from llmbuild.report.loads import rows as load_rows

    if request.on is not None:
        raise InputError("--load measures on this machine alone: run it where the variant is to be served")
    files, variants = _files_and_variants(what)
    for make in jobs_of(replace(request, recipes=files)):
        job = make()
        variants += front_of(request.folder, job.recipe.name, job.target.name)
    given = {"budget_s": seconds_of(budget) if budget else None, "sequences": sequences}
    asked = Asked(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    return load_rows(measure_loads(request.folder, variants, asked, Progress().say))


def profile_answers(
    what: Sequence[str],
    catalog: Path,
    answers: Path,
    output: Path | None,
    held_out: Path | None,
    max_tokens: int | None,
) -> list[dict[str, object]]:
    """Train a predictor of the lengths of a variant's answers, write it, and return how it does on unseen prompts.

    Raises:
        InputError: not one variant, no file to write, or the prompts cannot be read or answered.
    """
    from llmbuild.report.lengths import rows as length_rows
    from llmbuild.serve.learn import Sampled, answered, held_out_text, read, trained
    from llmbuild.serve.predict.files import put, write

    variants = _files_and_variants(what)[1]
    if len(what) != 1 or len(variants) != 1:
        raise InputError("--answers takes one VARIANT, by its digest")
    if output is None:
        raise InputError("--answers needs -o FILE: where the predictor is written")
    sampled = Sampled() if max_tokens is None else Sampled(max_tokens)
    made, header = answered(read(answers), catalog, variants[0], sampled, Progress().say)
    done = trained(made)
    write(output, done.model, header)
    if held_out is not None:
        put(held_out, held_out_text(made, header, done).encode())
    return length_rows(done.scores)


def _files_and_variants(what: Sequence[str]) -> tuple[tuple[Path, ...], list[str]]:
    """Return the recipes' files and the variants among arguments."""
    files = [name for name in what if name.endswith((".yaml", ".yml"))]
    return tuple(map(Path, files)), [name for name in what if name not in files]


def _profile_recipe(job: Job, request: BuildRequest) -> Built:
    from llmbuild.catalog.writer import Catalog

    _runnable(job)
    catalog = Catalog(request.folder)
    try:
        job = recognized(job, catalog)
        points = catalog.compiled(job.lineage)
        if not points:
            raise InputError(
                f"nothing of {job.recipe.name} is compiled for {job.target.name}: run `llmbuild compile` first"
            )
        budget = replace(job.recipe.budget, trials=len(points))
        done = Build(Steps(job, catalog), budget, 0, 1, Progress()).measure(points)
        return _built(job, catalog.folder, done)
    finally:
        catalog.close()
