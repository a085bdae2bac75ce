"""The finished trials of a job during its build, and their standings."""

from __future__ import annotations

from collections.abc import Container

from llmbuild.build.freshness import build_key
from llmbuild.build.steps import Steps
from llmbuild.build.trials import finished_trials, owner, stand, unique
from llmbuild.catalog.names import Ranking
from llmbuild.spec.space import Point
from llmbuild.spec.trial import USABLE, Standing, Trial


class Results:
    """The known trials of a job: read from its catalog, and extended as trials end."""

    def __init__(self, steps: Steps, seed: int) -> None:
        self.steps, self.job, self.catalog = steps, steps.job, steps.catalog
        self.key = build_key(self.job, seed)
        self.known: list[Trial] = []
        """The finished trials of the job's space; under `-B`, only those of this build."""
        self.other_trials: list[Trial] = []
        """The finished trials that only the recipe without `--set` pins has in its space: ranked, not searched."""

    def read(self, missing: Container[str] = (), forget: bool = False) -> None:
        """Read the known trials; without those of `missing` files, and with none for `forget`."""
        trials = [t for t in finished_trials(self.steps) if t.variant not in missing]
        known = [t for t in trials if not forget and (t.is_default or self.job.space.contains(t.point))]
        self._split(trials, {t.point for t in known})

    def read_again(self) -> None:
        """Read the readings of the known trials again."""
        self._split(finished_trials(self.steps), {t.point for t in self.known})

    def _split(self, trials: list[Trial], points: set[Point]) -> None:
        self.known = [t for t in trials if t.point in points]
        self.other_trials = [t for t in trials if t.point not in points and self.job.ranks(t)]

    def add(self, trial: Trial) -> None:
        """Record a finished trial, and rank it."""
        self.catalog.record_trial(trial, owner(self.steps))
        self.known.append(trial)
        self.other_trials = [t for t in self.other_trials if t.point != trial.point]
        self.stand()

    @property
    def all(self) -> list[Trial]:
        """All ranked trials."""
        return [*self.known, *self.other_trials]

    @property
    def evaluations(self) -> int:
        """The number of evaluations among the known trials."""
        return unique(self.known)

    @property
    def usable(self) -> int:
        """The number of usable standings of the known trials."""
        return sum(1 for s in stand(self.job, self.known) if s.status in USABLE)

    @property
    def default(self) -> Trial | None:
        """The trial of point 0, if it was measured."""
        zero = self.job.space.default()
        return next((t for t in self.known if t.point == zero and t.measurements), None)

    def reproducible(self, trial: Trial) -> bool:
        """Return whether a point uses only this space's knobs, so that its steps reproduce its variant."""
        return {name for name, _ in trial.point.values} == {knob.name for knob in self.job.space.knobs}

    def stand(self) -> list[Standing]:
        """Rank all fresh measurements: a pinned build adds to a front, it does not replace it."""
        found = stand(self.job, self.all)
        if found:
            job, names = self.job, self.steps.registered
            place = (job.recipe.name, names.target_digest, names.machine_digest)
            mine = owner(self.steps)
            by = Ranking(job.ranking, job.source, mine.tokenizer, self.key, mine.chat)
            self.catalog.record_standings(*place, found, by)
        return found
