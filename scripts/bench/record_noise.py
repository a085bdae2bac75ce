"""Record timing samples on this machine, round by round: variants of a catalog, some of them twice.

    python scripts/bench/record_noise.py -C CATALOG [--model M] [--racers 8] [--twins 4] [--rounds 100] [--busy] -o FILE

One call is one start: every entrant is a fresh process, as in a build. Further calls add further starts to the same
file, so that it includes the variation between processes. The entrants are the compiler's default, the first racers of
the front, and twins: the same artifact opened once more. `--busy` keeps one core busy with another process. `trust.py`
draws its trials from such files.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from comparison.script import end

from llmbuild.errors import InputError
from llmbuild.process.child import Limits
from llmbuild.profiler import noise
from llmbuild.profiler.live import Live
from llmbuild.profiler.protocol import Subject
from llmbuild.report.rows import differences
from llmbuild.runtime import host, reader
from llmbuild.spec.workload import Workload

METRICS = ("ttft_s", "tpot_s")
WARMUP_S = 0.3
SPIN = "while True: pass"
Row = dict[str, Any]


@dataclass(frozen=True)
class Entrant:
    """One process of a start: the name it is recorded by, and what it runs."""

    name: str
    row: Row
    subject: Subject


def entrants(folder: Path, model: str, racers: int, twins: int) -> tuple[list[Entrant], Workload]:
    """Return the default, the best racers by `tpot_s`, and the twins of the best and of the default.

    Raises:
        InputError: the catalog holds too few measured variants of the model for this machine.
    """
    here = host.machine().describe()
    rows = [r for r in reader.variants(folder, model, everything=True) if r["machine"] == here and r["tpot_s"]]
    default = next((r for r in rows if r["default"]), None)
    best = sorted((r for r in rows if not r["default"]), key=lambda r: float(r["tpot_s"]))[:racers]
    if default is None or len(best) < racers:
        raise InputError(f"{folder} has {len(rows)} variants of {model} measured on this machine, {racers} + 1 needed")
    with reader.opened(folder) as connection:
        query = "SELECT workload_body FROM measurement WHERE variant = ?"
        body = connection.execute(query, (default["variant"],)).fetchone()
    workload = Workload(**reader.decode({"workload_body": body["workload_body"]})["workload_body"])
    chosen = [default, *best, *[*best, default][: max(0, twins - 1)], *([default] if twins else [])]
    names: list[str] = []
    for row in chosen:
        name = str(row["variant"])[:12]
        names.append(name if name not in names else f"{name}'")
    return [Entrant(n, r, subject(folder, r)) for n, r in zip(names, chosen, strict=True)], workload


def subject(folder: Path, row: Row) -> Subject:
    """Return what the profiler opens of a row; its check data stay out, for nothing is checked here."""
    return Subject(
        variant=row["variant"],
        artifact=row["artifact"],
        artifact_path=reader.blob_path(folder, row["artifact"]),
        parameters_path=reader.blob_path(folder, row["parameters"]),
        check_path=Path(),
        abi=row["abi"],
        driver=str(row["point"]["driver"]),
        workers=int(row["point"]["workers"]),
        tolerance=0.0,
    )


def record(
    found: list[Entrant], workload: Workload, rounds: int, seconds: float, visit_s: float, reopen: bool
) -> dict[str, Any]:
    """Return one start: nanoseconds of every answer by entrant, metric and round, and what else the machine did."""
    lives = {e.name: Live(e.subject, Limits()) for e in found}
    taken: dict[str, dict[str, list[list[int]]]] = {e.name: {m: [] for m in METRICS} for e in found}
    machine: dict[str, list[float]] = {name: [] for name in ("begin_s", "stolen", "others")}
    order, began = random.Random(monotonic()), monotonic()
    try:
        for live in lives.values():
            live.open(1)
            live.warm(workload, WARMUP_S)
        while len(machine["begin_s"]) < rounds and monotonic() - began < seconds:
            watch = noise.Watch([live.child.pid for live in lives.values()])
            machine["begin_s"].append(round(monotonic() - began, 3))
            for name in order.sample(list(lives), len(lives)):
                if reopen:
                    lives[name].open(1)
                answers = lives[name].answers(workload, visit_s)
                for metric in METRICS:
                    taken[name][metric].append([round(getattr(a, metric) * 1e9) for a in answers])
            disturbed = watch.shares()
            machine["stolen"].append(round(disturbed.stolen, 4))
            machine["others"].append(round(disturbed.others, 4))
    finally:
        for live in lives.values():
            live.child.close()
    return {"samples_ns": taken, "rounds": machine}


def main() -> int:
    """Record one start and add it to the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-C", "--catalog", type=Path, required=True)
    parser.add_argument("--model", default="pystdlib")
    parser.add_argument("--racers", type=int, default=8)
    parser.add_argument("--twins", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=230.0, help="begin no round after this")
    parser.add_argument("--visit", type=float, default=0.05, help="seconds of answers at a time")
    parser.add_argument("--keep-open", action="store_true", help="open each artifact once, not anew for each visit")
    parser.add_argument("--busy", action="store_true", help="keep one core busy with another process")
    parser.add_argument("-o", "--output", type=Path, required=True)
    asked = parser.parse_args()
    found, workload = entrants(asked.catalog, asked.model, asked.racers, asked.twins)
    known: dict[str, Any] = {"machine": host.machine().describe(), "model": asked.model, "starts": []}
    if asked.output.exists():
        known = json.loads(gzip.decompress(asked.output.read_bytes()))
    known["workload"] = {"prompt": workload.prompt, "output": workload.output, "context": workload.context}
    known["entrants"] = {e.name: {"variant": e.row["variant"], "choices": differences(e.row)} for e in found}
    other = subprocess.Popen([sys.executable, "-c", SPIN]) if asked.busy else None
    try:
        start = record(found, workload, asked.rounds, asked.seconds, asked.visit, not asked.keep_open)
    finally:
        if other is not None:
            other.kill()
            other.wait()
    known["starts"].append({"busy": asked.busy, "reopen": not asked.keep_open, **start})
    asked.output.write_bytes(gzip.compress(json.dumps(known).encode(), 9, mtime=0))
    print(f"{len(start['rounds']['begin_s'])} rounds of {len(found)} entrants in {asked.output}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    end(main)
