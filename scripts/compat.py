"""Every target × weight format for one shape: whether it runs, whether it compiles, or why it fails.

    python scripts/compat.py [RECIPE] [-C CATALOG] [-t TARGET]... [--formats NAME...] [--seconds N] [--again] [--json]

Each cell is one point: the compiler's defaults at O2 with that weight format. An artifact for this host is opened and
its logits are compared with PyTorch's, on every device of a GPU's driver; other artifacts are compiled only. Results
are kept in `compat.json` in the catalog: a stopped run, also by `--seconds`, resumes; `--again` repeats failures.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

from llmbuild import digest
from llmbuild.build import toolchain
from llmbuild.build.compiling import Compiling, written
from llmbuild.build.job import Job, make_job
from llmbuild.build.steps import Steps
from llmbuild.build.targets import find_target, target_names
from llmbuild.catalog.writer import Catalog
from llmbuild.compiler import iree
from llmbuild.compiler.resolved import Answers
from llmbuild.errors import InputError, LlmbuildError
from llmbuild.process.child import Limits
from llmbuild.profiler.child import Child, ChildFailed
from llmbuild.report.rows import table
from llmbuild.report.targets import YES, runs_here
from llmbuild.runtime import host
from llmbuild.runtime.memory import shares_memory
from llmbuild.spec.files.reader import read_recipe
from llmbuild.spec.formats import WEIGHT_FORMATS
from llmbuild.spec.program import Program
from llmbuild.spec.recipe import Recipe
from llmbuild.spec.space import Point
from llmbuild.spec.variant import Artifact, Failure

FORMATS = ("f16", "int8", "int4_g64", "f32", "bf16")
FILE = "compat.json"
CELL_S = 120.0
"""A compile that takes longer than this has failed: some never end."""


@dataclass(frozen=True)
class Cell:
    """What came of one target and format; `here` says why this host did not run what compiled."""

    target: str
    format: str
    state: str
    reason: str = ""
    here: str = ""
    stage: str = ""
    command: str = ""
    artifact_bytes: int | None = None
    seconds: float = 0.0


class Kept:
    """The cells that are known, in a file of the catalog."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog, self.path = catalog, catalog.folder / FILE
        self.cells = self._read()

    def _read(self) -> dict[str, Cell]:
        found = json.loads(self.path.read_text()) if self.path.is_file() else {}
        return {key: Cell(**body) for key, body in found.items()}

    def keep(self, key: str, cell: Cell) -> None:
        """Add a cell to those in the file, which another run may have added to meanwhile; it is replaced whole."""
        with self.catalog.making("compat"):
            self.cells = {**self._read(), key: cell}
            draft = self.path.with_suffix(".part")
            draft.write_text(json.dumps({k: asdict(c) for k, c in self.cells.items()}, indent=1) + "\n")
            draft.replace(self.path)


def cell(job: Job, steps: Steps, target: str, form: str, point: Point) -> Cell:
    """Make one cell; a failure is also kept as the catalog's."""
    begin = monotonic()
    program = steps.import_(point)
    made = program if isinstance(program, Failure) else compiled(job, steps, point, program)
    if isinstance(made, Failure) or isinstance(program, Failure):
        assert isinstance(made, Failure)
        return _failed(job, steps, target, form, made, begin)
    sign, _, why = runs_here(job.target).partition(": ")
    if sign != "no":
        failure = check(steps, point, program, made)
        if failure and (sign == YES or failure.stage == "check"):
            return _failed(job, steps, target, form, failure, begin)
        why = failure.reason if failure else ""  # a driver that was not known to take this chip's code does not
    state = "compiles" if why else "runs"
    return Cell(target, form, state, here=why, artifact_bytes=made.size_bytes, seconds=monotonic() - begin)


def compiled(job: Job, steps: Steps, point: Point, program: Program) -> Artifact | Failure:
    """Compile in one go, where that gives what a build does: nothing is compiled twice, so no half needs to be kept."""
    module, settings = steps.catalog.blobs.path(program.module), job.space.level(point, "codegen")
    if written(job.target, settings):
        limits = Limits(seconds=CELL_S)
        return Compiling(steps.catalog, job.target, job.toolchain.compiler, limits, lambda _: False).compile(
            program.module, settings
        )
    with TemporaryDirectory(prefix="llmbuild-") as folder:
        output = Path(folder) / "module.vmfb"
        failure = iree.compile_module(module, output, job.target, settings, Limits(seconds=CELL_S))
        if failure:
            return failure
        return Artifact(steps.catalog.blobs.put_file(output), output.stat().st_size, job.toolchain.compiler)


def _failed(job: Job, steps: Steps, target: str, form: str, failure: Failure, begin: float) -> Cell:
    steps.catalog.record_failure(job.recipe.name, None, failure)
    abort = re.search(r"LLVM ERROR: (.*)", failure.log)
    told = f"{failure.reason}: {abort[1]}" if abort else re.sub(r"^.*?error: ", "", failure.reason)
    told = re.sub(r"%\w+", "%", told)[:200]
    return Cell(target, form, "fails", told, "", failure.stage, failure.command, None, monotonic() - begin)


def check(steps: Steps, point: Point, program: Program, artifact: Artifact) -> Failure | None:
    """Open an artifact in a process of its own and hold its logits against PyTorch's."""
    s = steps.subject(point, program, artifact)
    limits = Limits(seconds=CELL_S)
    child = Child(limits if shares_memory(s.driver) else replace(limits, memory_bytes=0))
    opening: dict[str, Any] = {"artifact": str(s.artifact_path), "parameters": str(s.parameters_path), "abi": s.abi}
    try:
        child.ask("profile", "open", **opening, driver=s.driver, workers=s.workers, meters=s.meters, times=1)
        told = child.ask("check", "check", data=str(s.check_path))
    except ChildFailed as failed:
        return failed.failure
    finally:
        child.close()
    if told["finite"] and told["error"] <= max(s.tolerance, 10 * told["noise"]):
        return None
    return Failure("check", f"logits differ by {told['error']:.3g} of their size", "", "", lasting=True)


def shape(path: Path) -> Recipe:
    """Return the recipe of a shape, without its knobs: they narrow a search, and here is none."""
    return replace(read_recipe(path), knobs=())


def cells(asked: argparse.Namespace) -> Iterator[Cell]:
    """Yield a cell for each target and format, the formats in turn, so that an import serves all targets."""
    recipe, end = shape(asked.recipe), monotonic() + asked.seconds
    catalog = Catalog(asked.catalog)
    try:
        kept, answers = Kept(catalog), Answers(asked.catalog / "targets")
        for form in asked.formats:
            for name in asked.targets:
                yield known_or_made(asked, recipe, catalog, kept, answers, name, form, end)
    finally:
        catalog.close()


def known_or_made(
    asked: argparse.Namespace,
    recipe: Recipe,
    catalog: Catalog,
    kept: Kept,
    answers: Answers,
    name: str,
    form: str,
    end: float,
) -> Cell:
    """Return one cell, from the file or made now; `open` where no time is left."""
    try:
        job = make_job(recipe, find_target(name), {}, host.machine(), toolchain.current(), False, answers)
    except LlmbuildError as error:
        return Cell(name, form, "refused", str(error).splitlines()[0])
    point = job.space.complete({"weight_format": form, "opt_level": "O2"})
    here = {"machine": digest.of(job.machine), "runs": runs_here(job.target)}
    key = digest.of({"lineage": job.lineage, "point": point.as_dict(), **here})
    known = kept.cells.get(key)
    if known and not (asked.again and known.state == "fails"):
        return known
    if monotonic() > end:
        return Cell(name, form, "open", "not tried yet")
    done = cell(job, Steps(job, catalog), name, form, point)
    kept.keep(key, done)
    print(f"{name} {form}: {done.state} {done.reason} ({done.seconds:.0f} s)", file=sys.stderr, flush=True)
    return done


def text(found: list[Cell], formats: list[str], title: str) -> str:
    """Return the table, then a note for each thing that went wrong."""
    notes: dict[str, int] = {}
    rows: dict[str, dict[str, str]] = {}
    for c in found:
        row = rows.setdefault(c.target, {"target": c.target, **dict.fromkeys(formats, ""), "here": ""})
        row[c.format] = c.state
        if c.reason and c.state != "open":
            row[c.format] += f" [{notes.setdefault(f'{c.stage}: {c.reason}'.removeprefix(': '), len(notes) + 1)}]"
        row["here"] = row["here"] or c.here
    header = ["target", *formats, "not run here"]
    lines = [list(row.values()) for row in rows.values()]
    return "\n".join([title, table(header, lines, range(len(header))), *(f"[{n}] {told}" for told, n in notes.items())])


def arguments() -> argparse.Namespace:
    """Return the command line's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path(__file__).parent.parent
    parser.add_argument("recipe", nargs="?", type=Path, default=root / "recipes" / "smollm2-135m.yaml")
    parser.add_argument("-C", "--catalog", type=Path, default=Path("catalog"))
    parser.add_argument("-t", "--target", dest="targets", action="append", metavar="TARGET")
    parser.add_argument("--formats", nargs="+", choices=WEIGHT_FORMATS, default=list(FORMATS), metavar="NAME")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing new after so long")
    parser.add_argument("--again", action="store_true", help="try anew what failed")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    asked.targets = asked.targets or target_names()
    return asked


def main() -> int:
    """Print the table; 1 where a cell is still open."""
    asked = arguments()
    try:
        found = list(cells(asked))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    title = f"{host.machine().describe()}; {asked.recipe.stem}; IREE {toolchain.current().compiler}"
    if asked.json:
        command = shlex.join(sys.argv)
        print(json.dumps({"title": title, "command": command, "cells": [asdict(c) for c in found]}, indent=1))
    else:
        print(text(found, asked.formats, title))
    return 1 if any(c.state == "open" for c in found) else 0


if __name__ == "__main__":
    sys.exit(main())
