"""Pack compiled variants into one folder, to be measured on a machine without network or compiler: see `packed`."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import zipfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from llmbuild.build.build import Build
from llmbuild.build.events import Tell
from llmbuild.build.job import Job
from llmbuild.build.steps import Steps
from llmbuild.build.trials import describe, owner
from llmbuild.carry import seeded
from llmbuild.carry.packed import JOB
from llmbuild.catalog.schema import copied, now
from llmbuild.catalog.writer import Catalog
from llmbuild.compiler import iree
from llmbuild.digest import plain
from llmbuild.errors import InputError
from llmbuild.process.child import NEUTRAL, environment, python
from llmbuild.profiler import bandwidth, wire
from llmbuild.profiler.remote import archive
from llmbuild.runtime import host
from llmbuild.runtime.reader import FILE, blob_path
from llmbuild.spec.formats import SAME
from llmbuild.spec.program import CHECK_FILE, Program
from llmbuild.spec.recipe import Budget
from llmbuild.spec.space import Point
from llmbuild.spec.variant import Failure
from llmbuild.system.strict_json import JsonObject

MOST_BYTES = 60 << 20
"""Bytes of a packed folder without the weights."""
MORE_CODE = (
    *("carry/__init__", "carry/packed", "carry/peers", "carry/seeded", "carry/table"),
    *("search/__init__", "search/front", "search/pairs"),
    *("transform/__init__", "transform/blocks", "transform/drawn"),
    *("transform/quantized", "transform/scales", "transform/weights"),
)
CHECK_BYTES, COLUMNS = 1 << 20, 1024
"""Maximum bytes of logits that are packed whole, and the number of columns of larger ones: evenly spread ones, and the
most likely token of each row.
"""
WHEELS = ("iree-base-runtime", "ml-dtypes", "numpy", "nvidia-ml-py")
FORGOTTEN = (
    "standing",
    "trial",
    "build",
    "measurement",
    "failure",
    "machine_limit",
    "collected",
    "front_half",
    "reference",
    "dispatch_tuning",
)
"""Tables that a packed catalog starts without: this machine's readings, and data of builds."""
LEFT_OVER = {
    "variant": "digest NOT IN (SELECT digest FROM temp.packed)",
    "program": "digest NOT IN (SELECT program FROM variant)",
    "artifact": "digest NOT IN (SELECT artifact FROM variant)",
    "import": "program NOT IN (SELECT digest FROM program)",
    "compile": "artifact NOT IN (SELECT digest FROM artifact)",
    "target": "digest NOT IN (SELECT target FROM variant UNION SELECT digest FROM temp.packed)",
    "toolchain": "digest NOT IN (SELECT toolchain FROM variant)",
    "machine": "1",
}
"""Rows that a packed catalog omits, by table: those of other variants."""
RUNNER = Path(__file__).with_name("runner.py")


@dataclass
class Packed:
    """The contents of a folder: variants, omissions with reasons, and its bytes by kind."""

    variants: int = 0
    left_out: list[str] = field(default_factory=list)
    weights_bytes: int = 0
    drawn_bytes: int = 0
    """Bytes of weights that are drawn from their seed on the other machine."""
    drawn: dict[str, JsonObject | None] = field(default_factory=dict)
    """How these are drawn, by archive; None for one that is packed."""
    other_bytes: int = 0


def pack(jobs: Sequence[Job], catalog: Catalog, folder: Path, trials: int, tell: Tell) -> Packed:
    """Compile the jobs' points that are tried first, and write everything for their measurement into a new `folder`.

    Raises:
        InputError: the folder is not empty, or nothing compiled.
    """
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder}: is not empty: name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    done, weights, others = Packed(), dict[str, Path](), dict[str, Path]()
    bodies = [_job(job, catalog, trials, tell, done, weights, others) for job in jobs]
    done.drawn_bytes = sum(weights.pop(name).stat().st_size for name, made in done.drawn.items() if made)
    kept = [body for body in bodies if body["subjects"]]
    if not kept:
        raise InputError(f"nothing to pack: {'; '.join(done.left_out)}")
    for name, path in weights.items():
        _copy(path, blob_path(folder, name))
    with zipfile.ZipFile(folder / "blobs.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        for name, path in sorted(others.items()):
            packed.write(path, blob_path(Path(), name).as_posix())
    (folder / JOB).write_text(json.dumps({"version": 1, "jobs": kept}))
    (folder / "code.zip").write_bytes(archive(*MORE_CODE))
    shutil.copyfile(RUNNER, folder / "run.py")
    variants = [one["subject"]["variant"] for body in kept for one in body["subjects"]]
    _rows(catalog, folder, [*variants, *(body["target_digest"] for body in kept)])
    _leave_checks(catalog, folder, others)
    done.weights_bytes = sum(path.stat().st_size for path in weights.values())
    return done


def _job(
    job: Job, catalog: Catalog, trials: int, tell: Tell, done: Packed, weights: dict[str, Path], others: dict[str, Path]
) -> JsonObject:
    steps = Steps(job, catalog)
    made = Build(steps, Budget(trials, job.recipe.budget.seconds), 0, 1, tell).compile()
    quality = steps.reference()
    if isinstance(quality, Failure):
        raise InputError(f"{job.recipe.name}: {quality.stage}: {quality.reason}")
    if quality.data is not None:
        others[quality.data.name] = quality.data
    mine = owner(steps)
    others |= {name: catalog.blobs.path(name) for name in (mine.tokenizer, mine.chat) if name}
    subjects: list[JsonObject] = []
    names = set()
    for point, artifact in made:
        program = steps.import_(point)
        if isinstance(artifact, Failure) or isinstance(program, Failure):
            why = artifact if isinstance(artifact, Failure) else program
            assert isinstance(why, Failure)
            done.left_out.append(f"{job.target.name}: {describe(job, point)}: {why.stage}: {why.reason[:200]}")
            continue
        subject = steps.subject(point, program, artifact)
        others[program.module] = catalog.blobs.path(program.module)
        name = subject.parameters_path.name
        names.add(name)
        if name not in done.drawn:
            done.drawn[name] = _drawn(job, point, catalog, subject.parameters_path, others)
        weights[name] = subject.parameters_path
        subject = replace(subject, check_path=_sampled(subject.check_path, catalog))
        others |= {n: p for n, p in wire.files_of(subject).items() if p != subject.parameters_path}
        subjects.append(_subject(job, point, wire.subject_body(subject), steps, program))
        done.variants += 1
    recipe = job.recipe
    return {
        "model": recipe.name,
        "target": job.target.name,
        "target_digest": steps.registered.target_digest,
        "scope_inputs": job.scope_inputs,
        "objectives": list(recipe.objectives),
        "bounds": [str(b) for b in (*recipe.constraints, *recipe.quality.bounds)],
        "bench": wire.bench_body(recipe.workloads, quality, job.protocol, job.target, job.toolchain.compiler, None),
        "subjects": subjects,
        "seeded": {name: done.drawn[name] for name in sorted(names) if done.drawn[name]},
        "bandwidth": _bandwidth(job, catalog, others, done),
        "shape": _shape(job),
    }


def _sampled(check: Path, catalog: Catalog) -> Path:
    """Return check data with only some columns of the logits, where there are many.

    A batch's logits over a large vocabulary would dominate a folder's size, and some of them suffice.
    """
    with np.load(check) as data:
        found = {name: data[name] for name in data.files}
    logits = found["logits"]
    if logits.nbytes <= CHECK_BYTES:
        return check
    spread = np.linspace(0, logits.shape[-1] - 1, COLUMNS).astype(np.int64)
    columns = np.unique(np.concatenate([spread, logits.argmax(-1).reshape(-1)]))
    with TemporaryDirectory(prefix="llmbuild-") as name:
        path = Path(name) / CHECK_FILE
        np.savez(path, **{**found, "logits": logits[..., columns], "columns": columns})
        return catalog.blobs.path(catalog.blobs.put_file(path))


def _drawn(job: Job, point: Point, catalog: Catalog, archive: Path, others: dict[str, Path]) -> JsonObject | None:
    """Return how random weights are drawn again; None where they are not random, or not reproduced byte for byte."""
    config = _shape(job)
    if not job.recipe.model.random_init or config is None:
        return None
    layers, head = str(point["weight_format"]), str(point["head_format"])
    forms = (layers, layers if head == SAME else head)
    with TemporaryDirectory(prefix="llmbuild-") as name:
        rest = Path(name) / "rest.irpa"
        found = seeded.take_apart(archive, config, job.recipe.model.seed, forms, rest)
        if found:
            blob = catalog.blobs.put_file(rest)
            others[blob] = catalog.blobs.path(blob)
    return found


def _bandwidth(job: Job, catalog: Catalog, others: dict[str, Path], done: Packed) -> str | None:
    """Compile the bandwidth test of the target's memory; None where its compiler fails."""
    settings = {**job.space.level(job.space.default(), "codegen"), "opt_level": "O2"}
    with TemporaryDirectory(prefix="llmbuild-") as name:
        source, output = Path(name) / "bandwidth.mlir", Path(name) / "bandwidth.vmfb"
        source.write_text(bandwidth.SOURCE)
        failure = iree.compile_module(source, output, job.target, settings, job.limits)
        if failure:
            done.left_out.append(f"{job.target.name}: bandwidth: {failure.reason[:200]}")
            return None
        blob = catalog.blobs.put_file(output)
    others[blob] = catalog.blobs.path(blob)
    return blob


def _shape(job: Job) -> JsonObject | None:
    """Return the model's configuration, for another runtime to make the same shape; None if it is not a plain Llama."""
    config: JsonObject = json.loads((job.model.folder / "config.json").read_text())
    return config if config.get("model_type") == "llama" else None


def _subject(job: Job, point: Point, body: JsonObject, steps: Steps, program: Program) -> JsonObject:
    from llmbuild import digest

    return {
        "subject": body,
        "point": plain(point.as_dict()),
        "program": digest.of(program),
        "default": point == job.space.default(),
        "choices": describe(job, point),
    }


def _copy(source: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, path)


def _rows(catalog: Catalog, folder: Path, named: Sequence[str]) -> None:
    """Write the catalog's rows of these variants and targets, without readings and trials.

    Targets of equal code share a variant, whose row names one of them.
    """
    copied(catalog.folder / FILE, folder / FILE)
    with sqlite3.connect(folder / FILE) as connection:
        connection.execute("CREATE TEMP TABLE packed (digest)")
        connection.executemany("INSERT INTO temp.packed VALUES (?)", [(name,) for name in named])
        for name in FORGOTTEN:
            connection.execute(f'DELETE FROM "{name}"')
        for name, left_over in LEFT_OVER.items():
            connection.execute(f'DELETE FROM "{name}" WHERE {left_over}')
    connection.execute("VACUUM")
    connection.close()


def _leave_checks(catalog: Catalog, folder: Path, carried: Collection[str]) -> None:
    """Record in the packed catalog which check data is incomplete: after a merge, it does not count as missing."""
    with sqlite3.connect(folder / FILE) as connection:
        named = connection.execute("SELECT DISTINCT checks FROM program").fetchall()
        left = [(name, catalog.blobs.path(name).stat().st_size, now()) for (name,) in named if name not in carried]
        connection.executemany("INSERT INTO collected (digest, size_bytes, created_at) VALUES (?, ?, ?)", left)
    connection.close()


def wheels(folder: Path, pythons: Sequence[str], platform: str) -> None:
    """Download the wheels for the other machine, for each Python and one platform such as `manylinux_2_28_x86_64`.

    Raises:
        InputError: an index does not have one of them.
    """
    runtime = host.runtime_version()
    wanted = [f"{name}=={runtime}" if name == "iree-base-runtime" else name for name in WHEELS]
    for version in pythons:
        command = python("pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps")
        command += ["--only-binary=:all:", "--python-version", version, "--platform", platform]
        done = subprocess.run(
            [*command, "--dest", str(folder.absolute() / "wheels"), *wanted],
            capture_output=True,
            text=True,
            check=False,
            env=environment(),
            cwd=NEUTRAL,
        )
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()] or ["pip failed"]
            raise InputError(f"wheels for Python {version} on {platform}: {lines[-1]}")


def size(folder: Path) -> int:
    """Return the bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def closing(packed: Packed, folder: Path) -> str:
    """Return the instructions for a packed folder."""
    packed.other_bytes = size(folder) - packed.weights_bytes
    over = f", MORE THAN {MOST_BYTES / 1e6:.0f} MB" if packed.other_bytes > MOST_BYTES else ""
    drawn = f"; {packed.drawn_bytes / 1e6:.1f} MB are drawn from their seed there" if packed.drawn_bytes else ""
    left = "".join(f"\nleft out: {text}" for text in packed.left_out)
    return (
        f"{folder}: {packed.variants} variants, {packed.other_bytes / 1e6:.1f} MB{over} beside "
        f"{packed.weights_bytes / 1e6:.1f} MB of weights{drawn}{left}\n"
        f"copy it to the machine and run `python3 run.py` in it; then `llmbuild merge {folder}` here"
    )
