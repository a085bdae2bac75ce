"""The stages with a catalog: each step looks up its result, makes it if missing, and records it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from llmbuild.build.compiling import Compiling
from llmbuild.build.imports import Imports
from llmbuild.build.job import Job
from llmbuild.compiler import iree
from llmbuild.digest import plain
from llmbuild.profiler.protocol import Quality, Subject
from llmbuild.spec.formats import INTEGERS, SAME, SHARED
from llmbuild.spec.measurement import Measurement
from llmbuild.spec.program import Program
from llmbuild.spec.space import Point
from llmbuild.spec.trial import Trial
from llmbuild.spec.variant import Artifact, Failure

if TYPE_CHECKING:
    from llmbuild.catalog.writer import Catalog
    from llmbuild.profiler.bench import Bench
    from llmbuild.profiler.remote import RemoteBench
    from llmbuild.profiler.roofline import Roofline

T = TypeVar("T")

ROOFLINE_S = 1.5
"""Seconds of the one measurement of a machine's limits; its five rounds may take longer."""

TOLERANCE = {"f32": 1e-3, "f16": 3e-2, "bf16": 5e-2, SHARED: 5e-2, **dict.fromkeys((*INTEGERS, "k8v4", "int4"), 3e-2)}
"""Allowed RMS error of logits against PyTorch on the same weights, relative to the logits' RMS."""


class Steps:
    """The steps of one job on one catalog."""

    def __init__(self, job: Job, catalog: Catalog) -> None:
        self.job, self.catalog = job, catalog
        self.registered = job.registered
        self._fresh: set[str] = set()
        self._bench: Bench | RemoteBench | None = None
        self._reference: Quality | None = None
        self.imports = Imports(job, catalog, self._forced)
        self.compiling = Compiling(catalog, job.target, job.toolchain.compiler, job.limits, self._forced, job.run)

    # --- import --------------------------------------------------------------------------------------------------

    def import_inputs(self, point: Point) -> dict[str, object]:
        """Return all inputs of a point's import, by name."""
        return self.job.import_inputs(point)

    def import_(self, point: Point) -> Program | Failure:
        """Return the program of a point, from the catalog or a child process.

        A model that this point alone cannot import is a failure.

        Raises:
            InputError: the model itself is not supported.
        """
        return self.imports.program(point)

    def reference(self) -> Quality | Failure:
        """Return the f32 model's logits on the held-out text, from the catalog or a child process; looked up once."""
        if self._reference is None:
            found = self.imports.reference()
            if isinstance(found, Failure):
                return found
            self._reference = found
        return self._reference

    @property
    def notes(self) -> tuple[str, ...]:
        """The library's messages about the model during imports, each once."""
        return tuple(self.imports.notes)

    def _forced(self, name: str) -> bool:
        """Under `-B`, return True once per item, so that a rebuild makes each item again once."""
        if not self.job.force or name in self._fresh:
            return False
        self._fresh.add(name)
        return True

    # --- compile -------------------------------------------------------------------------------------------------

    def compile_inputs(self, program: Program, point: Point) -> dict[str, object]:
        """Return all inputs of a compile, by name."""
        return self.job.compile_inputs(program, point)

    def compile(self, program: Program, point: Point) -> Artifact | Failure:
        """Return the artifact of a point, from the catalog or the compiler."""
        return self.compiling.compile(program.module, self.job.space.level(point, "codegen"))

    # --- profile -------------------------------------------------------------------------------------------------

    def subject(self, point: Point, program: Program, artifact: Artifact) -> Subject:
        """Return the profiler's subject of a variant."""
        job, blobs, values = self.job, self.catalog.blobs, point.as_dict()
        formats = (str(values[knob]) for knob in ("weight_format", "head_format", "kv_dtype"))
        loosest = max(TOLERANCE[name] for name in formats if name != SAME)
        return Subject(
            variant=job.variant(program, point).digest,
            artifact=artifact.digest,
            artifact_path=blobs.path(artifact.digest),
            parameters_path=blobs.path(program.parameters),
            check_path=blobs.path(program.check),
            abi=plain(program.abi),
            driver=str(values["driver"]),
            workers=int(values["workers"]),
            tolerance=loosest,
            parameter_bytes=blobs.path(program.parameters).stat().st_size,
            meters=job.target.meters,
            integer=str(values["weight_format"]).startswith("int"),
        )

    def bench(self, quality: Quality) -> Bench | RemoteBench:
        """The bench, made on first use."""
        if self._bench is None:
            self._bench = self._meter(quality)
        return self._bench

    def _meter(self, quality: Quality) -> Bench | RemoteBench:
        from llmbuild.profiler.bench import Bench
        from llmbuild.profiler.remote import RemoteBench

        job, limits = self.job, self.roofline()
        if job.remote is not None:
            compiler = job.toolchain.compiler
            return RemoteBench(job.remote, job.recipe.workloads, quality, job.protocol, limits, job.target, compiler)
        return Bench(job.recipe.workloads, quality, self.registered.machine_digest, job.limits, job.protocol, limits)

    def roofline(self) -> Roofline | None:
        """Return the limits of this machine's CPU, measured once; None where the measurement failed or was disturbed.

        A GPU's limits are unknown: the kernels that reach a limit are written for CPUs.
        """
        from llmbuild.profiler import roofline

        if not self.job.target.is_cpu:
            return None
        machine = self.registered.machine_digest
        known = self.catalog.find_limits(machine)
        if known is not None:
            return roofline.from_body(known)
        measure = self.job.remote.roofline if self.job.remote is not None else roofline.measure
        found = measure(self._compile_limits, ROOFLINE_S)
        if isinstance(found, Failure):
            self.catalog.record_failure(self.job.recipe.name, None, found)
            return None
        if any(note.startswith("noise") for note in found.notes):
            return None  # a busy machine's limit is too low; the next build tries again
        self.catalog.record_limits(machine, found)
        return found

    def _compile_limits(self, source: Path, output: Path) -> Failure | None:
        plainly = {**self.job.space.level(self.job.space.default(), "codegen"), "opt_level": "O2"}
        return iree.compile_module(source, output, self.job.target, plainly, self.job.limits)

    def close(self) -> None:
        """End the running worker, and what is kept for more imports."""
        self.imports.close()
        if self._bench is not None:
            self._bench.close()

    def equal(self, subject: Subject, known: list[Trial]) -> tuple[Measurement, ...] | None:
        """Return the measurements of a known variant with the same bytes and settings, for this variant."""
        from llmbuild.profiler.readings import adopt

        for trial in known:
            same = trial.artifact == subject.artifact and trial.measurements and trial.variant != subject.variant
            settings = (trial.point["driver"], trial.point["workers"])
            if same and settings == (subject.driver, subject.workers) and self._same_weights(trial, subject):
                return tuple(adopt(m, subject) for m in trial.measurements)
        return None

    def _same_weights(self, trial: Trial, subject: Subject) -> bool:
        return bool(trial.program) and self.catalog.parameters_of(str(trial.program)) == subject.parameters_path.name
