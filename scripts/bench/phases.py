"""What a compile in phases saves over whole compiles, on many settings of code generation for one program.

    python scripts/bench/phases.py [RECIPE] [--set KNOB=VALUE]... [--points N] [--seed N] [--json]

N points are drawn that differ in the knobs read after the front half. Each is compiled whole, as one call of
iree-compile, and in phases: the front half once, the configuration of dispatches for each, and code generation only
where the configured dispatches are new. Both artifacts must be equal byte for byte. Seconds are wall time on this
machine, one compile at a time.
"""

from __future__ import annotations

import argparse
import json
import random
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

from comparison.script import end

from llmbuild import toolchain
from llmbuild.catalog.writer import Catalog
from llmbuild.commands import find_target
from llmbuild.compiler import iree
from llmbuild.compiler.flags import FLAGS
from llmbuild.digest import of_file
from llmbuild.report.rows import table
from llmbuild.runtime import host
from llmbuild.search.knobs import KNOBS
from llmbuild.spec.reader import read_recipe
from llmbuild.spec.space import Value
from llmbuild.spec.target import HOST
from llmbuild.spec.variant import Failure
from llmbuild.steps import Steps, make_job

ROOT = Path(__file__).parent.parent.parent
LEFT_OUT = ("stack_limit", "scalable", "default_specs")
"""Late knobs that decide whether code compiles, not which."""


def draws(count: int, seed: int) -> list[dict[str, Value]]:
    """Return settings of the late knobs: each keeps its default or takes another value, as likely."""
    late = {f.knob for f in FLAGS if f.phase != "front"} - set(LEFT_OUT)
    knobs, source = [k for k in KNOBS if k.name in late], random.Random(seed)
    found: dict[str, dict[str, Value]] = {"": {}}
    while len(found) < count:
        changed = source.sample(knobs, source.choice((1, 1, 2, 3)))
        values = {k.name: source.choice([v for v in k.domain if v != k.default]) for k in changed}
        found.setdefault(json.dumps(values, sort_keys=True), values)
    return list(found.values())


def measured(recipe: Path, pins: dict[str, str], count: int, seed: int) -> dict[str, Any]:
    """Return seconds of both ways, point by point."""
    job = make_job(read_recipe(recipe), find_target(HOST), pins, host.machine(), toolchain.current(), force=False)
    values = {k.name: k.default if k.default in k.domain else k.domain[0] for k in job.space.knobs}
    point = job.space.complete({**values, **{k.name: k.domain[0] for k in job.space.knobs if k.name in pins}})
    with TemporaryDirectory() as name:
        catalog = Catalog(Path(name))
        steps = Steps(job, catalog)
        program = steps.import_(point)
        if isinstance(program, Failure):
            raise SystemExit(f"import: {program.reason}")
        rows = [
            _row(steps, program.module, {**job.space.level(point, "codegen"), **late}, late, Path(name))
            for late in draws(count, seed)
        ]
        catalog.close()
    done = [row for row in rows if row["failure"] is None]
    whole, phased = (sum(row[k] for row in done) for k in ("whole_s", "phased_s"))
    return {
        "recipe": recipe.stem,
        "machine": job.machine.describe(),
        "pins": pins,
        "points": len(done),
        "failed": len(rows) - len(done),
        "equal": sum(row["equal"] for row in done),
        "generated": sum(row["finish_s"] > 0 for row in done),
        "whole_s": whole,
        "phased_s": phased,
        "saved": 1 - phased / whole,
        "profile": {k: sum(row[k] for row in done) for k in ("front_s", "configure_s", "finish_s")},
        "rows": rows,
    }


def _row(steps: Steps, module: str, settings: dict[str, Value], late: dict[str, Value], folder: Path) -> dict[str, Any]:
    output, compiling = folder / "whole.vmfb", steps.compiling
    begin = monotonic()
    path = steps.catalog.blobs.path(module)
    failure = iree.compile_module(path, output, steps.job.target, settings, steps.job.limits)
    whole = monotonic() - begin
    row: dict[str, Any] = {"late": late, "whole_s": whole, "failure": failure.reason if failure else None}
    if failure:
        return row
    times = [monotonic()]
    front = compiling.front(module, settings)
    times.append(monotonic())
    with TemporaryDirectory() as name:
        configured = front if isinstance(front, Failure) else compiling.configure(front, settings, Path(name))
        times.append(monotonic())
        made = configured if isinstance(configured, Failure) else compiling.finish(configured, settings, Path(name))
        times.append(monotonic())
    if isinstance(made, Failure):
        return {**row, "failure": made.reason}
    front_s, configure_s, finish_s = (b - a for a, b in pairwise(times))
    known = finish_s < 0.1  # an equal configuration was answered from the catalog
    return {
        **row,
        "front_s": front_s,
        "configure_s": configure_s + (finish_s if known else 0.0),
        "finish_s": 0.0 if known else finish_s,
        "phased_s": times[-1] - times[0],
        "equal": made.digest == of_file(output),
    }


def text(found: dict[str, Any]) -> str:
    """Return the table for people."""
    pins = " ".join(f"{k}={v}" for k, v in found["pins"].items()) or "the compiler's defaults"
    head = (
        f"{found['recipe']}, {pins}: {found['points']} points ({found['failed']} do not compile either way), "
        f"{found['equal']} equal byte for byte; {found['machine']}"
    )
    profile = found["profile"]
    rows = [
        ["whole compiles", f"{found['whole_s']:.1f}", ""],
        ["in phases", f"{found['phased_s']:.1f}", f"{found['phased_s'] / found['whole_s']:.0%}"],
        ["  front half, once", f"{profile['front_s']:.1f}", f"{profile['front_s'] / found['whole_s']:.0%}"],
        [
            "  configuration of dispatches",
            f"{profile['configure_s']:.1f}",
            f"{profile['configure_s'] / found['whole_s']:.0%}",
        ],
        [
            f"  code generation, {found['generated']} times",
            f"{profile['finish_s']:.1f}",
            f"{profile['finish_s'] / found['whole_s']:.0%}",
        ],
        ["saved", f"{found['whole_s'] - found['phased_s']:.1f}", f"{found['saved']:.0%}"],
    ]
    return head + "\n" + table(["what", "seconds", "of whole"], rows)


def main() -> None:
    """Print what was saved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, nargs="?", default=ROOT / "recipes" / "pystdlib.yaml")
    parser.add_argument("--set", dest="pins", action="append", default=[], metavar="KNOB=VALUE")
    parser.add_argument("--points", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    pins = dict(pin.split("=", 1) for pin in asked.pins)
    found = measured(asked.recipe, pins, asked.points, asked.seed)
    print(json.dumps(found) if asked.json else text(found))


if __name__ == "__main__":
    end(main)
