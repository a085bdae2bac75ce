"""Error rates of comparisons: equal variants compared, a known slowdown detected, a ranking repeated under load.

    python scripts/bench/trust.py [--noise FILE] [--trials 200] [-C CATALOG [--model M] [--live 1]] [--json]

The trials are races between samples recorded on a machine by `record_noise.py`: blocks of consecutive rounds drawn
with replacement, so that disturbances longer than a round are included. In each block of a trial of equals (A/A) the
two names are swapped at random, since the drawn blocks would otherwise include the error of the recording itself; `as
recorded` does not swap. With a catalog, the best variant also races against itself.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
from comparison.script import end

from llmbuild.build.remeasure import find_default, known_of, subject_of
from llmbuild.errors import InputError
from llmbuild.process.child import Limits
from llmbuild.profiler import noise
from llmbuild.profiler.bench import Bench
from llmbuild.profiler.protocol import Protocol, Quality
from llmbuild.report.rows import table
from llmbuild.runtime import host, reader
from llmbuild.search import front, pairs
from llmbuild.search.pairs import order
from llmbuild.spec.measurement import Measurement
from llmbuild.spec.space import Point
from llmbuild.spec.trial import Trial
from llmbuild.system.ranks import kendall as tau

RECORDED = Path(__file__).parent / "studies" / "noise-2vcpu.json.gz"
METRICS = ("tpot_s", "ttft_s")
BLOCK = 5
"""Rounds of a block: correlations in the recordings are gone after two or three."""
SLOWDOWN = 1.05
REPEATS, RACED = 10, 24
"""Repetitions of a ranking, and rounds of each."""
Samples = dict[str, dict[str, list[float]]]


@dataclass(frozen=True)
class Start:
    """One start of the recorded processes: seconds by entrant, metric and round, and what disturbed each round."""

    busy: bool
    samples: Samples
    shares: tuple[noise.Shares, ...]

    @property
    def rounds(self) -> int:
        """How many rounds it has."""
        return len(self.shares)

    @property
    def twins(self) -> list[tuple[str, str]]:
        """Return the pairs of entrants that ran the same artifact."""
        return [(name, f"{name}'") for name in self.samples if f"{name}'" in self.samples]


def load(path: Path) -> tuple[dict[str, Any], list[Start]]:
    """Return a recording's facts and its starts; rounds in which something else ran are left out of the calm ones.

    Raises:
        InputError: no such recording.
    """
    if not path.is_file():
        raise InputError(f"{path}: no recording there; scripts/bench/record_noise.py makes one")
    body = json.loads(gzip.decompress(path.read_bytes()))
    return body, [_start(found) for found in body["starts"]]


def _start(body: dict[str, Any]) -> Start:
    told = body["rounds"]
    shares = [noise.Shares(s, o) for s, o in zip(told["stolen"], told["others"], strict=True)]
    kept = [i for i, s in enumerate(shares) if body["busy"] or not s.disturbed]
    samples = {
        name: {m: [median(taken[m][i]) * 1e-9 for i in kept] for m in METRICS}
        for name, taken in body["samples_ns"].items()
    }
    return Start(body["busy"], samples, tuple(shares[i] for i in kept))


# --- trials on recorded samples ----------------------------------------------------------------------------------


def draw(start: Start, names: Sequence[str], rounds: int, chance: random.Random, swap: bool = False) -> Samples:
    """Return `rounds` rounds of the named entrants in drawn blocks; with `swap`, two change places by the block."""
    drawn: Samples = {name: {m: [] for m in METRICS} for name in names}
    while len(drawn[names[0]][METRICS[0]]) < rounds:
        at = chance.randrange(start.rounds - BLOCK + 1)
        order_ = list(names)[::-1] if swap and chance.random() < 0.5 else list(names)
        for name, source in zip(names, order_, strict=True):
            for metric in METRICS:
                drawn[name][metric] += start.samples[source][metric][at : at + BLOCK]
    return {name: {m: values[:rounds] for m, values in taken.items()} for name, taken in drawn.items()}


@dataclass(frozen=True)
class Ended:
    """How a race of two ended: what was found in each metric, and after how many rounds."""

    orders: dict[str, pairs.Order]
    rounds: int


def race(mine: dict[str, list[float]], theirs: dict[str, list[float]], looks: Sequence[int]) -> Ended:
    """Race two as a build does: ask after each look, and go on while one metric is undecided."""
    for look in looks:
        found = {m: order(mine[m][:look], theirs[m][:look]) for m in METRICS}
        if "undecided" not in found.values():
            return Ended(found, look)
    return Ended(found, looks[-1])


def slowed(taken: dict[str, list[float]]) -> dict[str, list[float]]:
    """Return samples as they would be of a variant that is slower by the known factor."""
    return {m: [v * SLOWDOWN for v in values] for m, values in taken.items()}


def of_twins(starts: Sequence[Start], trials: int, chance: random.Random) -> list[dict[str, Any]]:
    """Return a row for each artifact that was recorded twice: A/A, and A against itself slowed down."""
    looks = Protocol().looks()
    rows = []
    for pair in starts[0].twins:
        equal, slower = [], []
        for _ in range(trials):
            start = chance.choice(starts)
            drawn = draw(start, pair, looks[-1], chance, swap=True)
            equal.append(race(drawn[pair[0]], drawn[pair[1]], looks))
            slower.append(race(drawn[pair[0]], slowed(drawn[pair[1]]), looks))
        kept = [race(s.samples[pair[0]], s.samples[pair[1]], [x for x in looks if x <= s.rounds]) for s in starts]
        rows.append(
            {
                "variant": pair[0],
                "trials": trials,
                "undecided": fmean(not apart(e) for e in equal),
                "slowdown_found": fmean(e.orders["tpot_s"] == "less" for e in slower),
                "wrong_way": fmean(e.orders["tpot_s"] == "greater" for e in slower),
                "rounds_until_found": median(rounds_found(slower) or [looks[-1]]),
                "as_recorded_undecided": sum(not apart(e) for e in kept),
                "as_recorded": len(kept),
                "noise": fmean(spread(s.samples[pair[0]]["tpot_s"], s.samples[pair[1]]["tpot_s"]) for s in starts),
            }
        )
    return rows


def apart(ended: Ended) -> bool:
    """Say whether two were told apart in some metric."""
    return bool({"less", "greater"} & set(ended.orders.values()))


def rounds_found(ended: Sequence[Ended]) -> list[int]:
    """Return after how many rounds the slowdown was found, where it was."""
    return [e.rounds for e in ended if e.orders["tpot_s"] == "less"]


def spread(mine: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the spread of the log-ratio of a round: half the distance of the quartiles over that of a normal one."""
    logs = sorted(math.log(a / b) for a, b in zip(mine, theirs, strict=True))
    return (logs[3 * len(logs) // 4] - logs[len(logs) // 4]) / 1.349


def ranking(start: Start, names: Sequence[str], chance: random.Random) -> list[str]:
    """Return the variants as a race of `RACED` rounds ranks them by `tpot_s`."""
    drawn = draw(start, names, RACED, chance)
    return sorted(names, key=lambda name: median(drawn[name]["tpot_s"]))


def kendall(one: Sequence[str], other: Sequence[str]) -> float:
    """Return Kendall's tau of two rankings of the same things."""
    places = np.array([other.index(name) for name in one], dtype=float)
    return tau(np.arange(len(one), dtype=float), places)


def of_rankings(starts: Sequence[Start], chance: random.Random) -> list[dict[str, Any]]:
    """Return a row for each start: how alike its rankings of the same eight variants are, and what it is flagged as."""
    names = [name for name in starts[0].samples if not name.endswith("'")][1:9]
    rows = []
    for start in starts:
        ranked = [ranking(start, names, chance) for _ in range(REPEATS)]
        taus = [kendall(a, b) for a, b in combinations(ranked, 2)]
        row = {"busy": start.busy, "variants": len(names), "repeats": REPEATS, "rounds": RACED}
        rows.append({**row, "tau_mean": fmean(taus), "tau_least": min(taus), "noisy": noise.description(start.shares)})
    return rows


# --- live --------------------------------------------------------------------------------------------------------


def of_live(folder: Path, model: str, seconds: float, repeats: int) -> list[dict[str, Any]]:
    """Return a row for each live race of the best variant against itself, each in processes of its own.

    Raises:
        InputError: the catalog has no measured variant of the model and its default for this machine.
        LoadRefused: this host must not open it.
    """
    rows = [r for r in reader.variants(folder, model) if r["tpot_s"] and not r["default"]]
    if not rows:
        raise InputError(f"{folder} has no measured variant of {model}")
    best = known_of(folder, min(rows, key=lambda r: float(r["tpot_s"])))
    default = find_default(folder, best)
    if default is None:
        raise InputError(f"{folder} has no default variant of {model}")
    mine = subject_of(folder, best)
    twin = replace(mine, variant=mine.variant[:-1] + ("0" if mine.variant[-1] != "0" else "1"))
    found = []
    for _ in range(repeats):
        protocol = replace(Protocol(), race_seconds=seconds)
        bench = Bench([best.workload], Quality(None, "not asked"), "", Limits(), protocol)
        try:
            bench.measure(subject_of(folder, default), baseline=True)
            raced = [of_one[0] for of_one in bench.race([mine, twin], _contenders)]
        finally:
            bench.close()
        found.append(_live_row([m for m in raced if m.variant in (mine.variant, twin.variant)]))
    return found


def _contenders(measured: Sequence[Measurement], _: float) -> set[str]:
    return front.contenders(_trials(measured[1:]), measured[1:], METRICS)


def _trials(measured: Sequence[Measurement]) -> list[Trial]:
    return [Trial("", 0, Point(()), m.variant, False, None, m.artifact, 1, 1, (m,), None, 0.0) for m in measured]


def _live_row(measured: Sequence[Measurement]) -> dict[str, Any]:
    one, other = (m.readings["tpot_s"] for m in measured)
    standings = front.standings(_trials(measured), measured[0].workload.name, METRICS, ())
    return {
        "variant": measured[0].variant[:12],
        "rounds": len(one.samples),
        "orders": {m: order(measured[0].readings[m].samples, measured[1].readings[m].samples) for m in METRICS},
        "ratio": median(a / b for a, b in zip(one.samples, other.samples, strict=True)),
        "standings": [s.status for s in standings],
        "noisy": measured[0].notes.get("noise", ""),
    }


# --- output ------------------------------------------------------------------------------------------------------


def text(document: dict[str, Any]) -> str:
    """Return the tables for people."""
    parts = [f"recorded on {document['machine']}, {document['calm_rounds']} calm rounds in {document['starts']} starts"]
    header = ["same artifact twice", "noise", "A/A undecided", "as recorded", "5 % found", "after", "wrong way"]
    lines = [
        [
            row["variant"],
            f"{row['noise']:.1%}",
            f"{row['undecided']:.1%} of {row['trials']}",
            f"{row['as_recorded_undecided']} of {row['as_recorded']}",
            f"{row['slowdown_found']:.1%}",
            f"{row['rounds_until_found']:.0f} rounds",
            f"{row['wrong_way']:.1%}",
        ]
        for row in document["twins"]
    ]
    parts += [table(header, lines), ""]
    header = ["ranking of 8, 10 times", "mean tau", "least tau", "flagged"]
    lines = [
        ["one core busy" if r["busy"] else "calm", f"{r['tau_mean']:.3f}", f"{r['tau_least']:.3f}", r["noisy"] or "-"]
        for r in document["rankings"]
    ]
    parts.append(table(header, lines, left=(0, 3)))
    for row in document["live"]:
        told = ", ".join(f"{m} {o}" for m, o in row["orders"].items())
        shown = f"live A/A of {row['variant']}: {told} after {row['rounds']} rounds, ratio {row['ratio']:.4f}, "
        parts += [
            "",
            shown + f"standings {' and '.join(row['standings'])}" + (f" ({row['noisy']})" * bool(row["noisy"])),
        ]
    return "\n".join(parts)


def main() -> int:
    """Print what the comparisons can be trusted with."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noise", type=Path, default=RECORDED)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-C", "--catalog", type=Path)
    parser.add_argument("--model", default="pystdlib")
    parser.add_argument("--live", type=int, default=1, help="live races, with a catalog")
    parser.add_argument("--seconds", type=float, default=40.0, help="of each live race")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    body, starts = load(asked.noise)
    calm = [s for s in starts if not s.busy and s.rounds >= Protocol().race_rounds]
    if not calm:
        raise InputError(f"{asked.noise} has no start with {Protocol().race_rounds} calm rounds")
    live: Callable[[], list[dict[str, Any]]] = lambda: of_live(asked.catalog, asked.model, asked.seconds, asked.live)  # noqa: E731
    document = {
        "machine": body["machine"],
        "here": host.machine().describe(),
        "starts": len(calm),
        "calm_rounds": sum(s.rounds for s in calm),
        "twins": of_twins(calm, asked.trials, random.Random(asked.seed)),
        "rankings": of_rankings(starts, random.Random(asked.seed)),
        "live": live() if asked.catalog else [],
    }
    print(json.dumps(document) if asked.json else text(document))
    return 0


if __name__ == "__main__":
    end(main)
