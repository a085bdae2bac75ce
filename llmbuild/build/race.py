"""The race: the survivors of a search are measured again, all of them and the baseline in every round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from time import monotonic
from typing import TYPE_CHECKING

from llmbuild.build.evaluate import Evaluator
from llmbuild.build.events import Event
from llmbuild.build.forecast import race_s
from llmbuild.build.trials import rank, scoped
from llmbuild.profiler.protocol import Stage, Subject
from llmbuild.search.front import contenders
from llmbuild.spec.measurement import Measurement
from llmbuild.spec.trial import FRONT, Trial
from llmbuild.spec.variant import Failure

if TYPE_CHECKING:
    from llmbuild.profiler.bench import Bench
    from llmbuild.profiler.remote import RemoteBench

RACERS = 8
"""Maximum number of survivors in the race: each one is a running process."""


def race(evaluator: Evaluator) -> None:
    """Measure the survivors in interleaved rounds, and replace their readings."""
    results, tell = evaluator.results, evaluator.tell
    alive = {s.variant for s in results.stand() if s.status in FRONT}
    able = [*results.known, *filter(results.reproducible, results.other_trials)]
    ranked = sorted(able, key=lambda t: rank(t, results.job.recipe.objectives[0]))
    racers = [t for t in ranked if t.variant in alive][:RACERS]
    subjects = [s for s in map(evaluator.subject, racers) if s]
    if len(subjects) < 2:
        return
    total = evaluator.budget.trials
    text = f"{len(subjects)} survivors in interleaved rounds"
    tell(Event("race", text, results.evaluations, total, left_s=race_s(results.job)))
    begin = monotonic()
    with results.catalog.measuring():
        bench = evaluator.bench(baseline=True)
        if isinstance(bench, Failure):
            return
        bench.tell = _telling(evaluator, len(subjects))
        _run(evaluator, bench, subjects, able)
    results.read_again()
    results.stand()
    tell(Event("front", "kept", results.evaluations, total, monotonic() - begin))


def _telling(evaluator: Evaluator, racers: int) -> Callable[[Stage], None]:
    """Return what is called with the stages of a race: of its rounds, the time left is that of its budget."""
    begin, budget, total = monotonic(), race_s(evaluator.job), evaluator.budget.trials

    def tell(stage: Stage) -> None:
        text = f"{racers} survivors, {stage.done} rounds" if stage.done else f"{racers} survivors, opened"
        left = max(0.0, budget - (monotonic() - begin))
        evaluator.tell(Event("rounds", text, evaluator.results.evaluations, total, left_s=left))

    return tell


def _run(evaluator: Evaluator, bench: Bench | RemoteBench, subjects: Sequence[Subject], able: Sequence[Trial]) -> None:
    results, job = evaluator.results, evaluator.job
    keys = {(m.variant, m.workload.name): m.key for trial in able for m in trial.measurements}

    def left(measured: Sequence[Measurement], reach: float) -> set[str]:
        return contenders(results.all, measured, job.recipe.objectives, reach)

    for measured in bench.race(subjects, left):
        for one in measured:
            known = keys.get((one.variant, one.workload.name))
            kept = replace(one, key=known) if known else scoped(one, job.scope)
            results.catalog.update_measurement(job.scope, kept)
