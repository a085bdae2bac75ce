"""Record an exhaustive study: every point of a recipe's grid compiled, screened and kept with its raw samples.

    python scripts/bench/record.py compile scripts/bench/studies/NAME.yaml -C CATALOG [-j N] [--seconds S]
    python scripts/bench/record.py measure scripts/bench/studies/NAME.yaml -C CATALOG [--seconds S] [--passes N]
    python scripts/bench/record.py pack    scripts/bench/studies/NAME.yaml -C CATALOG
    python scripts/bench/record.py teach   scripts/bench/studies/*.jsonl.gz

`compile` makes the artifacts, checks their numerics and scores their quality; it may share the machine. `measure` must
have the machine to itself: it screens the points in random order, point 0 first and last in each run, and points with
equal executables and settings as one, `--passes` times each, a whole pass between two screens of a point. Both go on
where they stopped, and stop after `--seconds`. `pack` writes `NAME.jsonl.gz` beside the recipe, which
`llmbuild.search.replay` reads: a header, then one line for each point, with the samples of all its screens. `teach`
writes what the studies say to `llmbuild/search/warm_start.json.gz`, which every search starts from.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Any

from comparison.script import end

import llmbuild.search
from llmbuild import digest
from llmbuild.build import toolchain
from llmbuild.build.job import Job, make_job
from llmbuild.build.steps import Steps
from llmbuild.build.targets import find_target
from llmbuild.catalog.writer import Catalog
from llmbuild.digest import plain
from llmbuild.profiler.child import ChildFailed
from llmbuild.profiler.live import Live
from llmbuild.profiler.protocol import Quality, Subject
from llmbuild.runtime import host
from llmbuild.search import transfer
from llmbuild.search.replay import read
from llmbuild.spec.files.reader import read_recipe
from llmbuild.spec.program import Program
from llmbuild.spec.space import Point
from llmbuild.spec.target import HOST
from llmbuild.spec.variant import Artifact, Failure

WARM_S, SCREEN_S, LEAST, MOST = 0.1, 0.4, 5, 11
"""A screen: seconds of warm-up, seconds of rounds, and how many rounds at least and at most."""


class Recording:
    """One grid on one catalog; what is done is kept in a file of JSON lines in the catalog's folder."""

    def __init__(self, recipe: Path, catalog: Path) -> None:
        self.recipe = recipe
        self.job: Job = make_job(
            read_recipe(recipe), find_target(HOST), {}, host.machine(), toolchain.current(), force=False
        )
        self.catalog = Catalog(catalog)
        self.steps = Steps(self.job, self.catalog)
        name = self.job.recipe.name
        self.made, self.read = catalog / f"{name}.made.jsonl", catalog / f"{name}.read.jsonl"

    def points(self) -> list[Point]:
        """Return point 0 and every point of the grid, in one order."""
        default = self.job.space.default()
        return [default, *(p for p in self.job.space.points() if p != default)]

    def build_of(self, point: Point) -> str:
        """Return the name of what a point needs compiled: points that differ at run time alone share it."""
        return self._name(self.job.space.level(point, "model", "codegen"))

    def _name(self, values: dict[str, Any]) -> str:
        """Return a name that stays the same when knobs are added to the space: defaults are not in it."""
        default = self.job.space.default()
        return digest.of({k: v for k, v in values.items() if v != default[k]})

    # --- compile -------------------------------------------------------------------------------------------------

    def compile(self, seconds: float, jobs: int) -> None:
        """Make what is not made yet."""
        done = {row["build"] for row in lines(self.made)}
        todo: dict[str, Point] = {}
        for point in self.points():
            todo.setdefault(self.build_of(point), point)
        left = [(name, point) for name, point in todo.items() if name not in done]
        end, quality = monotonic() + seconds, self.steps.reference()
        if isinstance(quality, Failure):
            raise SystemExit(f"reference: {quality.reason}")

        def work(item: tuple[str, Point]) -> dict[str, Any] | None:
            return None if monotonic() > end else self._made(*item, quality)

        with ThreadPoolExecutor(jobs) as pool:
            for row in pool.map(work, left):
                if row is not None:
                    append(self.made, row)
        still = len(todo.keys() - {row["build"] for row in lines(self.made)})
        print(f"{len(todo)} compiles of {len(self.points())} points; {still} to go", file=sys.stderr)

    def _made(self, name: str, point: Point, quality: Quality) -> dict[str, Any]:
        begin = monotonic()
        program = self.steps.import_(point)
        imported = monotonic()
        row: dict[str, Any] = {"build": name, "import_s": imported - begin, "compile_s": 0.0, "failure": None}
        if isinstance(program, Failure):
            return {**row, "failure": {"stage": program.stage, "reason": program.reason}}
        artifact = self.steps.compile(program, point)
        row["compile_s"] = monotonic() - imported
        if isinstance(artifact, Failure):
            return {**row, "failure": {"stage": artifact.stage, "reason": artifact.reason}}
        front = self.steps.compiling.front(program.module, self.job.space.level(point, "codegen"))
        row["features"] = {} if isinstance(front, Failure) else front.features
        row |= {"program": digest.of(program), "artifact": artifact.digest, "artifact_bytes": artifact.size_bytes}
        row["parameter_bytes"] = self.catalog.blobs.path(program.parameters).stat().st_size
        try:
            return {**row, **self._checked(point, program, artifact, quality)}
        except ChildFailed as error:
            return {**row, "failure": {"stage": error.failure.stage, "reason": error.failure.reason}}

    def _checked(self, point: Point, program: Program, artifact: Artifact, quality: Quality) -> dict[str, Any]:
        """Return numerics and quality: they do not depend on the clock, so others may share the machine."""
        begin = monotonic()
        subject = self.steps.subject(point, program, artifact)
        child = opened(subject, self.job).child
        try:
            told = child.ask("check", "check", data=str(subject.check_path))
            scored = child.ask("quality", "quality", data=str(quality.data)) if quality.data else {}
        finally:
            child.close()
        return {"check": {k: told[k] for k in ("error", "noise", "finite")}, **scored, "check_s": monotonic() - begin}

    # --- measure -------------------------------------------------------------------------------------------------

    def measure(self, seconds: float, passes: int) -> None:
        """Screen what has fewer than `passes` readings, in random order, each pass after the one before."""
        end = monotonic() + seconds
        made = {row["build"]: row for row in lines(self.made)}
        ready = [p for p in self.points() if made.get(self.build_of(p), {}).get("failure", "unmade") is None]
        distinct = {self.run_of(p, made[self.build_of(p)]): p for p in reversed(ready)}
        done = Counter(row["run"] for row in lines(self.read) if not row["repeat"])
        left = [(turn, name) for name in distinct for turn in range(done[name], passes)]
        random.Random(done.total()).shuffle(left)
        left.sort(key=lambda item: item[0], reverse=True)
        zero = self.run_of(ready[0], made[self.build_of(ready[0])])
        self._screen(ready[0], zero, repeat=True)
        while left and monotonic() < end:
            _, name = left.pop()
            self._screen(distinct[name], name, repeat=False)
        self._screen(ready[0], zero, repeat=True)
        print(f"{len(ready)} points ready, {len(distinct)} distinct, {len(left)} to screen", file=sys.stderr)

    def run_of(self, point: Point, build: dict[str, Any]) -> str:
        """Return the name of what is measured: artifact, program and settings."""
        settings = self.job.space.level(point, "runtime")
        return digest.of({"artifact": build["artifact"], "program": build["program"], "settings": settings})

    def _screen(self, point: Point, name: str, repeat: bool) -> None:
        program = self.steps.import_(point)
        artifact = self.steps.compile(program, point) if isinstance(program, Program) else program
        if isinstance(program, Failure) or isinstance(artifact, Failure):
            raise SystemExit("an artifact went missing: run `compile` again")
        row: dict[str, Any] = {"run": name, "repeat": repeat, "failure": None, "samples": {}}
        begin = monotonic()
        try:
            row["samples"] = self._samples(self.steps.subject(point, program, artifact))
        except ChildFailed as error:
            row["failure"] = {"stage": error.failure.stage, "reason": error.failure.reason}
        append(self.read, {**row, "measure_s": monotonic() - begin})

    def _samples(self, subject: Subject) -> dict[str, list[float]]:
        workload = self.job.recipe.workloads[0]
        live = opened(subject, self.job)
        samples: dict[str, list[float]] = {"tpot_s": [], "ttft_s": []}
        try:
            live.warm(workload, WARM_S)
            end = monotonic() + SCREEN_S
            while len(samples["tpot_s"]) < LEAST or (len(samples["tpot_s"]) < MOST and monotonic() < end):
                answer = live.answers(workload, 0.0)[0]
                for name, into in samples.items():
                    into.append(getattr(answer, name))
        finally:
            live.child.close()
        return samples

    # --- pack ----------------------------------------------------------------------------------------------------

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the header and one row for each point that was tried whole."""
        varied = [k for k in self.job.space.knobs if len({p[k.name] for p in self.points()}) > 1]
        read = list(lines(self.read))
        screens: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for row in read:
            if not row["repeat"]:
                screens[row["run"]].append(row)
        made = {row["build"]: row for row in lines(self.made)}
        recipe = self.job.recipe
        yield {
            "study": recipe.name,
            "machine": self.job.machine.describe(),
            "target": self.job.target.cpu,
            "toolchain": plain(self.job.toolchain),
            "workload": plain(recipe.workloads[0]),
            "objectives": list(recipe.objectives),
            "bounds": [str(b) for b in (*recipe.constraints, *recipe.quality.bounds)],
            "knobs": [plain(k) for k in varied],
            "screen": {"warm_s": WARM_S, "seconds": SCREEN_S, "rounds": [LEAST, MOST]},
            "baseline_repeats": [row["samples"] for row in read if row["repeat"]],
        }
        for point in self.points():
            build = made.get(self.build_of(point))
            reading = pooled(screens[self.run_of(point, build)]) if build and build["failure"] is None else None
            if build is None or (build["failure"] is None and reading is None):
                continue
            yield self._row(point, [k.name for k in varied], build, reading)

    def _row(
        self, point: Point, varied: list[str], build: dict[str, Any], reading: dict[str, Any] | None
    ) -> dict[str, Any]:
        kept = ("failure", "artifact", "artifact_bytes", "parameter_bytes", "features", "import_s", "compile_s")
        quality = {k: v for k, v in build.items() if k.startswith("quality_")}
        row = {"point": {k: point[k] for k in varied}, **{k: build.get(k) for k in kept}, **quality}
        row |= {"import": digest.short(digest.of(self.steps.import_inputs(point))), "measure_s": 0.0, "samples": {}}
        if reading is not None:
            samples = {name: [float(f"{v:.4g}") for v in values] for name, values in reading["samples"].items()}
            row |= {"samples": samples, "measure_s": reading["measure_s"], "failure": reading["failure"]}
            row |= {name: median(values) for name, values in samples.items()}
        for name in ("import_s", "compile_s", "measure_s"):
            row[name] = round(row[name], 3)
        return row

    def pack(self) -> Path:
        """Write the study beside its recipe and return its path."""
        rows = list(self.rows())
        text = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
        path = self.recipe.with_suffix(".jsonl.gz")
        path.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
        print(f"{path}: {len(rows) - 1} points, {path.stat().st_size} bytes", file=sys.stderr)
        return path


def opened(subject: Subject, job: Job) -> Live:
    """Return a subject opened in a worker; whoever asked closes it.

    Raises:
        ChildFailed: it does not open.
    """
    live = Live(subject, job.limits)
    try:
        live.open(1)
    except ChildFailed:
        live.child.close()
        raise
    return live


def pooled(screens: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the samples of all screens of a point as one reading that takes as long as one of them."""
    good = [row for row in screens if row["failure"] is None]
    if not good:
        return screens[0] if screens else None
    samples = {name: [v for row in good for v in row["samples"][name]] for name in good[0]["samples"]}
    return {**good[0], "samples": samples, "measure_s": median(row["measure_s"] for row in good)}


def lines(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a file that may have been cut off in the middle of one."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def append(path: Path, row: dict[str, Any]) -> None:
    """Add one line."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def teach(studies: list[Path]) -> Path:
    """Write what studies say where searches look for it and return the path."""
    path = Path(llmbuild.search.__file__).with_name(transfer.SHIPPED)
    bodies = [transfer.packed(study.name, study.lesson) for study in map(read, studies)]
    path.write_bytes(gzip.compress(json.dumps(bodies, separators=(",", ":")).encode(), 9, mtime=0))
    print(f"{path}: {len(bodies)} studies, {path.stat().st_size} bytes", file=sys.stderr)
    return path


def main() -> None:
    """Do one step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("compile", "measure", "pack", "teach"))
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="a recipe; to teach, packed studies")
    parser.add_argument("-C", "--catalog", type=Path, help="where artifacts and readings are kept")
    parser.add_argument("-j", "--jobs", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--passes", type=int, default=3, help="screens of each point, far apart in time")
    asked = parser.parse_args()
    if asked.step == "teach":
        teach(asked.paths)
        return
    if asked.catalog is None or len(asked.paths) > 1:
        parser.error("name one recipe, and a catalog with -C")
    recording = Recording(asked.paths[0], asked.catalog)
    if asked.step == "compile":
        recording.compile(asked.seconds, asked.jobs)
    elif asked.step == "measure":
        recording.measure(asked.seconds, asked.passes)
    else:
        recording.pack()


if __name__ == "__main__":
    end(main)
