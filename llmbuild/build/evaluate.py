"""The evaluation of points: make their artifacts in parallel, measure them one at a time, record each when it ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING

from llmbuild.build.events import Event, Stopwatch, Tell
from llmbuild.build.parallel import side_by_side
from llmbuild.build.results import Results
from llmbuild.build.room import no_memory
from llmbuild.build.trials import best_of, describe, scoped, trial_of
from llmbuild.profiler.protocol import Prepared, Stage, Subject
from llmbuild.search.front import decided, dominated
from llmbuild.spec.measurement import SCREENED, Measurement
from llmbuild.spec.program import Program
from llmbuild.spec.recipe import Budget
from llmbuild.spec.space import Point
from llmbuild.spec.trial import Trial
from llmbuild.spec.variant import Artifact, Failure

if TYPE_CHECKING:
    from llmbuild.profiler.bench import Bench
    from llmbuild.profiler.remote import RemoteBench

Made = tuple[Program, Artifact]

ONCE = ("reference", "limits")
"""Steps of a build's first trial that no later one has."""


class Evaluator:
    """Turns the points of a job into trials; `recorded` is called after each."""

    def __init__(self, results: Results, budget: Budget, jobs: int, tell: Tell, recorded: Callable[[], None]) -> None:
        self.results, self.steps, self.job, self.catalog = results, results.steps, results.job, results.catalog
        self.budget, self.jobs, self.tell, self.recorded = budget, jobs, tell, recorded
        self.made = 0
        self.took: list[float] = []
        """Seconds of the trials of this run, without the steps that only the first one has."""
        self.left: Callable[[], float | None] = lambda: None
        """Returns the expected seconds until the build ends."""
        self._watches: dict[Point, Stopwatch] = {}
        self._watch = Stopwatch()

    # --- make ----------------------------------------------------------------------------------------------------

    def artifact(self, point: Point, quietly: bool = False) -> Made | Failure:
        """Return a point's artifact, from the catalog or made now."""
        watch = self._watches[point] = Stopwatch()
        try:
            self._step("import", point, watch, quietly)
            program = self.steps.import_(point)
            if isinstance(program, Failure):
                return program
            self._step("compile", point, watch, quietly)
            artifact = self.steps.compile(program, point)
            return artifact if isinstance(artifact, Failure) else (program, artifact)
        finally:
            watch.stop()

    def artifacts(self, points: Sequence[Point]) -> list[Made | Failure]:
        """Return the artifacts of points, made in parallel."""
        if len(points) == 1:
            return [self.artifact(points[0])]
        return side_by_side(self.artifact, points, self.jobs)

    def subject(self, trial: Trial) -> Subject | None:
        """Return the subject of a trial's variant, with what is known of it; None where it cannot be rebuilt."""
        made = self.artifact(trial.point, quietly=True)
        if isinstance(made, Failure):
            return None
        subject = self.steps.subject(trial.point, *made)
        return replace(subject, known=self._known(trial, subject))

    def _known(self, trial: Trial, subject: Subject) -> Prepared | None:
        """Return what the trial's measurements say of these very bytes; nothing under `-B` of an earlier build's."""
        mine = all((m.variant, m.artifact) == (subject.variant, subject.artifact) for m in trial.measurements)
        old = self.job.force and trial.point not in {t.point for t in self.results.known}
        return Prepared.of(trial.measurements) if mine and not old else None

    # --- evaluate ------------------------------------------------------------------------------------------------

    def evaluate(self, points: Sequence[Point]) -> list[Trial]:
        """Return the trials of a batch; points that exceed the recipe's size bounds are left out."""
        done = []
        begin = monotonic()
        for point, made in zip(points, self._measurable(points), strict=True):
            broken = [] if isinstance(made, Failure) or point == self.job.space.default() else self._too_large(*made)
            if broken:
                told = f"{describe(self.job, point)}: {'; '.join(broken)}"
                self.tell(Event("skip", told, len(self.results.known)))
                continue
            self._watch = self._watches[point]
            trial = self._trial(point, made, begin)
            self._watch.stop()
            self.results.add(trial)
            self.made += 1
            self.took.append(trial.seconds - sum(s for name, s in self._watch.parts if name in ONCE))
            self.recorded()
            self._report(trial)
            done.append(trial)
            begin = monotonic()
        return done

    def _measurable(self, points: Sequence[Point]) -> list[Made | Failure]:
        """Return the artifacts of points; what this host has no memory for is not made."""
        short = {point: failure for point in points if (failure := no_memory(self.job, point))}
        self._watches |= {point: Stopwatch() for point in short}
        rest = [point for point in points if point not in short]
        made = dict(zip(rest, self.artifacts(rest), strict=True)) if rest else {}
        return [short[point] if point in short else made[point] for point in points]

    def _too_large(self, program: Program, artifact: Artifact) -> list[str]:
        """Return the bounds that the sizes break: such a point is neither measured nor recorded."""
        parameters = self.catalog.blobs.path(program.parameters).stat().st_size
        sizes = {"artifact_bytes": float(artifact.size_bytes), "parameter_bytes": float(parameters)}
        static = [b for b in self.job.recipe.constraints if b.metric in sizes]
        return [f"{b.metric} is {sizes[b.metric]:.4g}, {b} asked" for b in static if not b.holds(sizes[b.metric])]

    def _trial(self, point: Point, made: Made | Failure, begin: float) -> Trial:
        number = len(self.results.known)
        if isinstance(made, Failure):
            return trial_of(self.steps, point, None, None, (), made, number, monotonic() - begin)
        program, artifact = made
        measured = self._measure(self.steps.subject(point, program, artifact), point, artifact.size_bytes)
        failure = measured if isinstance(measured, Failure) else None
        readings = () if isinstance(measured, Failure) else tuple(scoped(m, self.job.scope) for m in measured)
        return trial_of(self.steps, point, program, artifact, readings, failure, number, monotonic() - begin)

    def _step(self, step: str, point: Point, watch: Stopwatch, quietly: bool = False, more: str = "") -> None:
        """Begin a step of a point."""
        watch.begin(step)
        if not quietly:
            text, number = describe(self.job, point) + more, self.results.evaluations + 1
            self.tell(Event(step, text, number, self.budget.trials, left_s=self.left()))

    def _stage(self, point: Point, stage: Stage) -> None:
        """Begin or go on with what a bench says that it does."""
        rounds = f", {stage.done} rounds" if stage.done else ""
        self._step(stage.name, point, self._watch, more=rounds)

    def _report(self, trial: Trial) -> None:
        text = describe(self.job, trial.point)
        if trial.failure:
            text = f"{text}: {trial.failure.stage} failed: {trial.failure.reason}"
        by = trial.measurements[0].notes.get(SCREENED) if trial.measurements else None
        if by:
            text = f"{text}: screened: {by}"
        best = best_of(self.results.known, self.job.recipe.objectives[0])
        done, total, parts = self.results.evaluations, self.budget.trials, self._watch.parts
        self.tell(Event("done", text, done, total, trial.seconds, best, parts, self.left()))

    # --- measure -------------------------------------------------------------------------------------------------

    def _measure(self, subject: Subject, point: Point, size: int) -> tuple[Measurement, ...] | Failure:
        equal = self.steps.equal(subject, self.results.known)
        if equal:
            return equal
        with self.catalog.measuring():
            default = point == self.job.space.default()
            bench = self.bench(baseline=not default, step=lambda step: self._step(step, point, self._watch))
            if isinstance(bench, Failure):
                return bench
            bench.tell = partial(self._stage, point)
            if default:
                return bench.measure(subject, baseline=True)
            unmeasured = self._unmeasured(subject, point, size)
            judges = partial(self._dominated, unmeasured), partial(self._decided, unmeasured)
            return bench.measure(subject, False, *judges)

    def _unmeasured(self, subject: Subject, point: Point, size: int) -> Trial:
        """Return a trial with its sizes only."""
        return Trial(
            scope=self.job.scope,
            number=len(self.results.known),
            point=point,
            variant=subject.variant,
            is_default=point == self.job.space.default(),
            program=None,
            artifact=subject.artifact,
            artifact_bytes=size,
            parameter_bytes=subject.parameter_bytes,
            measurements=(),
            failure=None,
            seconds=0.0,
        )

    def _dominated(self, unmeasured: Trial, brief: Sequence[Measurement], perfect: bool) -> str:
        """Return which variant dominates this one beyond its intervals on every measured workload; empty for none."""
        recipe, everyone = self.job.recipe, self.results.all
        bounds = (*recipe.constraints, *recipe.quality.bounds)
        found = [dominated(unmeasured, m, everyone, recipe.objectives, bounds, perfect) for m in brief]
        return found[0] if all(found) else ""

    def _decided(self, unmeasured: Trial, reached: Measurement) -> bool:
        """Return whether more rounds of this variant would not change its standing."""
        recipe = self.job.recipe
        bounds = (*recipe.constraints, *recipe.quality.bounds)
        return decided(unmeasured, reached, self.results.all, recipe.objectives, bounds)

    def bench(self, baseline: bool, step: Callable[[str], None] = lambda _: None) -> Bench | RemoteBench | Failure:
        """Return the bench; with `baseline`, with the worker of point 0 running, as the other half of each pair.

        `step` is called before each step that a catalog's first build has.
        """
        step("reference")
        quality = self.steps.reference()
        if isinstance(quality, Failure):
            return quality
        step("limits")
        bench = self.steps.bench(quality)
        step("check")
        if baseline and not bench.has_baseline:
            self._open_baseline(bench)
        return bench

    def _open_baseline(self, bench: Bench | RemoteBench) -> None:
        """Open point 0 in a resumed build; where it never ran, or fails now, readings are not paired."""
        zero = self.results.default
        subject = self.subject(zero) if zero else None
        failure = bench.open_baseline(subject) if subject else None
        if failure:
            self.tell(Event("note", f"readings are not paired with the compiler's defaults: {failure.reason}"))
