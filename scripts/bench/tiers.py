"""The cost of a lower tier on this machine: the same model and format for several targets, in interleaved rounds.

    python scripts/bench/tiers.py [-t TARGET]... [--format FORMAT]... [--recipe RECIPE] [-C CATALOG] [--json]

Each target runs its usual kernels: llmbuild's where they support its instruction set and the format, else the
compiler's on packed weights. A ratio is a tier over the last target, of the same format, paired by round, with its 95
% bootstrap interval: above 1 the tier is slower. Artifacts are made once and kept in the catalog.
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
from llmbuild.kernels.choose import choose
from llmbuild.process.child import Limits
from llmbuild.profiler import statistics
from llmbuild.report.rows import quantity, table
from llmbuild.runtime import host, reader
from llmbuild.spec.space import Value
from llmbuild.spec.variant import Failure

ROOT = Path(__file__).parent.parent.parent
TARGETS = ("x86-64-v2", "x86-64-v3", "x86-64-v4", "host")
FORMATS = ("f32", "f16", "int8", "int4_g128")
METRICS = ("prefill_s", "decode_s")


def say(text: str) -> None:
    """Tell what goes on."""
    print(text, file=sys.stderr, flush=True)


def options(words: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-t", "--target", action="append", help=f"the last is the measure; {' '.join(TARGETS)}")
    parser.add_argument("--format", action="append", help=" ".join(FORMATS))
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "pystdlib.yaml")
    parser.add_argument("-C", "--catalog", type=Path, default=Path(reader.default_location()))
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the prompt")
    parser.add_argument("--decode", type=int, default=64, help="tokens one by one")
    parser.add_argument("--driver", choices=["local-sync", "local-task"], default="local-sync")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(words)


def choices(job: Job, form: str) -> dict[str, Value]:
    """Return what a target is given for a format."""
    plainly: dict[str, Value] = {"weight_format": form, "layout": "packed", "opt_level": "O2"}
    if choose(job.target.requires, form) is None:
        return plainly
    groups = next(knob for knob in job.space.knobs if knob.name == "work_groups").domain[0]
    return {**plainly, "kernel": "own", "work_groups": groups}


def participants(asked: argparse.Namespace, job: Job) -> list[Participant]:
    """Return a target's variants, made if they are not in the catalog; what fails has its reason.

    Raises:
        InputError: this host cannot run the target.
    """
    if missing := sorted(set(job.target.requires) - host.features()):
        raise InputError(f"this host cannot run target {job.target.name}: it lacks {' '.join(missing)}")
    catalog = Catalog(asked.catalog)
    steps = Steps(job, catalog)
    try:
        catalog.register(steps.registered)
        return [_participant(asked, job, steps, form) for form in asked.format or FORMATS]
    finally:
        steps.close()
        catalog.close()


def _participant(asked: argparse.Namespace, job: Job, steps: Steps, form: str) -> Participant:
    say(f"making {job.target.name} {form}")
    wanted = choices(job, form)
    point = job.space.complete(wanted)
    unit = choose(job.target.requires, form)
    name, kernel = f"{job.target.name} {form}", unit.name if unit and point["kernel"] == "own" else "compiler"
    command = (sys.executable, str(OWN_WORKER))
    program = steps.import_(point)
    artifact = program if isinstance(program, Failure) else steps.compile(program, point)
    if isinstance(program, Failure) or isinstance(artifact, Failure):
        assert isinstance(artifact, Failure)
        return Participant(name, job.target.name, form, command, {}, absent=f"{artifact.stage}: {artifact.reason}")
    opening = {
        "artifact": str(reader.blob_path(asked.catalog, artifact.digest)),
        "parameters": str(reader.blob_path(asked.catalog, program.parameters)),
        "abi": plain(program.abi),
        "driver": asked.driver,
        "workers": 1 if asked.driver == "local-sync" else 0,
    }
    return Participant(
        name, job.target.name, form, command, opening, job.variant(program, point).digest, choices=kernel
    )


def report(asked: argparse.Namespace) -> dict[str, Any]:
    """Run the comparison and return it as one document."""
    request = BuildRequest(recipes=(asked.recipe,), targets=tuple(asked.target or TARGETS))
    jobs = [make() for make in jobs_of(request)]
    entering = [p for job in jobs for p in participants(asked, job)]
    drawn = random.Random(0)
    tokens = [drawn.randrange(256) for _ in range(asked.prompt + asked.decode)]
    prompt, forced = tuple(tokens[: asked.prompt]), tuple(tokens[asked.prompt :])
    plan = Plan(prompt, forced, (), asked.rounds, 0, Limits(memory_bytes=1 << 40))
    found, noisy = compare(entering, plan, say)
    last = jobs[-1].target.name
    return {
        "machine": host.machine().describe(),
        "model": jobs[0].recipe.name,
        "driver": asked.driver,
        "prompt": asked.prompt,
        "decode": asked.decode,
        "rounds": asked.rounds,
        "against": last,
        "noise": noisy,
        "rows": [_row(entrant, found, last) for entrant in found],
    }


def _row(entrant: Entrant, everyone: list[Entrant], last: str) -> dict[str, Any]:
    who = entrant.participant
    measure = next(e for e in everyone if (e.participant.runtime, e.participant.format) == (last, who.format))
    taken = {name: list(entrant.samples.get(name, {}).values()) for name in SECONDS if name in METRICS}
    read = {name: ratio(entrant, measure, name) for name in METRICS}
    parameters = entrant.participant.opening.get("parameters")
    return {
        "target": who.runtime,
        "format": who.format,
        "kernels": who.choices,
        "variant": who.variant,
        "parameters": Path(parameters).name if parameters else None,
        "reason": entrant.reason,
        **{name: statistics.median_of(values).median if values else None for name, values in taken.items()},
        "ratios": {name: [r.median, r.low, r.high] for name, r in read.items() if r is not None},
    }


def text(document: dict[str, Any]) -> str:
    """Return the table for people."""
    header = ["target", "weights", "kernels", "decode/token", f"over {document['against']}", "prefill"]
    header += [f"over {document['against']}", "parameters"]
    lines = [
        [
            row["target"],
            row["format"],
            row["kernels"],
            quantity(row["decode_s"], "s"),
            _ratio(row, "decode_s", document["against"]),
            quantity(row["prefill_s"], "s"),
            _ratio(row, "prefill_s", document["against"]),
            (row["parameters"] or "-")[:12],
        ]
        for row in sorted(document["rows"], key=lambda row: row["format"])
    ]
    told = [f"{row['target']} {row['format']}: {row['reason']}" for row in document["rows"] if row["reason"]]
    told += [f"noise: {document['noise']}"] if document["noise"] else []
    what = f"{document['model']}, {document['driver']}, {document['prompt']} tokens, then {document['decode']}"
    first = f"{document['machine']}; {what}; {document['rounds']} interleaved rounds"
    return "\n".join([first, table(header, lines, left=(0, 1, 2)), *told])


def _ratio(row: dict[str, Any], metric: str, against: str) -> str:
    found = row["ratios"].get(metric)
    if found is None or row["target"] == against:
        return ""
    return f"{found[0]:.2f} [{found[1]:.2f}, {found[2]:.2f}]"


def main() -> None:
    """Run and print."""
    asked = options()
    document = report(asked)
    print(json.dumps(document) if asked.json else text(document))


if __name__ == "__main__":
    end(main)
