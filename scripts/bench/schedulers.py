"""Compare schedulers on a bursty trace, over a load curve with a simulated clock: the same requests, forced lengths.

    python scripts/bench/schedulers.py [-C CATALOG --variant DIGEST] [--trace FILE.csv --scale PROMPT:OUTPUT] [--json]
    python scripts/bench/schedulers.py --answers FILE

Requests come in bursts (Gamma gaps, coefficient of variation 3), or as in a trace of Azure's public form (columns
TIMESTAMP, ContextTokens, GeneratedTokens; lengths divided by `--scale`), at shares of the capacity: what a server
answers in a second that is never idle. Two tenants ask, one of them for a tenth. Without a variant, the steps take what
was measured of SmolLM2-135M in int8 on two cores. Figures are means over seeds with Student's 95 % intervals.

`--answers` takes what `llmbuild profile --answers --held-out` wrote: prompts and answers then have a real model's
lengths, in bursts, and `isrtf` is compared by what the predictor said of prompts that it had not seen.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import math
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from operator import attrgetter
from pathlib import Path
from statistics import mean, stdev
from time import perf_counter
from typing import Any

from llmbuild.runtime import reader
from llmbuild.serve.lengths import History, Lengths
from llmbuild.serve.predict.judge import request_of
from llmbuild.serve.predict.learned import Learned
from llmbuild.serve.predict.model import Spread
from llmbuild.serve.request import Request
from llmbuild.serve.schedule.fair_batching import FairBatching
from llmbuild.serve.schedule.fcfs import Fcfs
from llmbuild.serve.schedule.isrtf import Isrtf
from llmbuild.serve.schedule.sarathi import Sarathi
from llmbuild.serve.schedule.state import Batch, Scheduler, State
from llmbuild.serve.schedule.vtc import Vtc
from llmbuild.serve.simulate import Arrival, Expects, Host, Life, StepTime, simulate
from llmbuild.spec.load_curve import Fit, Table, Work

MEASURED = Fit(
    shared=True,
    table=Table(
        (1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 96, 128),
        (0.0115, 0.0135, 0.0232, 0.0241, 0.0289, 0.0328, 0.0397, 0.0453, 0.0650, 0.1257, 0.2013, 0.2539),
    ),
    read_s=0.0,
    context_s=3.66e-6,
    seen_s=8.88e-7,
)
"""SmolLM2-135M in int8, context 1664, on a VM with 2 cores of an AMD EPYC (Zen 3): `llmbuild profile --load`, with an
error p95 of 16 %, on a machine that others used too."""
SHAPE = 1 / 9
"""Of Gamma gaps: a coefficient of variation of 3."""
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
LIGHT, HEAVY = "light", "heavy"


@dataclass(frozen=True)
class Setting:
    """What is compared: steps, a host, deadlines, and the lengths of requests."""

    step_s: StepTime
    host: Host
    ttft_s: float
    tpot_s: float
    lengths: Callable[[random.Random], tuple[int, int]]
    count: int
    answers: Answers | None = None


@dataclass(frozen=True)
class Answers:
    """Lengths of a real model's answers, and what a predictor said of each that had not seen its prompt."""

    rows: Sequence[Mapping[str, Any]]
    spread: Spread
    most: int
    """Tokens that an answer may have."""

    @staticmethod
    def read(path: Path) -> Answers:
        """Return what `llmbuild profile --answers --held-out` wrote."""
        with gzip.open(path, "rt") if path.suffix == ".gz" else open(path) as file:
            found = json.load(file)
        return Answers(found["rows"], Spread(tuple(found["quantiles"])), found["max_tokens"])

    def predictors(self) -> dict[str, Callable[[], Expects]]:
        """Return what makes the predictors that are compared, by name."""
        found: dict[str, Callable[[], Expects]] = {
            "kinds": lambda: OfRequests(History(), self, lambda one: str(self.rows[one.row]["tenant"])),
            "trained": lambda: OfRequests(Learned(lambda ids: float(self.rows[ids[0]]["z"]), self.spread), self),
        }
        if "z_other_groups" in self.rows[0]:
            other = lambda ids: float(self.rows[ids[0]]["z_other_groups"])  # noqa: E731 - beside its sibling
            found["other groups"] = lambda: OfRequests(Learned(other, self.spread), self)
        return found


@dataclass(frozen=True, slots=True)
class Drawn(Arrival):
    """A request that has the lengths of a row of `Answers`."""

    row: int = 0


class OfRequests:
    """Asks a server's own predictor about simulated requests, each of the tenant that `whose` names."""

    def __init__(
        self, lengths: Lengths, answers: Answers | None = None, whose: Callable[[Any], str] = attrgetter("tenant")
    ) -> None:
        self._lengths, self._whose = lengths, whose
        self._most = None if answers is None else answers.most

    def predict(self, asked: Arrival, tokens: int) -> float | None:
        """Return what the predictor says."""
        return self._lengths.predict(self._request(asked), tokens)

    def learn(self, asked: Arrival, tokens: int) -> None:
        """Tell the predictor of an answer."""
        self._lengths.learn(self._request(asked), tokens)

    def _request(self, asked: Arrival) -> Request:
        return request_of(getattr(asked, "row", 0), self._whose(asked), self._most)


class Timed:
    """A scheduler whose own time is added up."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler, self.seconds, self.calls = scheduler, 0.0, 0

    def __call__(self, state: State, now_s: float) -> Batch:
        """Return the scheduler's batch."""
        begin = perf_counter()
        batch = self._scheduler(state, now_s)
        self.seconds, self.calls = self.seconds + perf_counter() - begin, self.calls + 1
        return batch


@dataclass(frozen=True)
class Candidate:
    """A scheduler, and what it is told of lengths: the true ones with a `spread` (0 is an oracle), a predictor's, or
    nothing.
    """

    scheduler: Scheduler
    spread: float | None = None
    lengths: Callable[[], Expects] | None = None


def schedulers(setting: Setting) -> dict[str, Candidate]:
    """Return what is compared, by name."""
    made = {} if setting.answers is None else setting.answers.predictors()
    return {
        "fcfs": Candidate(Fcfs()),
        "sarathi": Candidate(Sarathi()),
        "fairbatching": Candidate(FairBatching(setting.step_s, setting.ttft_s, setting.tpot_s)),
        "isrtf oracle": Candidate(Isrtf(), 0.0),
        "isrtf noisy": Candidate(Isrtf(), 0.8),
        **{f"isrtf {name}": Candidate(Isrtf(), lengths=each) for name, each in made.items()},
        "isrtf history": Candidate(Isrtf(), lengths=lambda: OfRequests(History(), setting.answers)),
        "isrtf blind": Candidate(Isrtf()),
        "vtc": Candidate(Vtc()),
    }


def log_normal(prompt: int, output: int, context: int) -> Callable[[random.Random], tuple[int, int]]:
    """Return lengths about medians, with a sigma of 1, cut to the context."""

    def drawn(draw: random.Random) -> tuple[int, int]:
        first = min(max(1, round(prompt * math.exp(draw.gauss(0, 1)))), context // 2)
        return first, min(max(1, round(output * math.exp(draw.gauss(0, 1)))), context - first)

    return drawn


def bursts(setting: Setting, rate: float, seed: int) -> list[Arrival]:
    """Return requests in bursts, at a mean rate."""
    draw, now, found = random.Random(seed), 0.0, []
    for _ in range(setting.count):
        now += draw.gammavariate(SHAPE, 1 / SHAPE) / rate
        if setting.answers is None:
            prompt, output = setting.lengths(draw)
            found.append(Arrival(now, prompt, output, _tenant(draw)))
        else:
            row = draw.randrange(len(setting.answers.rows))
            one = setting.answers.rows[row]
            found.append(Drawn(now, one["prompt"], one["output"], _tenant(draw), row=row))
    return found


def _tenant(draw: random.Random) -> str:
    return LIGHT if draw.random() < 0.1 else HEAVY


def traced(path: Path, scale: tuple[float, float], setting: Setting, rate: float, seed: int) -> list[Arrival]:
    """Return a stretch of a trace of Azure's form, its gaps stretched to a mean rate and its lengths divided."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    draw = random.Random(seed)
    first = draw.randrange(max(1, len(rows) - setting.count))
    taken = rows[first : first + setting.count]
    times = [datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp() for row in taken]
    stretch = (len(taken) - 1) / rate / max(1e-9, times[-1] - times[0])
    found = []
    for at, row in zip(times, taken, strict=True):
        prompt = min(max(1, round(int(row["ContextTokens"]) / scale[0])), setting.host.context - 1)
        output = min(max(1, round(int(row["GeneratedTokens"]) / scale[1])), setting.host.context - prompt)
        found.append(Arrival((at - times[0]) * stretch, prompt, output, _tenant(draw)))
    return found


Trace = Callable[[float, int], list[Arrival]]
"""Requests at a mean rate, by a seed."""


def capacity(setting: Setting, trace: Trace) -> float:
    """Return the requests per second of a server that is never idle."""
    arrivals = [replace(one, arrival_s=0.0) for one in trace(1.0, 0)]
    return len(arrivals) / simulate(arrivals, Sarathi(), setting.host, setting.step_s).end_s


def told(arrivals: Sequence[Arrival], spread: float | None, seed: int) -> list[Arrival]:
    """Return requests with what is said of their lengths."""
    if spread is None:
        return list(arrivals)
    draw = random.Random(seed)
    return [replace(one, predicted=one.output * math.exp(draw.gauss(0, spread))) for one in arrivals]


def figures(lives: Sequence[Life], end_s: float, setting: Setting, timed: Timed) -> dict[str, float]:
    """Return what requests saw; all of them have ended."""
    longest = sorted(lives, key=lambda one: one.asked.output)[-max(1, len(lives) // 10) :]
    alone = [setting.step_s(Work.of([(0, one.asked.prompt)])) for one in longest]
    step = setting.step_s(Work.of([(setting.host.context // 4, 1)]))
    ideal = [first + step * (one.asked.output - 1) for first, one in zip(alone, longest, strict=True)]
    good = [
        one for one in lives if one.ttft_s <= setting.ttft_s and (one.tpot_s is None or one.tpot_s <= setting.tpot_s)
    ]
    tpots = [one.tpot_s for one in lives if one.tpot_s is not None]
    return {
        "ttft_s_p50": percentile([one.ttft_s for one in lives], 0.5),
        "ttft_s_p99": percentile([one.ttft_s for one in lives], 0.99),
        "light_ttft_s_p99": percentile([one.ttft_s for one in lives if one.asked.tenant == LIGHT], 0.99),
        "tpot_s_p50": percentile(tpots, 0.5),
        "tpot_s_p99": percentile(tpots, 0.99),
        "e2e_s_mean": mean(one.e2e_s for one in lives),
        "e2e_s_p99": percentile([one.e2e_s for one in lives], 0.99),
        "longest_decile_slowdown": mean(one.e2e_s / best for one, best in zip(longest, ideal, strict=True)),
        "goodput": len(good) / len(lives),
        "scheduler_us": timed.seconds / timed.calls * 1e6,
    }


def percentile(values: Sequence[float], share: float) -> float:
    """Return a percentile: the least value that so many are not above."""
    return sorted(values)[math.ceil(share * len(values)) - 1] if values else math.nan


def compared(asked: argparse.Namespace) -> list[dict[str, object]]:
    """Return a row for each load and scheduler: means over seeds, and half of their 95 % intervals."""
    setting = setting_of(asked)
    full, seeds = capacity(setting, trace_of(asked, setting)), range(asked.seeds)
    names = [name for name in schedulers(setting) if name == "fcfs" or name not in asked.without]
    cells = [(load, name) for load in asked.loads for name in names]
    tasks = [(asked, full * load / 100, name, seed) for load, name in cells for seed in seeds]
    if asked.jobs > 1:
        with ProcessPoolExecutor(asked.jobs) as pool:
            done = iter(list(pool.map(outcome, tasks)))
    else:
        done = iter(list(map(outcome, tasks)))
    seen = {cell: [next(done) for _ in seeds] for cell in cells}
    return [_row(load, full * load / 100, name, seen[load, name], seen[load, names[0]]) for load, name in cells]


def _row(
    load: int, rate: float, name: str, seen: Sequence[dict[str, float]], first: Sequence[dict[str, float]]
) -> dict[str, object]:
    row: dict[str, object] = {"load": load, "rate_per_s": rate, "scheduler": name}
    ratios = [one["e2e_s_mean"] / other["e2e_s_mean"] for one, other in zip(seen, first, strict=True)]
    columns = {figure: [one[figure] for one in seen] for figure in seen[0]}
    for figure, values in {**columns, "e2e_s_of_fcfs": ratios}.items():
        row[figure] = mean(values)
        row[f"{figure}_half"] = STUDENT[len(values)] * stdev(values) / math.sqrt(len(values))
    return row


def outcome(task: tuple[argparse.Namespace, float, str, int]) -> dict[str, float]:
    """Return what requests saw under a scheduler, by the options, the rate, its name and the seed."""
    asked, rate, name, seed = task
    setting = setting_of(asked)
    one, arrivals = schedulers(setting)[name], trace_of(asked, setting)(rate, seed)
    timed, lengths = Timed(one.scheduler), None if one.lengths is None else one.lengths()
    run = simulate(told(arrivals, one.spread, seed), timed, setting.host, setting.step_s, lengths=lengths)
    return figures(run.lives, run.end_s, setting, timed)


def trace_of(asked: argparse.Namespace, setting: Setting) -> Trace:
    """Return what makes requests."""

    def trace(rate: float, seed: int) -> list[Arrival]:
        if asked.trace is None:
            return bursts(setting, rate, seed)
        prompt, output = map(float, asked.scale.split(":"))
        return traced(asked.trace, (prompt, output), setting, rate, seed)

    return trace


def options(words: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-C", "--catalog", type=Path, default=Path("catalog"))
    parser.add_argument("--variant", help="whose load curve is taken, by the whole digest")
    parser.add_argument("--trace", type=Path, help="a CSV file of Azure's form; else bursts that are drawn")
    parser.add_argument("--scale", default="8:4", metavar="PROMPT:OUTPUT", help="by what a trace's lengths are divided")
    parser.add_argument("--answers", type=Path, metavar="FILE", help="what `llmbuild profile --held-out` wrote")
    parser.add_argument("--loads", type=int, nargs="+", default=[70, 90, 110], help="percent of the capacity")
    parser.add_argument("--seeds", type=int, choices=sorted(STUDENT), default=5)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--ttft", type=float, default=2.0, help="deadline of first tokens in seconds")
    parser.add_argument("--tpot", type=float, default=0.15, help="deadline of later tokens in seconds")
    parser.add_argument("--without", nargs="+", default=[], metavar="NAME", help="schedulers that are left out")
    parser.add_argument("-j", "--jobs", type=int, default=1, help="processes; the scheduler's own time is right with 1")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(words)


def setting_of(asked: argparse.Namespace) -> Setting:
    """Return what is compared."""
    step_s, context = MEASURED.seconds, 1664
    if asked.variant:
        found = reader.load_curves(asked.catalog, [asked.variant])
        if not found:
            sys.exit(f"{asked.variant} has no load curve: `llmbuild profile {asked.variant[:12]} --load` measures it")
        step_s, context = found[0].step_s, found[0].context
    answers = None if asked.answers is None else Answers.read(asked.answers)
    host = Host(asked.sequences, asked.sequences * -(-context // 32), 32, context)
    return Setting(step_s, host, asked.ttft, asked.tpot, log_normal(64, 48, context), asked.requests, answers)


def main(words: list[str] | None = None) -> None:
    """Print a table, or one JSON document."""
    asked = options(words)
    rows = compared(asked)
    if asked.json:
        print(json.dumps({"ttft_s": asked.ttft, "tpot_s": asked.tpot, "requests": asked.requests, "rows": rows}))
        return
    shown = "ttft_s_p50 ttft_s_p99 light_ttft_s_p99 tpot_s_p99 e2e_s_mean e2e_s_of_fcfs e2e_s_p99".split()
    shown += ["longest_decile_slowdown", "goodput", "scheduler_us"]
    if asked.answers is not None:
        shown = "ttft_s_p99 tpot_s_p99 e2e_s_mean e2e_s_of_fcfs e2e_s_p99 longest_decile_slowdown goodput".split()
    print(f"deadlines {asked.ttft:g} s and {asked.tpot:g} s, {asked.requests} requests, {asked.seeds} seeds")
    print(f"{'load':>5} {'scheduler':<18}" + "".join(f"{name.removesuffix('_slowdown'):>18}" for name in shown))
    for row in rows:
        cells = "".join(f"{row[name]:11.3g} ±{row[f'{name}_half']:<5.2g}" for name in shown)
        print(f"{row['load']:>4}% {row['scheduler']:<18}{cells}".rstrip())


if __name__ == "__main__":
    main()
