"""Builds in milliseconds: the real build path, catalog and search over stages that make small files and say one number.

What a stage makes and reads is a function of its inputs alone, as the real ones' is.
"""

from __future__ import annotations

import atexit
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from llmbuild import digest
from llmbuild.build.build import Build
from llmbuild.build.compiling import once
from llmbuild.build.freshness import Outcome
from llmbuild.build.imports import Imports
from llmbuild.build.job import Job
from llmbuild.build.steps import Steps
from llmbuild.catalog.writer import Catalog
from llmbuild.frontend.source import FoundModel
from llmbuild.process.child import Limits
from llmbuild.profiler.protocol import Quality, Subject
from llmbuild.profiler.readings import measurement_key
from llmbuild.runtime import host
from llmbuild.runtime.chat import ChatTemplate
from llmbuild.spec.machine import Machine
from llmbuild.spec.measurement import Measurement, Reading
from llmbuild.spec.program import Program, abi_from
from llmbuild.spec.recipe import Budget, ModelSource, Recipe
from llmbuild.spec.recipe import Quality as QualityAsked
from llmbuild.spec.slo import Bound
from llmbuild.spec.space import Knob, Point, Space
from llmbuild.spec.target import Target
from llmbuild.spec.variant import Artifact, Failure, Toolchain
from llmbuild.spec.workload import Workload

ABI: dict[str, Any] = {"vocabulary": 320, "context": 32, "kv": [], "eos_tokens": [], "parameters": 10}
TARGET = Target("host", "llvm-cpu", host.architecture(), "generic", (), ())
MACHINE = Machine("a chip", host.architecture(), 2, 8, "Linux", "", host.runtime_version(), ())
ALL = Budget(trials=50, seconds=1e6)
FORMATS, LEVELS = ("f32", "f16", "int8"), ("O2", "O3")


@dataclass(frozen=True)
class Asked:
    """The inputs of a build that a person may change."""

    name: str = "m"
    weights: str = "one"
    tokenizer: str = "words"
    chat: str = ""
    text: str = "held out"
    workloads: tuple[str, ...] = ("short",)
    objectives: tuple[str, ...] = ("tpot_s", "parameter_bytes")
    formats: tuple[str, ...] = FORMATS
    bound: float = 1.0
    compiler: str = "3.13.0"


def knob(name: str, level: Any, domain: tuple[Any, ...]) -> Knob:
    """Return a knob whose default is the first of its values."""
    return Knob(name, level, domain, domain[0], name)


def space_of(asked: Asked) -> Space:
    """Return the space of what was asked; the defaults do not depend on it."""
    formats = replace(knob("weight_format", "model", FORMATS), domain=asked.formats)
    more = [knob("driver", "runtime", ("local-sync",)), knob("workers", "runtime", (1,))]
    return Space((formats, knob("opt_level", "codegen", LEVELS), *more))


def job_of(asked: Asked, folder: Path) -> Job:
    """Return the job of what was asked; the model's tokenizer and the held-out text are files in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {kind: folder / f"{kind}-{digest.of(text)[:8]}" for kind, text in vars(asked).items() if kind in _FILES}
    for kind, path in files.items():
        if not path.is_file():
            path.write_text(str(getattr(asked, kind)))
    space = space_of(asked)
    recipe = Recipe(
        name=asked.name,
        model=ModelSource("huggingface", str(folder)),
        workloads=tuple(Workload(name, 8, 8, 32) for name in asked.workloads),
        objectives=asked.objectives,
        constraints=(Bound("tpot_s", "<=", asked.bound),),
        quality=QualityAsked(files=(str(files["text"]),)),
        budget=ALL,
    )
    chat = ChatTemplate(asked.chat).blob() if asked.chat else None
    model = FoundModel(folder, digest.of(asked.weights), files["tokenizer"], chat=chat)
    tools = Toolchain("0.1.0", "importer", asked.compiler, host.runtime_version())
    return QuickJob(recipe, TARGET, space, model, MACHINE, tools, Limits(), declared=space)


_FILES = ("tokenizer", "text")


class QuickJob(Job):
    """A job whose held-out text counts, though its model has no config.json and its tokenizer reads nothing."""

    def scored(self) -> str:
        """Return no reason against scoring."""
        return ""


class Compiler:
    """Makes an artifact of the digest of what goes into it."""

    def __init__(self, steps: QuickSteps) -> None:
        self.steps, self.made = steps, 0

    def compile(self, module: str, settings: Any) -> Artifact:
        """Return the artifact of a module, known or made."""
        catalog, compiler = self.steps.catalog, self.steps.job.toolchain.compiler
        inputs = {"module": module, "settings": dict(settings), "compiler": compiler}

        def make() -> Artifact:
            self.made += 1
            data = digest.canonical(inputs).encode()
            artifact = Artifact(catalog.blobs.put_bytes(data), len(data), host.runtime_version())
            catalog.record_compile(digest.of(inputs), inputs, artifact, 0.1)
            return artifact

        made = once(catalog, lambda _: False, "compile", digest.of(inputs), catalog.find_compile, make)
        assert isinstance(made, Artifact)
        return made


class QuickBench:
    """Reads a number from the name of what it measures."""

    has_baseline = True

    def __init__(self, job: Job) -> None:
        self.job, self.measured = job, 0

    def measure(
        self, subject: Subject, baseline: bool = False, dominated: Any = None, decided: Any = None
    ) -> tuple[Measurement, ...]:
        """Return readings that are a function of the variant, the workload and the held-out text."""
        self.measured += not baseline
        return tuple(self._read(subject, w) for w in self.job.recipe.workloads)

    def race(self, subjects: Sequence[Subject], contenders: Any = None) -> list[tuple[Measurement, ...]]:
        """Return the same readings again."""
        return [tuple(self._read(s, w) for w in self.job.recipe.workloads) for s in subjects]

    def _read(self, subject: Subject, workload: Workload) -> Measurement:
        def still(*of: Any, least: float) -> Reading:
            value = least * (1 + int(digest.of([subject.variant, workload.name, *of])[:6], 16) / (1 << 24))
            return Reading(value, value, value, (value,) * 4)

        text = digest.of([digest.of_file(Path(file)) for file in self.job.recipe.quality.files])
        readings = {name: still(name, least=0.01) for name in ("tpot_s", "ttft_s", "e2e_s", "load_s")}
        readings |= {"quality_kl": still("kl", text, least=0.001), "peak_memory_bytes": still("memory", least=1e6)}
        machine = digest.of(self.job.machine)
        ratios = {name: readings[name] for name in ("tpot_s", "ttft_s")}
        key = measurement_key(subject, workload, machine)
        return Measurement(key, subject.variant, subject.artifact, workload, machine, readings, ratios, {})

    def close(self) -> None:
        """Nothing is open."""


class QuickImports(Imports):
    """Makes small files of what goes into an import."""

    made = 0

    def expect(self, point: Point) -> None:
        """Nothing is started."""

    def _import(self, key: str, inputs: dict[str, Any]) -> Program | Failure:
        self.made += 1
        put, weights = self.catalog.blobs.put_bytes, inputs["choices"]["weight_format"]
        data = [f"{kind} of {inputs['model']} {weights}".encode() for kind in ("module", "checks")]
        parameters = f"weights {inputs['model']} {weights}".encode() * (FORMATS[::-1].index(weights) + 1)
        program = Program(put(data[0]), put(parameters), put(data[1]), abi_from(ABI))
        self.catalog.record_import(key, inputs, program, 0.1)
        return program

    def reference(self) -> Quality | Failure:
        """Return no reference: readings need none."""
        return Quality(None, "")


class QuickSteps(Steps):
    """The stages of one job, without a child process."""

    def __init__(self, job: Job, catalog: Catalog) -> None:
        super().__init__(job, catalog)
        self.imports = QuickImports(job, catalog, self._forced)
        self.compiling = Compiler(self)  # type: ignore[assignment]
        self._bench = QuickBench(job)  # type: ignore[assignment]

    @property
    def imported(self) -> int:
        """How many programs were made."""
        return self.imports.made  # type: ignore[attr-defined]

    @property
    def measured(self) -> int:
        """How many variants were measured, not counting baselines."""
        return self._bench.measured  # type: ignore[union-attr]

    def subject(self, point: Point, program: Program, artifact: Artifact) -> Subject:
        """Return what is measured of a variant."""
        blobs = self.catalog.blobs
        paths = [blobs.path(name) for name in (artifact.digest, program.parameters, program.check)]
        return Subject(self.job.variant(program, point).digest, artifact.digest, *paths, ABI, "local-sync", 1, 1.0)


class QuickBuild(Build):
    """A build that tries every point of its space in their order, without a study."""

    def _search(self) -> str:
        space, known = self.job.space, {t.point for t in self.results.known}
        for point in dict.fromkeys((space.default(), *space.points())):
            if point not in known:
                self.evaluator.evaluate([point])
        return "every point of the space is known"


@dataclass(frozen=True)
class Done:
    """What a quick build came to, and what was made and measured for it."""

    outcome: Outcome
    imported: int
    compiled: int
    measured: int


@cache
def _empty() -> Path:
    """Return a catalog with nothing in it, to be copied: to bring one to the newest schema takes long."""
    folder = Path(mkdtemp(prefix="llmbuild-empty-"))
    Catalog(folder).close()
    atexit.register(shutil.rmtree, folder, True)
    return folder


def build(asked: Asked, catalog: Path, folder: Path, tell: Any = lambda event: None) -> Done:
    """Build what is asked into a catalog, the whole of its space."""
    if not catalog.exists():
        shutil.copytree(_empty(), catalog)
    opened = Catalog(catalog)
    try:
        steps = QuickSteps(job_of(asked, folder), opened)
        outcome = QuickBuild(steps, ALL, 0, 1, tell).run()
        return Done(outcome, steps.imported, steps.compiling.made, steps.measured)  # type: ignore[attr-defined]
    finally:
        opened.close()
