"""The build path: import, compile, check, profile, record, front. Formats and devices are handled in other modules.

Known results are read from the catalog first; every finished trial is recorded before the next one begins, so that a
killed build resumes and a finished one does nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from time import monotonic

from llmbuild.build.evaluate import Evaluator, Made
from llmbuild.build.events import Event, Tell
from llmbuild.build.forecast import forecast, race_s
from llmbuild.build.freshness import Freshness, Outcome
from llmbuild.build.price import Price, left_s
from llmbuild.build.race import race
from llmbuild.build.results import Results
from llmbuild.build.search import search
from llmbuild.build.steps import Steps
from llmbuild.build.trials import describe, finished_trials, owner, trial_of, unmade
from llmbuild.process.child import stop_all
from llmbuild.search.warm_start import initial_points
from llmbuild.spec.program import Program
from llmbuild.spec.recipe import Budget
from llmbuild.spec.space import Point
from llmbuild.spec.trial import FRONT
from llmbuild.spec.variant import Artifact, Failure


class Build:
    """One job in progress."""

    def __init__(self, steps: Steps, budget: Budget, seed: int, jobs: int, tell: Tell) -> None:
        self.steps, self.job, self.catalog = steps, steps.job, steps.catalog
        self.budget, self.seed, self.jobs, self.tell = budget, seed, jobs, tell
        steps.imports.tell = tell
        self.results = Results(steps, seed)
        self.evaluator = Evaluator(self.results, budget, jobs, tell, lambda: self._save(raced=False, ended="under way"))
        if self.job.force:
            self.catalog.reset_build(self.results.key)
        self.freshness = self._look()
        self.again: list[Point] = []
        """Points whose rebuilt files differ from those that were lost."""
        self._begin = monotonic()

    def run(self, raced: bool = True) -> Outcome:
        """Search until the budget is spent, race the survivors, and keep the front.

        Of two builds of the same job in one catalog, the second waits and resumes from the first one's results.
        """
        if not self.freshness.reason() and not self.freshness.displaced:
            return self.freshness.up_to_date(monotonic() - self._begin)
        with self.catalog.making(f"build-{self.job.scope}", self._waiting):
            self.freshness = self._look()
            if self.freshness.displaced:
                self._restore_standings()
            if self.freshness.missing and not self.job.force:
                self._rebuild_missing()
            if not self.freshness.reason():
                return self.freshness.up_to_date(monotonic() - self._begin)
            self.results.read(self.freshness.lost, self.job.force)
            return self._run(raced)

    def _run(self, raced: bool) -> Outcome:
        self.catalog.register(self.steps.registered)
        try:
            self.steps.imports.expect(self.job.space.default())
            for point in self.again:
                self.evaluator.evaluate([point])
            self.results.stand()
            cost = forecast(self.job, self.catalog, self.freshness, self.budget, raced)
            self.evaluator.left = lambda: self._left(cost, raced) if cost else None
            ended = self._search()
            if raced:
                race(self.evaluator)
            self._save(raced=raced, ended=ended)
        finally:
            stop_all()
            self.steps.close()
            self._report_notes()
        return self._outcome(ended)

    def _search(self) -> str:
        return search(self.evaluator, self.seed, self.spent)

    # --- known results that are not current, and known results whose files are lost ---------------------------------

    def _restore_standings(self) -> None:
        """Make the known trials of these inputs the current standings: nothing is built or measured."""
        self.results.read()
        if not self.results.known:
            return
        other = self.freshness.stands != {None}
        self.catalog.register(self.steps.registered)
        found = self.results.stand()
        self.freshness = self._look()  # a file that `gc` deleted in the meantime now counts as missing
        if other:
            front = len({s.variant for s in found if s.status in FRONT})
            self.tell(Event("front", f"{front} variants of these inputs stand again: nothing was made or measured"))

    def _rebuild_missing(self) -> None:
        """Rebuild missing or damaged files; their measurements are kept if the bytes are the same.

        A point whose bytes differ, or that fails, is another variant: it is evaluated again.
        """
        missing, lost, intact = self.freshness.missing, self.freshness.lost, self.catalog.blobs.intact
        self.tell(Event("mend", self.freshness.reason()))
        self.catalog.register(self.steps.registered)
        owner(self.steps)  # the tokenizer and the chat template are copied
        try:
            for trial in finished_trials(self.steps):
                if self.results.reproducible(trial) and not all(map(intact, lost.get(trial.variant, ()))):
                    self.evaluator.artifact(trial.point)
        finally:
            stop_all()
        self.catalog.found_again(filter(intact, missing))
        self.freshness = self._look()
        again = {f.point for f in self.freshness.finished if f.variant in self.freshness.lost}
        self.again = [point for point in again if self.job.space.contains(point) or point == self.job.space.default()]
        if not self.freshness.missing:
            self.tell(Event("done", f"{len(missing)} files are there again: nothing was measured for it"))

    # --- single steps ----------------------------------------------------------------------------------------------

    def initial_points(self) -> list[Point]:
        """Return the points that are tried first, up to the budget."""
        return initial_points(self.job.space)[: self.budget.trials]

    def import_(self) -> list[tuple[Point, Program | Failure]]:
        """Import the points that are tried first, without a compile."""
        points = self.initial_points()
        self.steps.imports.expect(self.job.space.default())
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                return list(zip(points, pool.map(self.steps.import_, points), strict=True))
            finally:
                stop_all()
                self._report_notes()

    def compile(self) -> list[tuple[Point, Artifact | Failure]]:
        """Compile artifacts without measurements, up to the budget: for a target that is not this host."""
        points = self.initial_points()
        self.steps.imports.expect(self.job.space.default())
        self.catalog.register(self.steps.registered)
        done: list[tuple[Point, Artifact | Failure]] = []
        try:
            for start in range(0, len(points), self.jobs):
                batch = points[start : start + self.jobs]
                for point, made in zip(batch, self.evaluator.artifacts(batch), strict=True):
                    done.append((point, made if isinstance(made, Failure) else made[1]))
                    self._record_compiled(point, made, len(done), len(points))
        finally:
            stop_all()
            self._report_notes()
        return done

    def _record_compiled(self, point: Point, made: Made | Failure, done: int, total: int) -> None:
        failure = made if isinstance(made, Failure) else None
        program, artifact = (None, None) if isinstance(made, Failure) else made
        trial = trial_of(self.steps, point, program, artifact, (), failure, done, 0.0)
        workloads = [w.name for w in self.job.recipe.workloads]
        self.catalog.record_compiled(trial, owner(self.steps), workloads, unmade(self.job, point))
        reason = f": {failure.stage} failed: {failure.reason}" if failure else ""
        self.tell(Event("done", describe(self.job, point) + reason, done, total))

    def measure(self, points: Sequence[Point]) -> Outcome:
        """Measure points that are already compiled, without a search."""
        self.results.read()
        done = {t.point for t in self.results.known}
        self.catalog.register(self.steps.registered)
        try:
            for point in [p for p in points if p not in done]:
                self.evaluator.evaluate([point])
            race(self.evaluator)
        finally:
            stop_all()
            self.steps.close()
        return self._outcome("profiled")

    def _left(self, cost: Price, raced: bool) -> float:
        """Return the expected seconds until this build ends, by its own trials and, as one more, by what it costs."""
        took, results = self.evaluator.took, self.results
        each = (cost.trial_s + sum(took)) / (1 + len(took))
        made = results.known[len(results.known) - len(took) :]
        begun = monotonic() - self._begin - sum(t.seconds for t in made)
        trials = self.budget.trials - results.evaluations
        return left_s(trials, each, begun, self.budget.seconds - self.spent(), race_s(self.job) if raced else 0.0)

    # --- book-keeping --------------------------------------------------------------------------------------------

    def spent(self) -> float:
        """Return the seconds that this build has taken, including its earlier runs."""
        return float(self.freshness.state["seconds"]) + monotonic() - self._begin

    def _look(self) -> Freshness:
        return Freshness(self.job, self.catalog, self.budget, self.seed)

    def _waiting(self) -> None:
        self.tell(Event("wait", "another build of this is under way: waiting for what it makes"))

    def _report_notes(self) -> None:
        """Report the library's messages about the model from this run's imports, and what slowed these."""
        for text in self.steps.imports.told():
            self.tell(Event("note", text))
        for text in self.steps.notes:
            self.tell(Event("note", f"the library says of this model: {text}"))

    def _save(self, raced: bool, ended: str) -> None:
        job = self.job
        self.catalog.record_build(
            self.results.key,
            job.recipe.name,
            job.scope,
            job.scope_inputs,
            seconds=self.spent(),
            raced=raced,
            ended=ended,
        )

    def _outcome(self, ended: str) -> Outcome:
        known, seconds = len(self.results.known), monotonic() - self._begin
        return Outcome(self.evaluator.made, known, self.results.usable, ended, seconds)
