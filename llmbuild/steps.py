"""The stages wired to a catalog: each step looks for what was made before, makes it if need be, and records it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

from llmbuild import digest
from llmbuild.catalog.names import Registered
from llmbuild.compiler import iree
from llmbuild.compiler.resolved import Answers, resolve
from llmbuild.compiling import Compiling, compile_inputs, once
from llmbuild.digest import plain
from llmbuild.errors import InputError
from llmbuild.frontend.source import FoundModel, find_model
from llmbuild.kernels.choose import FEATURES
from llmbuild.process import Limits, python, run
from llmbuild.profiler import heldout
from llmbuild.profiler.protocol import Protocol, Quality, Subject
from llmbuild.search.knobs import space_for
from llmbuild.search.refusals import CALIBRATED, Refusal, refusals
from llmbuild.spec.formats import INTEGERS, SAME, SHARED
from llmbuild.spec.machine import Machine
from llmbuild.spec.measurement import PROTOCOL, Measurement
from llmbuild.spec.model import read_facts
from llmbuild.spec.program import CHECK_FILE, MODULE_FILE, PARAMETERS_FILE, Program, abi_from
from llmbuild.spec.recipe import Recipe
from llmbuild.spec.space import TUNING, UNTUNED, Point, Space
from llmbuild.spec.target import Target
from llmbuild.spec.trial import Trial
from llmbuild.spec.variant import Artifact, Failure, Toolchain, Variant

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from llmbuild.catalog.writer import Catalog
    from llmbuild.profiler.bench import Bench
    from llmbuild.profiler.remote import Remote, RemoteBench
    from llmbuild.profiler.roofline import Roofline

T = TypeVar("T")

ROOFLINE_S = 3.0
"""Seconds spent on measuring a machine's limits, once."""

TOLERANCE = {"f32": 1e-3, "f16": 3e-2, "bf16": 5e-2, SHARED: 5e-2, **dict.fromkeys(INTEGERS, 3e-2)}
"""Allowed error of logits against PyTorch on the same weights, over their root mean square."""


@dataclass(frozen=True)
class Job:
    """One recipe on one resolved target: everything that decides its results, found once."""

    recipe: Recipe
    target: Target
    space: Space
    model: FoundModel
    machine: Machine
    toolchain: Toolchain
    limits: Limits
    protocol: Protocol = field(default_factory=Protocol)
    force: bool = False
    remote: Remote | None = None
    """Where it is measured; here if left out."""
    declared: Space | None = None
    """The space of the recipe alone, without what the command line pins; the searched one if left out."""
    known_as: str = ""
    """The digest that the catalog has the machine under, where that is not its fingerprint."""
    refused: tuple[Refusal, ...] = ()
    """Values of knobs that the model rules out on this target: they are not in the space."""

    @property
    def registered(self) -> Registered:
        """The records every row of its build points at."""
        return Registered(self.target, self.machine, self.toolchain, self.known_as)

    @cached_property
    def lineage(self) -> str:
        """Digest of what decides an artifact but the point."""
        return digest.of(
            {
                "model": self.model.digest,
                "context": self.recipe.context,
                "batch": self.recipe.batch,
                "target": self.target.identity(),
                "toolchain": self.toolchain,
                **self._calibration_inputs(),
            }
        )

    @cached_property
    def scope_inputs(self) -> dict[str, Any]:
        """What decides a trial's outcome but the point, by name, so that a change can be told by name."""
        tokenizer = digest.of_file(self.model.tokenizer) if self.model.tokenizer else None
        quality = self.recipe.quality
        return {
            "model": self.model.digest,
            "tokenizer": tokenizer,
            "context": self.recipe.context,
            "batch": self.recipe.batch,
            "target": plain(self.target.identity()),
            "toolchain": plain(self.toolchain),
            "machine": self.registered.machine_digest,
            "workloads": plain(self.recipe.workloads),
            "quality text": digest.of({"text": self._text_digest(), "tokens": quality.tokens}),
            "protocol": PROTOCOL,
            **self._calibration_inputs(),
        }

    @cached_property
    def scope(self) -> str:
        """Digest of what decides a trial's outcome but the point."""
        return digest.of(self.scope_inputs)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is worth telling before a build: of the model, and bounds that nothing will be held against."""
        bounds = ", ".join(map(str, self.recipe.quality.bounds))
        quality = self.recipe.quality
        absent = self._unscored if bounds or quality.stdlib or quality.file else ""
        judged = f"{bounds} will not be judged: " if bounds else ""
        return (*self.model.notes, *((f"{judged}quality is {absent}",) if absent else ()))

    @cached_property
    def source(self) -> str:
        """Digest of what the recipe's name stands for: the weights and the tokenizer."""
        return digest.of({name: self.scope_inputs[name] for name in ("model", "tokenizer")})

    @cached_property
    def ranking(self) -> str:
        """Digest of what decides where variants stand, but for the trials that were made."""
        recipe = self.recipe
        return digest.of(
            {
                "scope": self.scope,
                "objectives": recipe.objectives,
                "bounds": (*recipe.constraints, *recipe.quality.bounds),
                "spaces": (self.space, self.declared or self.space),
            }
        )

    def ranks(self, trial: Trial) -> bool:
        """Say whether a trial stands among those of this job: a default, or a point that its inputs ask for.

        A build with pins adds to what the recipe asks for. Configurations that a tuning found have no name there.
        """
        if trial.is_default:
            return True
        values = trial.point.as_dict()
        plainly = Point.of({**values, TUNING: UNTUNED}) if TUNING in values else trial.point
        spaces = (self.space, self.declared or self.space)
        return any(space.contains(point) for space in spaces for point in (trial.point, plainly))

    def scored(self) -> str:
        """Return why quality is not scored, and which bounds so are not judged; empty where it is."""
        absent, bounds = self._unscored, ", ".join(map(str, self.recipe.quality.bounds))
        return f"{absent}; not judged: {bounds}" if absent and bounds else absent

    @cached_property
    def _unscored(self) -> str:
        if self.recipe.model.random_init:
            return "absent: random-init weights, speed only"
        text = self.recipe.quality
        if not (text.stdlib or text.file):
            return "absent: the recipe names no held-out text"
        vocabulary = read_facts(self.model.folder / "config.json").decoder.vocabulary
        why = heldout.unfit(text, self.model.tokenizer, self.recipe.context, vocabulary)
        return f"absent: {why}" if why else ""

    @cached_property
    def calibration(self) -> NDArray[np.int64]:
        """Tokens i64[W,L] of the calibration text.

        Raises:
            InputError: the model has no tokenizer, or the text is too short.
        """
        text = self.recipe.calibration
        if text is None or self.model.tokenizer is None:
            raise InputError("calibration: the model has no tokenizer.json to read the text with")
        return heldout.windows(text, self.model.tokenizer, self.recipe.context)

    def _calibration_inputs(self) -> dict[str, str]:
        text = self.recipe.calibration
        if text is None:
            return {}
        return {"calibration text": digest.of({"text": heldout.read_text(text), "tokens": text.tokens})}

    def _text_digest(self) -> str:
        return "" if self.scored() else digest.of_bytes(heldout.read_text(self.recipe.quality).encode())

    def import_inputs(self, point: Point) -> dict[str, Any]:
        """Return everything that goes into the import of a point, by name."""
        choices = {name: str(value) for name, value in self.space.level(point, "model").items()}
        own = choices.get("kernel") == "own"
        if not own:
            for name in ("work_groups", "row_tile", "row_reads"):
                choices.pop(name, None)  # it says nothing then, and targets without it share the import
        features = [f for f in FEATURES if f in self.target.requires] if own else []
        subgroup = self.target.subgroup if own else 0
        return {
            "model": self.model.digest,
            "context": self.recipe.context,
            "batch": self.recipe.batch,
            "choices": choices,
            "features": features,
            "importer": self.toolchain.importer,
            **({"subgroup": subgroup} if subgroup else {}),
            **({"calibration": digest.of_bytes(self.calibration.tobytes())} if _calibrated(choices) else {}),
        }

    def compile_inputs(self, program: Program, point: Point) -> dict[str, Any]:
        """Return everything that goes into the compile of a program at a point, by name."""
        return compile_inputs(program.module, self.target, self.space.level(point, "codegen"), self.toolchain.compiler)

    def variant(self, program: Program, point: Point) -> Variant:
        """Return the variant a point makes of a program."""
        return Variant(program, self.target, point, self.toolchain)


def make_job(
    recipe: Recipe,
    target: Target,
    pinned: dict[str, str],
    machine: Machine,
    toolchain: Toolchain,
    force: bool,
    answers: Answers | None = None,
    remote: Remote | None = None,
) -> Job:
    """Return the job of a recipe on a target that may still be called `host`.

    Raises:
        InputError: what is wrong with the model, the target, a knob or the calibration text.
    """
    if recipe.calibration:
        heldout.check_apart(recipe.calibration, recipe.quality)
    model = find_model(recipe.model, recipe.context)
    resolved = resolve(target, answers)
    facts = read_facts(model.folder / "config.json")
    refused = refusals(resolved, facts, heldout.uncalibrated(recipe, model.tokenizer, facts.decoder.vocabulary))
    space = space_for(resolved, recipe, pinned, machine.cores, refused)
    declared = space_for(resolved, recipe, {}, machine.cores, refused) if pinned else space
    limits = Limits()
    return Job(
        recipe,
        resolved,
        space,
        model,
        machine,
        toolchain,
        limits,
        force=force,
        remote=remote,
        declared=declared,
        refused=refused,
    )


def _calibrated(choices: Mapping[str, str]) -> bool:
    """Say whether an import needs calibration text."""
    return any(choices.get(knob) == value for knob, value in CALIBRATED.items())


class Steps:
    """The steps of one job on one catalog."""

    def __init__(self, job: Job, catalog: Catalog) -> None:
        self.job, self.catalog = job, catalog
        self.registered = job.registered
        self._fresh: set[str] = set()
        self.said: dict[str, None] = {}
        """What the library said of the model while it was imported, each thing once."""
        self._bench: Bench | RemoteBench | None = None
        self.compiling = Compiling(catalog, job.target, job.toolchain.compiler, job.limits, self._forced)

    # --- import --------------------------------------------------------------------------------------------------

    def import_inputs(self, point: Point) -> dict[str, Any]:
        """Return everything that goes into the import of a point, by name."""
        return self.job.import_inputs(point)

    def import_(self, point: Point) -> Program | Failure:
        """Return the program of a point, from the catalog or a child process.

        What does not go with the model at this point alone is a failure.

        Raises:
            InputError: the model itself cannot be taken.
        """
        inputs = self.import_inputs(point)
        key = digest.of(inputs)
        return self._once("import", key, self.catalog.find_import, lambda: self._import(key, inputs))

    def _import(self, key: str, inputs: dict[str, Any]) -> Program | Failure:
        source = self.job.recipe.model
        request = {
            "verb": "import",
            "model": str(self.job.model.folder.absolute()),
            "random_init": source.random_init,
            "seed": source.seed,
            "context": inputs["context"],
            "batch": inputs["batch"],
            "choices": inputs["choices"],
            "features": inputs["features"],
            "subgroup": inputs.get("subgroup", 0),
        }
        if "calibration" in inputs:
            request["calibration"] = str(self._calibration_file())
        begin = monotonic()
        with TemporaryDirectory(prefix="llmbuild-") as folder:
            result = self._frontend(request, Path(folder))
            if isinstance(result, Failure):
                return result
            self.said.update(dict.fromkeys(result["notes"]))
            files = (Path(folder) / name for name in (MODULE_FILE, PARAMETERS_FILE, CHECK_FILE))
            blobs = [self.catalog.blobs.put_file(path, moved=True) for path in files]
        program = Program(blobs[0], blobs[1], blobs[2], abi_from(result["program"]["abi"]))
        self.catalog.record_import(key, inputs, program, monotonic() - begin)
        return program

    def _calibration_file(self) -> Path:
        """Return an `.npy` of the calibration tokens in the store, where a pasted command finds it too."""
        import numpy as np

        with TemporaryDirectory(prefix="llmbuild-") as folder:
            path = Path(folder) / "calibration.npy"
            np.save(path, self.job.calibration)
            return self.catalog.blobs.path(self.catalog.blobs.put_file(path))

    def _frontend(self, request: dict[str, Any], folder: Path) -> dict[str, Any] | Failure:
        job_file, result = folder / "job.json", folder / "result.json"
        job_file.write_text(json.dumps({**request, "out": str(folder)}))
        command = python("llmbuild.frontend", str(job_file))
        failure = run(command, "import", self.job.limits, result)
        if result.is_file():
            told: dict[str, Any] = json.loads(result.read_text())
            if "error" in told:
                raise InputError(told["error"])
            if "refused" not in told:
                return told
            failure = Failure("import", told["refused"], "", "", lasting=True)
        assert failure is not None
        shown = json.dumps({**request, "out": "out"})
        again = shlex.join(python("llmbuild.frontend", "job.json"))
        pasteable = f"echo {shlex.quote(shown)} > job.json && {again}"
        return replace(failure, command=pasteable)

    def _once(
        self, step: str, key: str, find: Callable[[str], T | None], make: Callable[[], T | Failure]
    ) -> T | Failure:
        """Return what was made before, or make it; of two who need the same thing, one makes it and the other waits."""
        return once(self.catalog, self._forced, step, key, find, make)

    def _forced(self, name: str) -> bool:
        """Under `-B`, say yes once for each thing, so that a rebuild makes it again but only once."""
        if not self.job.force or name in self._fresh:
            return False
        self._fresh.add(name)
        return True

    # --- reference -----------------------------------------------------------------------------------------------

    def reference(self) -> Quality | Failure:
        """Return the f32 model's logits on the held-out text, from the catalog or a child process."""
        job = self.job
        absent = job.scored()
        if absent or job.model.tokenizer is None:
            return Quality(None, absent)
        windows = heldout.windows(job.recipe.quality, job.model.tokenizer, job.recipe.context)
        inputs = {
            "model": job.model.digest,
            "windows": digest.of_bytes(windows.tobytes()),
            "shape": list(windows.shape),
            "importer": job.toolchain.importer,
        }
        key = digest.of(inputs)
        made = self._once("reference", key, self.catalog.find_reference, lambda: self._reference(key, inputs, windows))
        return made if isinstance(made, Failure) else Quality(self.catalog.blobs.path(made), "")

    def _reference(self, key: str, inputs: dict[str, Any], windows: NDArray[np.int64]) -> str | Failure:
        import numpy as np

        with TemporaryDirectory(prefix="llmbuild-") as name:
            folder = Path(name)
            np.save(folder / "windows.npy", windows)
            request = {
                "verb": "reference",
                "model": str(self.job.model.folder.absolute()),
                "windows": str(folder / "windows.npy"),
            }
            result = self._frontend(request, folder)
            if isinstance(result, Failure):
                return result
            np.savez(folder / "reference.npz", tokens=windows, logits=np.load(folder / result["logits"]))
            blob = self.catalog.blobs.put_file(folder / "reference.npz")
        self.catalog.record_reference(key, inputs, blob)
        return blob

    # --- compile -------------------------------------------------------------------------------------------------

    def compile_inputs(self, program: Program, point: Point) -> dict[str, Any]:
        """Return everything that goes into a compile, by name."""
        return self.job.compile_inputs(program, point)

    def compile(self, program: Program, point: Point) -> Artifact | Failure:
        """Return the artifact of a point, from the catalog or the compiler."""
        return self.compiling.compile(program.module, self.job.space.level(point, "codegen"))

    # --- profile -------------------------------------------------------------------------------------------------

    def subject(self, point: Point, program: Program, artifact: Artifact) -> Subject:
        """Return what the profiler needs to know of a variant."""
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
        """Return the meter, made on first use."""
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
        """Return what this machine's CPU can do at most, measured once; None where that failed or it was busy.

        Of a GPU it is not known: the kernels that reach a limit are written for CPUs.
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
            return None  # a limit read on a busy machine would flatter every variant; the next build tries again
        self.catalog.record_limits(machine, found)
        return found

    def _compile_limits(self, source: Path, output: Path) -> Failure | None:
        plainly = {**self.job.space.level(self.job.space.default(), "codegen"), "opt_level": "O2"}
        return iree.compile_module(source, output, self.job.target, plainly, self.job.limits)

    def close(self) -> None:
        """End what still runs."""
        if self._bench is not None:
            self._bench.close()

    def equal(self, subject: Subject, known: list[Trial]) -> tuple[Measurement, ...] | None:
        """Return the measurements of a known variant with the same bytes and settings, adopted for this one."""
        from llmbuild.profiler.bench import adopt

        for trial in known:
            same = trial.artifact == subject.artifact and trial.measurements and trial.variant != subject.variant
            settings = (trial.point["driver"], trial.point["workers"])
            if same and settings == (subject.driver, subject.workers) and self._same_weights(trial, subject):
                return tuple(adopt(m, subject) for m in trial.measurements)
        return None

    def _same_weights(self, trial: Trial, subject: Subject) -> bool:
        return bool(trial.program) and self.catalog.parameters_of(str(trial.program)) == subject.parameters_path.name
