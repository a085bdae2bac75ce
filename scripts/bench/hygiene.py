"""Time the commands that must stay fast on large catalogs: a build with nothing to do, a dry run, pick and query.

python scripts/bench/hygiene.py [--json] [--rounds N] [--variants 1000] [--rows 10000] [--front 0.1] [--keep FOLDER]

The catalogs are synthetic: the rows are those that a build writes, but nothing was compiled or run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sqlite3
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from synthetic import ABI, Made, fill, measurement, multiply

from llmbuild import digest
from llmbuild.build.freshness import build_key
from llmbuild.build.job import Job
from llmbuild.build.jobs import jobs_of
from llmbuild.build.request import BuildRequest
from llmbuild.build.steps import Steps
from llmbuild.build.trials import owner, stand, trial_of
from llmbuild.catalog.names import Ranking
from llmbuild.catalog.place import FILE
from llmbuild.catalog.writer import Catalog
from llmbuild.cli import reading
from llmbuild.cli.requests import QueryRequest, Selection
from llmbuild.report.rows import table
from llmbuild.runtime import host
from llmbuild.runtime.model import pick
from llmbuild.spec.program import Program, abi_from
from llmbuild.spec.space import Point
from llmbuild.spec.variant import Artifact

RECIPE = """\
name: shape
model: {huggingface: ./model, random_init: true}
workloads:
  - {name: short, prompt: 8, output: 8, context: 32}
objectives: [tpot_s, ttft_s, parameter_bytes]
budget: {trials: %d, time: 5m}
"""
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


def project(folder: Path, variants: int) -> Path:
    """Write the recipe of a shape, and a catalog in which `variants` of it are known."""
    (folder / "model").mkdir(parents=True, exist_ok=True)
    (folder / "model" / "config.json").write_text(json.dumps(CONFIG))
    recipe = folder / "shape.yaml"
    recipe.write_text(RECIPE % variants)
    (job,) = (one() for one in jobs_of(BuildRequest(recipes=(recipe,))))
    _record(job, folder / "catalog", variants)
    return recipe


def _record(job: Job, folder: Path, variants: int) -> None:
    catalog = Catalog(folder)
    steps, draw = Steps(job, catalog), random.Random(0)
    catalog.register(steps.registered)
    put = catalog.blobs.put_bytes
    program = Program(put(b"module"), put(b"weights"), put(b"checks"), abi_from(ABI))
    known: list[Any] = []
    for point in _points(job, variants, draw):
        inputs = steps.import_inputs(point)
        catalog.record_import(digest.of(inputs), inputs, program, 0.1)
        data = json.dumps(point.as_dict()).encode()
        artifact = Artifact(put(data), len(data), job.toolchain.compiler)
        inputs = steps.compile_inputs(program, point)
        catalog.record_compile(digest.of(inputs), inputs, artifact, 0.1)
        made = Made("", tpot_s=draw.uniform(0.001, 0.1), ttft_s=draw.uniform(0.01, 1.0))
        variant = job.variant(program, point).digest
        readings = measurement(made, variant, artifact.digest, steps.registered.machine_digest)
        trial = trial_of(steps, point, program, artifact, (readings,), None, len(known), 0.1)
        catalog.record_trial(trial, owner(steps))
        known.append(trial)
    names = steps.registered
    by = Ranking(job.ranking, job.source, owner(steps).tokenizer, chat=owner(steps).chat)
    catalog.record_standings(job.recipe.name, names.target_digest, names.machine_digest, stand(job, known), by)
    state = {"seconds": 1.0, "raced": True, "ended": f"{variants} trials done"}
    catalog.record_build(build_key(job, 0), job.recipe.name, job.scope, job.scope_inputs, **state)
    catalog.close()


def _points(job: Job, count: int, draw: random.Random) -> list[Point]:
    found = {job.space.default(): None}
    while len(found) < count:
        found[job.space.complete({k.name: draw.choice(k.domain) for k in job.space.knobs})] = None
    return list(found)


def seconds(act: Callable[[], Any], rounds: int, before: Callable[[], Any] = lambda: None) -> list[float]:
    """Return the wall seconds of each call, each after an uncounted `before`; the first call fills caches."""
    taken = []
    for _ in range(rounds + 1):
        before()
        begin = perf_counter()
        act()
        taken.append(perf_counter() - begin)
    return taken[1:]


def commit(folder: Path) -> Callable[[], Any]:
    """Return what commits a change of one row to a catalog, from a connection of its own."""

    def change() -> None:
        connection = sqlite3.connect(folder / FILE)
        connection.execute("UPDATE measurement SET tpot_s = tpot_s * 1.0001 WHERE rowid = 1")
        connection.commit()
        connection.close()

    return change


def command(*arguments: str | Path) -> Callable[[], Any]:
    """Return a call of the command line, which must succeed."""
    line = [sys.executable, "-m", "llmbuild", *map(str, arguments)]
    return lambda: subprocess.run(line, check=True, capture_output=True, env=os.environ)


def rows(folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Time everything."""
    recipe = project(folder, arguments.variants)
    fill(folder / "many", [Made("default", "dominated", 0.2, 2.0, default=True)])
    multiply(folder / "many", arguments.rows, arguments.front)
    fill(folder / "front", [Made("default", "dominated", 0.2, 2.0, default=True)])
    multiply(folder / "front", arguments.rows, 1.0)
    many, slo = folder / "many", ["ttft_s<=0.5"]
    asked = QueryRequest(many, "m", Selection(tuple(slo), "tpot_s"))
    known, shown, front = f"{arguments.variants} variants", f"{arguments.rows} rows", folder / "front"
    timed: list[tuple[Any, ...]] = [
        ("null build", known, 1.0, command("build", recipe, "-C", folder / "catalog")),
        ("dry run", known, 2.0, command("build", "-n", recipe, "-C", folder / "catalog")),
        ("pick, in process", shown, 0.005, lambda: pick(many, "m", slo, "tpot_s")),
        ("pick, in process, all on the front", shown, 0.005, lambda: pick(front, "m", slo, "tpot_s")),
        ("pick after a commit", shown, 0.0, lambda: pick(many, "m", slo, "tpot_s"), commit(many)),
        ("pick after a commit, all on the front", shown, 0.0, lambda: pick(front, "m", slo, "tpot_s"), commit(front)),
        ("pick, command", shown, 0.3, command("pick", "--slo", slo[0], "-C", many)),
        ("query --slo, in process", shown, 0.05, lambda: reading.query(asked)),
        ("pick with every verdict, in process", shown, 0.0, lambda: pick(many, "m", slo, "tpot_s").explain()),
    ]
    return [_row(what, size, bound, seconds(act, arguments.rounds, *more)) for what, size, bound, act, *more in timed]


def _row(what: str, size: str, bound: float, taken: list[float]) -> dict[str, Any]:
    middle = statistics.median(taken)
    within = "" if not bound else ("yes" if middle < bound else "no")
    return {
        "what": what,
        "of": size,
        "median_s": round(middle, 4),
        "min_s": round(min(taken), 4),
        "max_s": round(max(taken), 4),
        "bound_s": bound or "",
        "within": within,
    }


def main() -> None:
    """Print one row for each thing that is timed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--variants", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=10000)
    parser.add_argument("--front", type=float, default=0.1, help="share of the rows that is on the front")
    parser.add_argument("--keep", type=Path, help="write the catalogs here and leave them")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with TemporaryDirectory() as name:
        found = rows(arguments.keep or Path(name), arguments)
    if arguments.json:
        print(json.dumps({"machine": host.machine().describe(), "rounds": arguments.rounds, "rows": found}))
        return
    print(f"{host.machine().describe()}, {arguments.rounds} rounds")
    print(table(list(found[0]), [[str(v) for v in row.values()] for row in found], left=(0, 1)))


if __name__ == "__main__":
    main()
