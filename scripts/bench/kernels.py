"""Compare llmbuild's kernels with the compiler's own code for a target, in interleaved rounds on this machine.

    python scripts/bench/kernels.py [-t TARGET] [--format FORMAT] [--recipe RECIPE] [-C CATALOG] [--json]

Both read the same weights in the same format. The compiler is given each layout it knows (row after row, packed when
the model is imported, packed by itself when it is loaded) at O2 and at O3; the fastest of these counts. A ratio is the
compiler's time over llmbuild's, paired by round, with its 95 % bootstrap interval: above 1 llmbuild is faster.
Artifacts are made once and kept in the catalog.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

from comparison.rounds import Entrant, Participant, Plan, compare
from comparison.script import end
from comparison.setup import OWN_WORKER
from comparison.table import SECONDS, ratio

from llmbuild.build.job import Job
from llmbuild.build.jobs import jobs_of
from llmbuild.build.request import BuildRequest
from llmbuild.build.steps import Steps
from llmbuild.catalog.writer import Catalog
from llmbuild.digest import plain
from llmbuild.errors import InputError
from llmbuild.kernels.choose import instructions
from llmbuild.process.child import Limits
from llmbuild.profiler import statistics
from llmbuild.report.rows import quantity, table
from llmbuild.runtime import host, reader
from llmbuild.spec.space import Value
from llmbuild.spec.variant import Failure

ROOT = Path(__file__).parent.parent.parent
OWN = "own kernels"
COMPILER: dict[str, dict[str, Value]] = {
    f"compiler, {name}, {level}": {"kernel": "compiler", "opt_level": level, **choices}
    for level in ("O2", "O3")
    for name, choices in {
        "packed": {"layout": "packed"},
        "row-major": {"layout": "row_major", "data_tiling": "off"},
        "tiled by dispatch": {"layout": "row_major", "data_tiling": "dispatch"},
        "tiled globally": {"layout": "row_major", "data_tiling": "global"},
    }.items()
}
"""What the compiler is given, by name."""
METRICS = ("prefill_s", "decode_s")


def say(text: str) -> None:
    """Tell what goes on."""
    print(text, file=sys.stderr, flush=True)


def options(words: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-t", "--target", default="host", help="name or file of a target that this host can run")
    parser.add_argument("--format", default="int8", help="weight format of all matrices")
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "smollm2-135m.yaml")
    parser.add_argument("-C", "--catalog", type=Path, default=Path(reader.default_location()))
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--decode", type=int, default=16, help="tokens one by one")
    parser.add_argument("--workers", type=int, default=host.cores())
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--limit", type=float, default=300.0, help="seconds that one step of a participant may take")
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", help="only compiler variants with one of these words in their name"
    )
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(words)


def participants(asked: argparse.Namespace, job: Job) -> list[Participant]:
    """Return ours and the compiler's variants, made if they are not in the catalog; what fails has its reason."""
    own = {"kernel": "own", "layout": "packed", "opt_level": "O2", "work_groups": _work_groups(job)}
    wanted = {n: c for n, c in COMPILER.items() if not asked.only or any(word in n for word in asked.only)}
    catalog = Catalog(asked.catalog)
    steps = Steps(job, catalog)
    try:
        catalog.register(steps.registered)
        return [_participant(asked, job, steps, name, choices) for name, choices in ({OWN: own} | wanted).items()]
    finally:
        steps.close()
        catalog.close()


def _work_groups(job: Job) -> Value:
    return next(knob for knob in job.space.knobs if knob.name == "work_groups").domain[0]


def _participant(
    asked: argparse.Namespace, job: Job, steps: Steps, name: str, choices: dict[str, Value]
) -> Participant:
    say(f"making {name}")
    point = job.space.complete({"weight_format": asked.format, **choices})
    command = (sys.executable, str(OWN_WORKER))
    program = steps.import_(point)
    artifact = program if isinstance(program, Failure) else steps.compile(program, point)
    if isinstance(program, Failure) or isinstance(artifact, Failure):
        assert isinstance(artifact, Failure)
        return Participant(name, "", asked.format, command, {}, absent=f"{artifact.stage}: {artifact.reason}")
    opening = {
        "artifact": str(reader.blob_path(asked.catalog, artifact.digest)),
        "parameters": str(reader.blob_path(asked.catalog, program.parameters)),
        "abi": plain(program.abi),
        "driver": "local-task",
        "workers": asked.workers,
    }
    return Participant(name, "", asked.format, command, opening, job.variant(program, point).digest)


def report(asked: argparse.Namespace) -> dict[str, Any]:
    """Run the comparison and return it as one document.

    Raises:
        InputError: our kernels do not read the format on the target, or this host cannot run it.
    """
    (make,) = jobs_of(BuildRequest(recipes=(asked.recipe,), targets=(asked.target,)))
    job = make()
    if missing := sorted(set(job.target.requires) - host.features()):
        raise InputError(f"this host cannot run target {job.target.name}: it lacks {' '.join(missing)}")
    unit = instructions(job.target.requires, asked.format)
    entering = participants(asked, job)
    drawn = random.Random(0)
    tokens = [drawn.randrange(256) for _ in range(asked.prompt + asked.decode)]
    prompt, forced = tuple(tokens[: asked.prompt]), tuple(tokens[asked.prompt :])
    plan = Plan(
        prompt, forced, (), asked.rounds, 0, Limits(seconds=asked.limit, memory_bytes=1 << 40), 0, asked.workers
    )
    found, noisy = compare(entering, plan, say)
    ours, *theirs = found
    ran = [entrant for entrant in theirs if not entrant.reason]
    return {
        "machine": host.machine().describe(),
        "model": job.recipe.name,
        "target": job.target.name,
        "instructions": unit.name,
        **{n: getattr(asked, n) for n in ("format", "prompt", "decode", "workers", "rounds")},
        "noise": noisy,
        "rows": [_row(entrant, ours) for entrant in found],
        "best": {metric: _best(ran, metric) for metric in METRICS} if ran and not ours.reason else None,
    }


def _best(entrants: list[Entrant], metric: str) -> str:
    return min(entrants, key=lambda e: statistics.median_of(list(e.samples[metric].values())).median).participant.name


def _row(entrant: Entrant, ours: Entrant) -> dict[str, Any]:
    read = {name: list(entrant.samples.get(name, {}).values()) for name in SECONDS}
    ratios = {metric: ratio(entrant, ours, metric) for metric in METRICS if entrant is not ours}
    return {
        "participant": entrant.participant.name,
        "variant": entrant.participant.variant or None,
        "status": "absent" if entrant.participant.absent else "failed" if entrant.reason else "measured",
        "reason": entrant.reason or None,
        **{name: statistics.median_of(read[name]).median if read[name] else None for name in METRICS},
        "ratios": {m: {"median": r.median, "low": r.low, "high": r.high} for m, r in ratios.items() if r is not None},
        "samples": {name: read[name] for name in METRICS},
    }


def text(made: dict[str, Any]) -> str:
    """Return the table and what it says."""
    header = ["variant", f"prefill {made['prompt']}", "decode/token", "prefill over ours", "decode over ours"]
    lines = [
        [
            row["participant"],
            *(quantity(row[m], "s") for m in METRICS),
            *(_factor(row["ratios"].get(m)) for m in METRICS),
        ]
        for row in made["rows"]
    ]
    best = made["best"] or {}
    rows = {row["participant"]: row for row in made["rows"]}
    fastest = [
        f"{what}: llmbuild is {_factor(rows[best[m]]['ratios'][m])} times as fast as the compiler: {best[m]}"
        for m, what in zip(METRICS, ("prefill", "decode"), strict=True)
        if m in best
    ]
    reasons = [f"{row['participant']}: {row['status']}: {row['reason']}" for row in made["rows"] if row["reason"]]
    return "\n".join([table(header, lines), "", *fastest, *reasons])


def _factor(found: dict[str, float] | None) -> str:
    return f"{found['median']:.2f} [{found['low']:.2f}, {found['high']:.2f}]" if found else ""


def main() -> int:
    """Print the comparison; 1 when ours or all of the compiler's failed."""
    asked = options()
    made = report(asked)
    if asked.json:
        print(json.dumps(made))
    else:
        print(
            f"{made['machine']}; {made['model']} in {made['format']} for {made['target']} ({made['instructions']}), "
            f"batch 1, {made['workers']} workers, {made['rounds']} rounds of {made['decode']} tokens"
        )
        print(text(made))
        print(f"noisy machine: {made['noise']}" if made["noise"] else "the machine was quiet")
    return 0 if made["best"] else 1


if __name__ == "__main__":
    end(main)
