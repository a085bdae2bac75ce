"""What a search gains over the compiler's flags: a build, then its best variants against `-O0` and `-O3` in turn.

    python scripts/bench/gain.py [RECIPE] [-C CATALOG] [--trials N] [--rounds N] [--seed N] [--json]

The build searches as `llmbuild build` does, with N trials and no time limit; known results of the catalog are reused.
Then the best variant in each objective runs in interleaved rounds with the compiler's default flags and with its
`-O3`, both on the plain f32 export: fresh processes, every round all of them, in random order. A factor is the
variant's gain over each, paired by round, with its 95 % bootstrap interval; a size has no interval, and quality is
absolute. Exit code 1 when an interval does not exclude 1.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from comparison.script import end

from llmbuild.build import toolchain
from llmbuild.build.build import Build
from llmbuild.build.job import Job, make_job
from llmbuild.build.steps import Steps
from llmbuild.build.targets import find_target
from llmbuild.build.trials import finished_trials, stand
from llmbuild.catalog.writer import Catalog
from llmbuild.errors import LlmbuildError
from llmbuild.profiler import statistics
from llmbuild.profiler.live import Live
from llmbuild.profiler.protocol import Protocol
from llmbuild.profiler.rounds import Rounds
from llmbuild.report.progress import Progress
from llmbuild.report.rows import quantity, table
from llmbuild.runtime import host, reader
from llmbuild.search.front import value_of
from llmbuild.spec.files.reader import read_recipe
from llmbuild.spec.measurement import Reading
from llmbuild.spec.recipe import Budget
from llmbuild.spec.slo import METRICS
from llmbuild.spec.space import Point
from llmbuild.spec.target import HOST
from llmbuild.spec.trial import FRONT, Trial
from llmbuild.spec.variant import Failure

ROOT = Path(__file__).parent.parent.parent
PLAIN = {"the compiler's defaults": {}, "-O3": {"opt_level": "O3"}}
"""What a variant is held against: choices other than point 0's."""

TIMED = ("tpot_s", "ttft_s", "e2e_s", "output_tokens_per_s")


class Gained(LlmbuildError):
    """Nothing to compare."""


def best(job: Job, steps: Steps) -> dict[str, Trial]:
    """Return for each objective the variant of the front that is best in it."""
    trials = finished_trials(steps)
    front = {s.variant for s in stand(job, trials) if s.status in FRONT}
    found: dict[str, Trial] = {}
    for metric in job.recipe.objectives:
        known = [(value_of(t, t.measurements[0], metric), t) for t in trials if t.variant in front and t.measurements]
        values = [(v, t.number, t) for v, t in known if v is not None]
        if values:
            least = METRICS[metric].direction == "min"
            found[metric] = (min if least else max)(values)[2]
    if not found:
        raise Gained("the build left nothing on the front")
    return found


def opened(steps: Steps, point: Point) -> Live:
    """Return a variant in a process of its own, opened."""
    program = steps.import_(point)
    artifact = program if isinstance(program, Failure) else steps.compile(program, point)
    if isinstance(program, Failure) or isinstance(artifact, Failure):
        assert isinstance(artifact, Failure)
        raise Gained(f"{artifact.stage} failed: {artifact.reason}")
    live = Live(steps.subject(point, program, artifact), steps.job.limits)
    live.open(1)
    return live


def run(job: Job, steps: Steps, entrants: dict[str, Point], rounds: int, seed: int) -> tuple[dict[str, Any], str]:
    """Return every entrant's samples in equal rounds, and what disturbed them."""
    lives: dict[str, Live] = {}
    workload, protocol = job.recipe.workloads[0], Protocol()
    taken = Rounds(workload, random.Random(seed), protocol)
    try:
        for name, point in entrants.items():
            lives[name] = opened(steps, point)
            lives[name].warm(workload, protocol.warmup_s)
        for _ in range(rounds):
            taken.run(list(lives.values()))
    finally:
        for live in lives.values():
            live.child.close()
    return {name: taken.taken[live] for name, live in lives.items()}, taken.noisy(lives[next(iter(PLAIN))])


def factor(metric: str, mine: list[float], theirs: list[float]) -> Reading:
    """Return how many times better mine is, pair by pair."""
    least = METRICS[metric].direction == "min"
    return statistics.paired_ratio(theirs, mine) if least else statistics.paired_ratio(mine, theirs)


def measured(asked: argparse.Namespace) -> dict[str, Any]:
    """Build, compare, and return one document."""
    job = make_job(read_recipe(asked.recipe), find_target(HOST), {}, host.machine(), toolchain.current(), force=False)
    catalog = Catalog(asked.catalog)
    steps = Steps(job, catalog)
    try:
        Build(steps, Budget(asked.trials, 1e9), asked.seed, 1, Progress()).run()
        zero, chosen = job.space.default(), best(job, steps)
        plain = {name: job.space.complete({**zero.as_dict(), **values}) for name, values in PLAIN.items()}
        entrants = plain | {t.variant: t.point for t in chosen.values() if t.point not in plain.values()}
        samples, noisy = run(job, steps, entrants, asked.rounds, asked.seed)
        sizes = {t.point: t for t in finished_trials(steps)}
        rows = [_row(metric, trial, samples, sizes.get(zero)) for metric, trial in chosen.items()]
    finally:
        steps.close()
        catalog.close()
    trials = len(sizes)
    return {"machine": job.machine.describe(), "model": job.recipe.name, "trials": trials, "noise": noisy, "rows": rows}


def _row(metric: str, trial: Trial, samples: dict[str, Any], zero: Trial | None) -> dict[str, Any]:
    value = value_of(trial, trial.measurements[0], metric)
    row: dict[str, Any] = {"objective": metric, "variant": trial.variant, "value": value, "factors": {}}
    if metric in TIMED and trial.variant in samples:
        mine = samples[trial.variant][metric]
        row["value"] = statistics.middle(mine)
        for name in PLAIN:
            found = factor(metric, mine, samples[name][metric])
            row["factors"][name] = [found.median, found.low, found.high]
    elif zero is not None and zero.measurements and METRICS[metric].unit == "B" and value:
        other = value_of(zero, zero.measurements[0], metric)
        row["factors"] = {name: [other / value] * 3 for name in PLAIN if other}
    return row


def text(found: dict[str, Any]) -> str:
    """Return the table for people."""
    lines = [
        [
            row["objective"],
            row["variant"][:12],
            quantity(row["value"], METRICS[row["objective"]].unit),
            *(_factor(row["factors"].get(name)) for name in PLAIN),
        ]
        for row in found["rows"]
    ]
    head = f"{found['machine']}; {found['model']}, {found['trials']} points known"
    noise = f"\nnoise: {found['noise']}" if found["noise"] else ""
    return head + "\n" + table(["best in", "variant", "value", *(f"times {n}" for n in PLAIN)], lines) + noise


def _factor(of: list[float] | None) -> str:
    if of is None:
        return ""
    return f"{of[0]:.2f}" if of[1] == of[2] else "{:.2f} [{:.2f}, {:.2f}]".format(*of)


def main() -> int:
    """Print how much was gained; 1 when that is not certain."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, nargs="?", default=ROOT / "recipes" / "pystdlib.yaml")
    parser.add_argument("-C", "--catalog", type=Path, default=Path(reader.default_location()))
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    found = measured(asked)
    print(json.dumps(found) if asked.json else text(found))
    timed = [of for row in found["rows"] if row["objective"] in TIMED for of in row["factors"].values()]
    return 0 if timed and all(low > 1 for _, low, _ in timed) else 1


if __name__ == "__main__":
    end(main)
