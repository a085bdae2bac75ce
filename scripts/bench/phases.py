"""The time that a compile in phases saves over whole compiles, on many code generation settings of one program.

    python scripts/bench/phases.py [RECIPE] [--set KNOB=VALUE]... [--points N] [--seed N] [--json]

N points are drawn that differ in the knobs read after the front half. Each is compiled whole, as one call of
iree-compile, and in phases: the front half once, and later phases only where the previous phase's result is new. Both
artifacts must be equal byte for byte. Seconds are wall time on this machine, one compile at a time.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

from comparison.script import end

from llmbuild.build import toolchain
from llmbuild.build.job import make_job
from llmbuild.build.steps import Steps
from llmbuild.build.targets import find_target
from llmbuild.catalog.writer import Catalog
from llmbuild.compiler import iree, phases
from llmbuild.compiler.flags import FLAGS
from llmbuild.digest import of_file
from llmbuild.report.rows import table
from llmbuild.runtime import host
from llmbuild.search.knobs.space import KNOBS
from llmbuild.spec.files.reader import read_recipe
from llmbuild.spec.space import Value
from llmbuild.spec.target import HOST
from llmbuild.spec.variant import Failure

ROOT = Path(__file__).parent.parent.parent
PHASES = {
    "front": "front half",
    "configure": "configuration of dispatches",
    "translate": "translation of dispatches",
    "emit": "machine code",
}
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
        "calls": {name: sum(name in row["phases"] for row in done) for name in PHASES},
        "whole_s": whole,
        "phased_s": phased,
        "saved": 1 - phased / whole,
        "profile": {name: sum(row["phases"].get(name, 0.0) for row in done) for name in PHASES},
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
    begin = monotonic()
    with clocked() as spans:
        made = compiling.compile(module, settings)
    if isinstance(made, Failure):
        return {**row, "failure": made.reason}
    return {**row, "phases": spans, "phased_s": monotonic() - begin, "equal": made.digest == of_file(output)}


@contextmanager
def clocked() -> Iterator[dict[str, float]]:
    """Yield the seconds that each phase's calls of the compiler take, by phase, while the context lasts."""
    spans: dict[str, float] = {}

    def wrapped(name: str, real: Callable[..., Failure | None]) -> Callable[..., Failure | None]:
        def call(*arguments: Any) -> Failure | None:
            begin = monotonic()
            failure = real(*arguments)
            spans[name] = spans.get(name, 0.0) + monotonic() - begin
            return failure

        return call

    kept = {name: getattr(phases, name) for name in PHASES}
    for name, real in kept.items():
        setattr(phases, name, wrapped(name, real))
    try:
        yield spans
    finally:
        for name, real in kept.items():
            setattr(phases, name, real)


def text(found: dict[str, Any]) -> str:
    """Return the table for people."""
    pins = " ".join(f"{k}={v}" for k, v in found["pins"].items()) or "the compiler's defaults"
    head = (
        f"{found['recipe']}, {pins}: {found['points']} points ({found['failed']} do not compile either way), "
        f"{found['equal']} equal byte for byte; {found['machine']}"
    )
    whole, phased = found["whole_s"], found["phased_s"]
    steps = [
        [f"  {PHASES[name]}, {found['calls'][name]} times", f"{seconds:.1f}", f"{seconds / whole:.0%}"]
        for name, seconds in found["profile"].items()
    ]
    rows = [
        ["whole compiles", f"{whole:.1f}", ""],
        ["in phases", f"{phased:.1f}", f"{phased / whole:.0%}"],
        *steps,
        ["saved", f"{whole - phased:.1f}", f"{found['saved']:.0%}"],
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
