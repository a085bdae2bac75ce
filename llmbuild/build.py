"""The path: import, compile, check, profile, record, front. It reads as a line; formats and devices are other people's.

What is known is read from the catalog first; every finished trial is recorded before the next one begins, so a killed
build goes on where it stopped and a finished one does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

from llmbuild.catalog.names import Ranking
from llmbuild.freshness import Look, Outcome, build_key
from llmbuild.process import stop_all
from llmbuild.profiler.protocol import Subject
from llmbuild.search.front import contenders, hopeless
from llmbuild.spec.measurement import SCREENED, Measurement
from llmbuild.spec.program import Program
from llmbuild.spec.recipe import Budget
from llmbuild.spec.space import Point
from llmbuild.spec.trial import FRONT, USABLE, Standing, Trial
from llmbuild.spec.variant import Artifact, Failure
from llmbuild.steps import Steps
from llmbuild.trials import best_of, describe, finished_trials, owner, rank, scoped, stand, trial_of, unique, unmade

if TYPE_CHECKING:
    from llmbuild.profiler.bench import Bench
    from llmbuild.profiler.remote import RemoteBench

LESSONS = 4
"""How many other studies of the catalog a search learns from, the latest ones."""

RACERS = 8
"""Survivors in the final race at most: each one is a live process."""


@dataclass(frozen=True)
class Event:
    """Something to tell a person: which step, about what, how far, how long, and the best so far."""

    step: str
    text: str
    done: int = 0
    total: int = 0
    seconds: float | None = None
    best: str = ""


Tell = Callable[[Event], None]


class Build:
    """One job under way."""

    def __init__(self, steps: Steps, budget: Budget, seed: int, jobs: int, tell: Tell) -> None:
        self.steps, self.job, self.catalog = steps, steps.job, steps.catalog
        self.budget, self.seed, self.jobs, self.tell = budget, seed, jobs, tell
        self.key = build_key(self.job, seed)
        if self.job.force:
            self.catalog.reset_build(self.key)
        self.look = self._look()
        self.known: list[Trial] = []
        """The finished trials of the job's space; under `-B`, those that were made again."""
        self.beside: list[Trial] = []
        """The finished trials of the scope that only the recipe without its pins asks for: ranked, not searched."""
        self.again: list[Point] = []
        """Points whose files came out with other bytes than those that were lost."""
        self.made = 0
        self._begin = monotonic()

    def _remember(self, missing: Container[str] = (), forget: bool = False) -> None:
        """Read what is known; without what is `missing`, and to be made again whole with `forget`."""
        trials = [t for t in finished_trials(self.steps) if t.variant not in missing]
        mine = [t for t in trials if not forget and (t.is_default or self.job.space.contains(t.point))]
        points = {t.point for t in mine}
        self.known, self.beside = mine, self._beside(trials, points)

    def _beside(self, trials: Iterable[Trial], points: Container[Point]) -> list[Trial]:
        return [t for t in trials if t.point not in points and self.job.ranks(t)]

    def run(self, race: bool = True) -> Outcome:
        """Search until the budget is spent, race the survivors, and keep the front.

        Of two builds of the same thing in one catalog, the second waits and goes on from what the first has made.
        """
        if not self.look.reason() and not self.look.displaced:
            return self.look.up_to_date(monotonic() - self._begin)
        with self.catalog.making(f"build-{self.job.scope}", self._waiting):
            self.look = self._look()
            if self.look.displaced:
                self._stand_again()
            if self.look.missing and not self.job.force:
                self._mend()
            if not self.look.reason():
                return self.look.up_to_date(monotonic() - self._begin)
            self._remember(self.look.lost, self.job.force)
            return self._run(race)

    def _stand_again(self) -> None:
        """Let what is known of these inputs stand in place of what does: nothing is made or measured for it."""
        self._remember()
        if not self.known:
            return
        other = self.look.stands != {None}
        self.catalog.register(self.steps.registered)
        found = self._stand()
        self.look = self._look()  # what `gc` took from the other one's shadow is missed from now on
        if other:
            front = len({s.variant for s in found if s.status in FRONT})
            self.tell(Event("front", f"{front} variants of these inputs stand again: nothing was made or measured"))

    def _mend(self) -> None:
        """Make the files again that are missing or damaged; what was measured of them stays, if the bytes are the same.

        What comes out with other bytes, or not at all, is another variant: it is evaluated again.
        """
        missing = self.look.missing
        self.tell(Event("mend", self.look.reason()))
        self.catalog.register(self.steps.registered)
        owner(self.steps)  # the tokenizer is copied
        try:
            for trial in finished_trials(self.steps):
                lost = self.look.lost.get(trial.variant, ())
                if self._spoken(trial) and not all(map(self.catalog.blobs.intact, lost)):
                    self._artifact(trial.point)
        finally:
            stop_all()
        self.catalog.found_again(filter(self.catalog.blobs.intact, missing))
        self.look = self._look()
        again = {f.point for f in self.look.finished if f.variant in self.look.lost}
        self.again = [point for point in again if self.job.space.contains(point) or point == self.job.space.default()]
        if not self.look.missing:
            self.tell(Event("done", f"{len(missing)} files are there again: nothing was measured for it"))

    def _waiting(self) -> None:
        self.tell(Event("wait", "another build of this is under way: waiting for what it makes"))

    def _look(self) -> Look:
        return Look(self.job, self.catalog, self.budget, self.seed)

    def _run(self, race: bool) -> Outcome:
        self.catalog.register(self.steps.registered)
        try:
            for point in self.again:
                self._evaluate([point])
            self._stand()
            ended = self._search()
            if race:
                self._race()
            self._save(raced=race, ended=ended)
        finally:
            stop_all()
            self.steps.close()
            self._pass_on()
        return self._outcome(ended)

    def artifact(self, point: Point) -> tuple[Program, Artifact] | Failure:
        """Return what a point is made of, from the catalog or made now, without a word."""
        return self._artifact(point, quietly=True)

    def import_(self) -> list[tuple[Point, Program | Failure]]:
        """Import the points that are tried first, and make nothing of them."""
        points = self.openers()
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                return list(zip(points, pool.map(self.steps.import_, points), strict=True))
            finally:
                stop_all()
                self._pass_on()

    def openers(self) -> list[Point]:
        """Return the points that are tried first, up to the budget."""
        from llmbuild.search.study import openers

        return openers(self.job.space)[: self.budget.trials]

    def compile(self) -> list[tuple[Point, Artifact | Failure]]:
        """Make artifacts and measure nothing, up to the budget: for a target that is not this host."""
        points = self.openers()
        self.catalog.register(self.steps.registered)
        done: list[tuple[Point, Artifact | Failure]] = []
        try:
            for start in range(0, len(points), self.jobs):
                batch = points[start : start + self.jobs]
                for point, made in zip(batch, self._make(batch), strict=True):
                    done.append((point, made if isinstance(made, Failure) else made[1]))
                    self._compiled(point, made, len(done), len(points))
        finally:
            stop_all()
            self._pass_on()
        return done

    def _pass_on(self) -> None:
        """Tell what the library said of the model while it was imported now."""
        for text in self.steps.said:
            self.tell(Event("note", f"the library says of this model: {text}"))

    def _compiled(self, point: Point, made: tuple[Program, Artifact] | Failure, done: int, total: int) -> None:
        failure = made if isinstance(made, Failure) else None
        program, artifact = (None, None) if isinstance(made, Failure) else made
        trial = trial_of(self.steps, point, program, artifact, (), failure, done, 0.0)
        workloads = [w.name for w in self.job.recipe.workloads]
        self.catalog.record_compiled(trial, owner(self.steps), workloads, unmade(self.job, point))
        told = f": {failure.stage} failed: {failure.reason}" if failure else ""
        self.tell(Event("done", describe(self.job, point) + told, done, total))

    def measure(self, points: Sequence[Point]) -> Outcome:
        """Measure points that were compiled before, without a search."""
        self._remember()
        done = {t.point for t in self.known}
        self.catalog.register(self.steps.registered)
        try:
            for point in [p for p in points if p not in done]:
                self._evaluate([point])
            self._race()
        finally:
            stop_all()
            self.steps.close()
        return self._outcome("profiled")

    # --- search --------------------------------------------------------------------------------------------------

    def _search(self) -> str:
        from llmbuild.search.study import Study, lesson
        from llmbuild.search.transfer import shipped

        recipe = self.job.recipe
        bounds = (*recipe.constraints, *recipe.quality.bounds)
        related = self.catalog.fronts_elsewhere(recipe.name, self.steps.registered.target_digest)
        elsewhere = self.catalog.trials_elsewhere(self.job.scope, self.job.target.backend, LESSONS)
        told = [lesson(trials, recipe.objectives) for trials in elsewhere]
        lessons = [*shipped(self.job.target.backend), *(found for found in told if found)]
        study = Study(self.job.space, recipe.objectives, self.seed, self.known, bounds, related, lessons)
        while True:
            if unique(self.known) >= self.budget.trials:
                return f"{self.budget.trials} trials done"
            if self.known and self.spent() >= self.budget.seconds:
                return f"{self.budget.seconds:.0f} s spent"
            batch = self._ask(study)
            if not batch:
                return "every point of the space is known"
            done = self._evaluate(batch)
            for trial in done:
                study.tell(trial)
            for point in {*batch} - {t.point for t in done}:
                study.refuse(point)

    def _ask(self, study: Any) -> list[Point]:
        """Ask for as many points as compile side by side; point 0 goes alone, since all others are paired with it."""
        wanted = min(self.jobs, self.budget.trials - unique(self.known)) if self.known else 1
        asked = (study.ask() for _ in range(wanted))
        return [point for point in asked if point is not None]

    def _evaluate(self, points: Sequence[Point]) -> list[Trial]:
        """Make the artifacts of a batch side by side, then measure them one at a time; record each as it ends.

        What is too large for the recipe's bounds is left out of the result.
        """
        done = []
        begin = monotonic()
        for point, made in zip(points, self._make(points), strict=True):
            broken = [] if isinstance(made, Failure) or point == self.job.space.default() else self._too_large(*made)
            if broken:
                self.tell(Event("skip", f"{describe(self.job, point)}: {'; '.join(broken)}", len(self.known)))
                continue
            trial = self._trial(point, made, begin)
            self.catalog.record_trial(trial, owner(self.steps))
            self.known.append(trial)
            self.beside = [t for t in self.beside if t.point != point]
            self.made += 1
            self._stand()
            self._save(raced=False, ended="under way")
            self._told(trial)
            done.append(trial)
            begin = monotonic()
        return done

    def _too_large(self, program: Program, artifact: Artifact) -> list[str]:
        """Return the bounds that sizes alone break: nothing is measured then, and nothing recorded."""
        parameters = self.catalog.blobs.path(program.parameters).stat().st_size
        sizes = {"artifact_bytes": float(artifact.size_bytes), "parameter_bytes": float(parameters)}
        static = [b for b in self.job.recipe.constraints if b.metric in sizes]
        return [f"{b.metric} is {sizes[b.metric]:.4g}, {b} asked" for b in static if not b.holds(sizes[b.metric])]

    def _make(self, points: Sequence[Point]) -> list[tuple[Program, Artifact] | Failure]:
        if len(points) == 1:
            return [self._artifact(points[0])]
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                return list(pool.map(self._artifact, points))
            except BaseException:  # Ctrl-C above all: the compilers under way must end before the pool can
                stop_all()
                raise

    def _artifact(self, point: Point, quietly: bool = False) -> tuple[Program, Artifact] | Failure:
        if not quietly:
            self.tell(Event("import", describe(self.job, point), unique(self.known) + 1, self.budget.trials))
        program = self.steps.import_(point)
        if isinstance(program, Failure):
            return program
        if not quietly:
            self.tell(Event("compile", describe(self.job, point), unique(self.known) + 1, self.budget.trials))
        artifact = self.steps.compile(program, point)
        return artifact if isinstance(artifact, Failure) else (program, artifact)

    def _trial(self, point: Point, made: tuple[Program, Artifact] | Failure, begin: float) -> Trial:
        if isinstance(made, Failure):
            return trial_of(self.steps, point, None, None, (), made, len(self.known), monotonic() - begin)
        program, artifact = made
        self.tell(Event("profile", describe(self.job, point), unique(self.known) + 1, self.budget.trials))
        measured = self._measure(self.steps.subject(point, program, artifact), point, artifact.size_bytes)
        failure = measured if isinstance(measured, Failure) else None
        readings = () if isinstance(measured, Failure) else tuple(scoped(m, self.job.scope) for m in measured)
        return trial_of(self.steps, point, program, artifact, readings, failure, len(self.known), monotonic() - begin)

    def _measure(self, subject: Subject, point: Point, size: int) -> tuple[Measurement, ...] | Failure:
        equal = self.steps.equal(subject, self.known)
        if equal:
            return equal
        with self.catalog.measuring():
            bench = self._bench()
            if isinstance(bench, Failure):
                return bench
            default = point == self.job.space.default()
            if not default and not bench.has_baseline:
                self._open_baseline(bench)
            sizes = Trial(
                scope=self.job.scope,
                number=len(self.known),
                point=point,
                variant=subject.variant,
                is_default=default,
                program=None,
                artifact=subject.artifact,
                artifact_bytes=size,
                parameter_bytes=subject.parameter_bytes,
                measurements=(),
                failure=None,
                seconds=0.0,
            )
            return bench.measure(subject, default, None if default else partial(self._hopeless, sizes))

    def _hopeless(self, sizes: Trial, brief: Sequence[Measurement], perfect: bool) -> str:
        """Say who beats a variant beyond doubt, on every workload that was looked at; empty where nobody does."""
        recipe, everyone = self.job.recipe, [*self.known, *self.beside]
        bounds = (*recipe.constraints, *recipe.quality.bounds)
        told = [hopeless(sizes, m, everyone, recipe.objectives, bounds, perfect) for m in brief]
        return told[0] if all(told) else ""

    def _bench(self) -> Bench | RemoteBench | Failure:
        quality = self.steps.reference()
        return quality if isinstance(quality, Failure) else self.steps.bench(quality)

    def _open_baseline(self, bench: Bench | RemoteBench) -> None:
        """Bring point 0 back to life in a resumed build; where it never worked, nothing is paired."""
        zero = next((t for t in self.known if t.point == self.job.space.default() and t.measurements), None)
        subject = self._subject(zero) if zero else None
        if subject:
            bench.measure(subject, baseline=True)

    def _subject(self, trial: Trial) -> Subject | None:
        made = self._artifact(trial.point, quietly=True)
        return None if isinstance(made, Failure) else self.steps.subject(trial.point, *made)

    # --- the front -----------------------------------------------------------------------------------------------

    def _race(self) -> None:
        """Measure the survivors once more, all of them and the baseline in every round."""
        alive = {s.variant for s in self._stand() if s.status in FRONT}
        able = [*self.known, *filter(self._spoken, self.beside)]
        ranked = sorted(able, key=lambda t: rank(t, self.job.recipe.objectives[0]))
        racers = [t for t in ranked if t.variant in alive][:RACERS]
        subjects = [s for s in (self._subject(t) for t in racers) if s]
        if len(subjects) < 2:
            return
        self.tell(
            Event("race", f"{len(subjects)} survivors in interleaved rounds", unique(self.known), self.budget.trials)
        )
        begin = monotonic()
        with self.catalog.measuring():
            bench = self._bench()
            if isinstance(bench, Failure):
                return
            if not bench.has_baseline:
                self._open_baseline(bench)
            keys = {(m.variant, m.workload.name): m.key for trial in able for m in trial.measurements}
            for measured in bench.race(subjects, self._contenders):
                for one in measured:
                    known = keys.get((one.variant, one.workload.name))
                    kept = replace(one, key=known) if known else scoped(one, self.job.scope)
                    self.catalog.update_measurement(self.job.scope, kept)
        raced, points = finished_trials(self.steps), {t.point for t in self.known}
        self.known = [t for t in raced if t.point in points]
        self.beside = self._beside(raced, points)
        self._stand()
        self.tell(Event("front", "kept", unique(self.known), self.budget.trials, monotonic() - begin))

    def _spoken(self, trial: Trial) -> bool:
        """Say whether a point is one of this space's knobs, so that its steps are known to lead to its variant."""
        return {name for name, _ in trial.point.values} == {knob.name for knob in self.job.space.knobs}

    def _contenders(self, measured: Sequence[Measurement], reach: float) -> set[str]:
        return contenders([*self.known, *self.beside], measured, self.job.recipe.objectives, reach)

    def _stand(self) -> list[Standing]:
        """Rank all that is measured and still fresh: a pinned build adds to a front, it does not replace it."""
        found = stand(self.job, [*self.known, *self.beside])
        if found:
            job, names = self.job, self.steps.registered
            place = (job.recipe.name, names.target_digest, names.machine_digest)
            by = Ranking(job.ranking, job.source, owner(self.steps).tokenizer, self.key)
            self.catalog.record_standings(*place, found, by)
        return found

    # --- book-keeping --------------------------------------------------------------------------------------------

    def spent(self) -> float:
        """Return the seconds this build has taken, those of earlier runs of it included."""
        return float(self.look.state["seconds"]) + monotonic() - self._begin

    def _save(self, raced: bool, ended: str) -> None:
        self.catalog.record_build(
            self.key,
            self.job.recipe.name,
            self.job.scope,
            self.job.scope_inputs,
            seconds=self.spent(),
            raced=raced,
            ended=ended,
        )

    def _outcome(self, ended: str) -> Outcome:
        usable = sum(1 for s in stand(self.job, self.known) if s.status in USABLE)
        return Outcome(self.made, len(self.known), usable, ended, monotonic() - self._begin)

    def _told(self, trial: Trial) -> None:
        text = describe(self.job, trial.point)
        if trial.failure:
            text = f"{text}: {trial.failure.stage} failed: {trial.failure.reason}"
        by = trial.measurements[0].notes.get(SCREENED) if trial.measurements else None
        if by:
            text = f"{text}: screened: {by}"
        best = best_of(self.known, self.job.recipe.objectives[0])
        self.tell(Event("done", text, unique(self.known), self.budget.trials, trial.seconds, best))
