"""What each command does, apart from parsing and printing: options in, plain rows out."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import llmbuild
from llmbuild import digest, toolchain
from llmbuild.build import Build
from llmbuild.catalog.known import Known, known_in, looked_at, name_of
from llmbuild.catalog.place import exists
from llmbuild.compiler import iree
from llmbuild.compiler.resolved import Answers, resolve
from llmbuild.compiling import written
from llmbuild.digest import plain
from llmbuild.errors import InputError, LlmbuildError
from llmbuild.freshness import Look, Outcome, recognized
from llmbuild.plan import changes, explained, left_out, plan, until
from llmbuild.report.explain import explain as explain_text
from llmbuild.report.knobs import knob_rows
from llmbuild.report.progress import Progress
from llmbuild.report.rows import public
from llmbuild.report.targets import rows as target_rows
from llmbuild.report.targets import runs_here
from llmbuild.runtime import host, reader
from llmbuild.runtime.choose import HostFacts
from llmbuild.search.knobs import for_cpus, with_tuning
from llmbuild.spec.reader import read_recipe, read_target, seconds
from llmbuild.spec.recipe import Budget, Recipe
from llmbuild.spec.slo import METRICS, parse_slo
from llmbuild.spec.space import Point
from llmbuild.spec.target import BACKENDS, HOST, LLVM_CPU, Target, target_from
from llmbuild.spec.trial import FRONT
from llmbuild.spec.variant import Failure
from llmbuild.steps import Job, Steps, make_job
from llmbuild.strict import dumps
from llmbuild.trials import describe

if TYPE_CHECKING:
    from llmbuild.catalog.writer import Catalog
    from llmbuild.profiler.remote import Remote

Options = dict[str, Any]


@dataclass(frozen=True)
class Built:
    """What a build has to show: rows of the front and the default, or the plan of a dry run."""

    rows: list[dict[str, Any]]
    usable: bool
    advice: str
    plan: list[dict[str, Any]] | None = None
    plain: bool = False
    """Rows are not those of the contract: print them as they are."""


# --- recipes and targets -----------------------------------------------------------------------------------------


def each(recipes: Sequence[Path], options: Options) -> list[Callable[[], Job]]:
    """Return one way to make a job for each recipe on each target; what is wrong is told when it is called.

    Of two recipes of one name that ask for different things, the second is refused: one would take the other's place.
    """
    remote = _remote(options)
    names = options["targets"] or (HOST,)
    taken: dict[tuple[str, str], tuple[Path, str]] = {}

    def make(path: Path, target: str) -> Job:
        job = _job(path, target, options, remote)
        place = (job.recipe.name, job.registered.target_digest)
        other, asked = taken.setdefault(place, (path, job.ranking))
        if other != path and asked != job.ranking:
            raise InputError(
                f"{path}: `name: {job.recipe.name}` is that of {other} too, which asks for other things: "
                "give one of them another name"
            )
        return job

    return [partial(make, path, name) for path in recipes for name in names]


def ahead(jobs: Sequence[Callable[[], Job]], options: Options) -> None:
    """With `-j`, make what several jobs try first side by side, before any of them measures.

    What is wrong with a job is told when its turn comes. Under `-B` each job makes its own.
    """
    alone = len(jobs) < 2 or options["jobs"] < 2
    if alone or options["force"] or options["dry_run"] or options.get("until") == "import":
        return
    from llmbuild.ahead import make_ahead
    from llmbuild.catalog.writer import Catalog

    catalog = Catalog(Path(options["catalog"]))
    try:
        builds = [build for make in jobs if (build := _startable(make, catalog, options))]
        if len(builds) > 1:
            make_ahead(builds, options["jobs"], Progress())
    finally:
        catalog.close()


def _startable(make: Callable[[], Job], catalog: Catalog, options: Options) -> Build | None:
    """Return the build of a job that has something to do."""
    try:
        job = _with_winners(make(), catalog, options)
        budget = budget_of(job.recipe, options)
    except LlmbuildError:
        return None
    if options.get("until") != "compile" and not Look(job, catalog, budget, options["seed"]).reason():
        return None
    return Build(Steps(job, catalog), budget, options["seed"], 1, lambda _: None)


def _remote(options: Options) -> Remote | None:
    """Return the machine that is measured on; None for this one."""
    if not options.get("on"):
        return None
    from llmbuild.profiler.remote import Remote, place_of

    return Remote(place_of(options["on"]))


def _job(path: Path, target: str, options: Options, remote: Remote | None = None) -> Job:
    pinned = _pins(options["pinned"])
    recipe = read_recipe(path)
    if options["random_init"] and not recipe.model.random_init:
        # another name, so that a shape's speed never takes the place of a real model's front
        recipe = replace(recipe, name=f"{recipe.name}-random-init", model=replace(recipe.model, random_init=True))
    answers, tools, force = _answers(options), toolchain.current(), options["force"]
    if remote is None:
        named = find_target(target)
        if unheard := for_cpus(recipe, named):
            _tell_once(f"{recipe.name}: {named.name} is no CPU, so without its knobs {', '.join(sorted(unheard))}")
        return _told(make_job(recipe, named, pinned, host.machine(), tools, force, answers))
    chosen = highest_target(remote.facts, answers) if target == HOST else find_target(target)
    return _told(make_job(recipe, chosen, pinned, remote.machine, tools, force, answers, remote))


def _told(job: Job) -> Job:
    """Say what is worth telling of a job before anything is done, once for all targets."""
    for note in job.notes:
        _tell_once(f"note: {job.recipe.name}: {note}")
    return job


@cache
def _tell_once(text: str) -> None:
    print(text, file=sys.stderr)


def _answers(options: Options) -> Answers | None:
    """Return where the compiler's answers on targets are kept: in the catalog, where there is one."""
    folder = Path(options["catalog"]) if options.get("catalog") else None
    return Answers(folder / "targets", not options.get("dry_run")) if folder and exists(folder) else None


def highest_target(facts: HostFacts, answers: Answers | None = None) -> Target:
    """Return the target that asks for most of what a host has.

    Raises:
        InputError: no target is for such a host.
    """
    ours = [t for t in _target_files() if t.backend == "llvm-cpu" and t.arch == facts.arch]
    resolved = [resolve(target, answers) for target in ours]
    fitting = [t for t in resolved if facts.features.issuperset(t.requires)]
    if not fitting:
        raise InputError(f"no target is for a {facts.arch} host with these features: name one with -t")
    return max(fitting, key=lambda t: len(t.requires))


def _pins(texts: Sequence[str]) -> dict[str, str]:
    pins = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name:
            raise InputError(f"cannot read --set {text!r}: write KNOB=VALUE")
        pins[name.strip()] = value.strip()
    return pins


def target_folders() -> list[Path]:
    """Return where target files are looked for: here, beside the package, inside it."""
    package = Path(llmbuild.__file__).parent
    return [Path("targets"), package.parent / "targets", package / "targets"]


def find_target(name: str) -> Target:
    """Return a target by name or file; `host` is built in.

    Raises:
        InputError: no such target.
    """
    if name == HOST:
        kind = BACKENDS[LLVM_CPU]
        arch, told = host.architecture(), "this machine"
        return Target(HOST, LLVM_CPU, arch, HOST, description=told, device=kind.device, meters=kind.meters)
    if name.endswith((".yaml", ".yml")):
        return read_target(Path(name))
    for folder in target_folders():
        if (folder / f"{name}.yaml").is_file():
            return read_target(folder / f"{name}.yaml")
    known = ", ".join(target_names())
    raise InputError(f"unknown target {name!r}; there are {known}, or name a file")


def target_names() -> list[str]:
    """Return the names of all targets: this host, and those of files."""
    return [HOST, *(target.name for target in _target_files())]


def _target_files() -> list[Target]:
    found: dict[str, Path] = {}
    for folder in target_folders():
        for path in sorted(folder.glob("*.yaml")) if folder.is_dir() else []:
            found.setdefault(path.stem, path)
    return [read_target(path) for path in found.values()]


def budget_of(recipe: Recipe, options: Options) -> Budget:
    """Return the recipe's budget, as far as the command line does not say otherwise."""
    budget = recipe.budget
    if options.get("budget"):
        try:
            budget = replace(budget, seconds=seconds(options["budget"]))
        except ValueError as error:
            raise InputError(f"--budget: {error}") from None
    return replace(budget, trials=options.get("trials") or budget.trials)


# --- build, compile, profile -------------------------------------------------------------------------------------


def build(job: Job, options: Options) -> Built:
    """Build one job up to a step, or say what would be done and why."""
    if options.get("until") in (None, "profile"):
        _runnable(job)
    budget, folder = budget_of(job.recipe, options), Path(options["catalog"])
    for refusal in left_out(job.recipe, job.refused):
        _tell_once(f"{job.recipe.name} on {job.target.name}: left out for this model: {refusal}")
    if options["dry_run"]:
        with looked_at(folder) as known:
            return Built([], True, "", _planned(job, known, budget, options))
    known = known_in(folder)
    done = _nothing_to_do(job, known, budget, options) if known else None
    if done:
        return done
    from llmbuild.catalog.phases import winners_of
    from llmbuild.catalog.writer import Catalog

    catalog = Catalog(folder)
    try:
        # the row by which a compile finds them: a merge may have brought a set that was never named here
        winners_of(catalog, digest.of(job.target.identity()), job.toolchain.compiler)
        job = _with_winners(job, catalog, options)
        if options.get("explain"):
            _explain_to(Progress().say, job, catalog, budget, options)
        return _build(job, catalog, budget, options)
    finally:
        catalog.close()


def _nothing_to_do(job: Job, known: Known, budget: Budget, options: Options) -> Built | None:
    """Return what a build shows that is up to date; None where there is something to do, or every step is asked for."""
    if options["force"] or options.get("until") or options.get("explain"):
        return None
    begin = monotonic()
    look = Look(_with_winners(job, known, options), known, budget, options["seed"])
    if look.reason() or look.displaced:
        return None
    done = look.up_to_date(monotonic() - begin)
    talk = Progress()
    talk.say(_opening(job, budget))
    talk.say(_closing(done, ""))
    return _built(job, known.folder, done)


def _planned(job: Job, known: Known | None, budget: Budget, options: Options) -> list[dict[str, Any]]:
    job = _with_winners(job, known, options) if known else job
    steps = until(plan(job, known, budget, options["seed"]), options.get("until"))
    fields = explained(job, known) if options.get("explain") else {}
    more = [{"key": p.key, "changed": fields if p.reason else {}} if options.get("explain") else {} for p in steps]
    names = {"recipe": job.recipe.name, "target": job.target.name}
    return [{**names, **p.row(), **extra} for p, extra in zip(steps, more, strict=True)]


def _explain_to(say: Callable[[str], None], job: Job, catalog: Catalog, budget: Budget, options: Options) -> None:
    for step in until(plan(job, catalog, budget, options["seed"]), options.get("until")):
        say(f"{step.step:<8} {step.reason or 'fresh':<40} {digest.short(step.key)}")
    for name, (was, now) in explained(job, catalog).items():
        say(f"  {name}: {dumps(was)} -> {dumps(now)}")


def _build(job: Job, catalog: Catalog, budget: Budget, options: Options) -> Built:
    talk = Progress()
    reason = changes(job, catalog)
    doing = Build(Steps(job, catalog), budget, options["seed"], options["jobs"], talk)
    if options.get("until") == "import":
        return _imported(job, doing.import_())
    if options.get("until") == "compile":
        return _compiled(job, doing.compile())
    talk.say(_opening(job, budget))
    if job.remote is None and (held := host.conditions().slowed()):
        talk.say(f"readings will be marked: {held}")
    if catalog.sources(job.recipe.name) - {job.source}:
        talk.say(f"{job.recipe.name} names another model than before: its weights or its tokenizer are new here")
    done = doing.run(race=options.get("until") is None)
    talk.say(_closing(done, reason))
    return _built(job, catalog.folder, done)


def _opening(job: Job, budget: Budget) -> str:
    return f"{job.recipe.name} on {job.target.name} ({job.target.cpu}): up to {budget.trials} trials"


def _with_winners(job: Job, catalog: Known, options: Options) -> Job:
    """Return the job with the configurations of dispatches that won before on its target, in any build."""
    asked = {*dict(job.recipe.knobs), *_pins(options["pinned"])}
    won = catalog.tunings(digest.of(job.target.identity()), job.toolchain.compiler)
    return recognized(replace(job, space=with_tuning(job.space, name_of(won), asked)), catalog)


def tune(variant: str, options: Options) -> list[dict[str, Any]]:
    """Tune the dispatches of a variant and return one row for each kind that matters."""
    from llmbuild.tuning import Tuner

    talk = Progress()
    tuner = Tuner(Path(options["catalog"]), variant, talk)
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


def _imported(job: Job, done: Sequence[tuple[Point, Any]]) -> Built:
    rows = [_made_row(job, point, made, "program") for point, made in done]
    return Built(rows, any(r["program"] for r in rows), f"nothing imported: {_first_failure(rows)}", plain=True)


def _compiled(job: Job, done: Sequence[tuple[Point, Any]]) -> Built:
    rows = [_made_row(job, point, made, "artifact") for point, made in done]
    return Built(rows, any(r["artifact"] for r in rows), f"nothing compiled: {_first_failure(rows)}", plain=True)


def _first_failure(rows: Sequence[dict[str, Any]]) -> str:
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
        sorted(mine, key=_order("tpot_s")),
        done.usable > 0,
        f"nothing usable came of {done.known} trials: {why}; `llmbuild query --all` lists them",
    )


def _runnable(job: Job) -> None:
    """Refuse to measure code that the host which is to run it cannot run."""
    facts = job.remote.facts if job.remote is not None else None
    where = job.remote.place.destination if job.remote is not None else "this host"
    sign, _, why = runs_here(job.target, facts).partition(": ")
    if sign == "no":
        raise InputError(
            f"target {job.target.name} cannot run on {where}: {why}. `llmbuild compile -t {job.target.name}` makes "
            "its artifacts here, `llmbuild profile` measures them on a host that has it"
        )


def compile_only(job: Job, options: Options) -> Built:
    """Compile the points that are tried first, for any target."""
    return build(job, {**options, "until": "compile"})


def _made_row(job: Job, point: Point, made: Any, kind: str) -> dict[str, Any]:
    failed = isinstance(made, Failure)
    row: dict[str, Any] = {"model": job.recipe.name, "target": job.target.name, "choices": describe(job, point)}
    row[kind] = "" if failed else digest.of(made) if kind == "program" else made.digest
    if kind == "artifact":
        row["artifact_bytes"] = None if failed else made.size_bytes
    return {**row, "failure": f"{made.stage}: {made.reason}" if failed else ""}


def profile(what: Sequence[str], options: Options) -> Built:
    """Measure what is compiled: every compiled point of recipes, or single variants anew."""
    files = [name for name in what if name.endswith((".yaml", ".yml"))]
    variants = [name for name in what if name not in files]
    settings = {"pinned": (), "force": False, **options}
    jobs = each([Path(name) for name in files], settings)
    built = [_profile_recipe(job(), settings) for job in jobs]
    if variants:
        from llmbuild.remeasure import remeasure

        rows = remeasure(Path(options["catalog"]), variants, Progress(), _remote(options))
        built.append(Built(rows, True, ""))
    return Built([r for b in built for r in b.rows], all(b.usable for b in built), "; ".join(b.advice for b in built))


def _profile_recipe(job: Job, options: Options) -> Built:
    from llmbuild.catalog.writer import Catalog

    _runnable(job)
    catalog = Catalog(Path(options["catalog"]))
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


# --- reading -----------------------------------------------------------------------------------------------------


def _order(metric: str) -> Callable[[dict[str, Any]], tuple[bool, float]]:
    sign = 1.0 if METRICS[metric].direction == "min" else -1.0
    return lambda row: (row.get(metric) is None, sign * (row.get(metric) or 0.0))


def query(options: Options) -> list[dict[str, Any]]:
    """Return the rows that meet an SLO, the best first."""
    slo = parse_slo(options["slo"], options["objective"])
    folder, everything = Path(options["catalog"]), options["everything"]
    rows = reader.variants(folder, options["model"], options["target"], options["workload"], everything, slo)
    return sorted(rows, key=_order(slo.objective))


def explain(prefix: str, catalog: Path, as_json: bool) -> str:
    """Return the story of a variant."""
    rows = reader.find_variant(catalog, prefix)
    command, by_hand = _compile_line(catalog, rows[0]), written(target_from(rows[0]["target_body"]), rows[0]["point"])
    if as_json:
        more = {"compile": command, "written": by_hand}
        return dumps([{**public(r), "program": r["program"], "parameters": r["parameters"], **more} for r in rows])
    return explain_text(rows, command, by_hand)


def _compile_line(catalog: Path, row: dict[str, Any]) -> str:
    """Return the command that compiles a variant again from the blobs of its catalog."""
    if not row["program"]:
        return ""
    with reader.opened(catalog) as connection:
        module = connection.execute("SELECT module FROM program WHERE digest = ?", (row["program"],)).fetchone()[0]
    target = target_from(row["target_body"])
    tool = "iree-compile" if iree.compiler_version() == "absent" else ""  # what is only told needs no compiler
    command = iree.compile_command(reader.blob_path(catalog, module), Path("out.vmfb"), target, row["point"], tool)
    return shlex.join(command)


def targets(options: Options) -> list[dict[str, Any]]:
    """Return every target, or those that are named, and whether each compiles and runs here."""
    chosen = [find_target(name) for name in options["targets"]] or [find_target(HOST), *_target_files()]
    return target_rows(chosen, _answers(options), options["probed"])


def knobs(names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the knobs of the search space, then what is left out of it on purpose; those of one target, if named."""
    if len(names) > 1:
        raise InputError("--knobs lists all knobs, or with one -t those of that target")
    return knob_rows(find_target(names[0]) if names else None)


def doctor(catalog: Path) -> list[dict[str, Any]]:
    """Return what was checked, what was found, and what to do about it."""
    from llmbuild.report.doctor import checks

    return checks(catalog)
