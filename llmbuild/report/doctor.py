"""Checks of this installation, this host and this catalog. Each failed check has instructions."""

from __future__ import annotations

import os
import shutil
import sqlite3
import sys
from collections.abc import Sequence
from pathlib import Path

from llmbuild.build.toolchain import package_version
from llmbuild.catalog.known import Known, is_current
from llmbuild.catalog.place import FILE
from llmbuild.compiler.iree import compiler_version
from llmbuild.errors import InputError, LlmbuildError, as_our_errors
from llmbuild.frontend.config import TAKEN
from llmbuild.profiler.meters import estimate, nvml, rapl
from llmbuild.profiler.meters.meter import Absent, Meter
from llmbuild.runtime import host, reader
from llmbuild.runtime.choose import same_minor
from llmbuild.system import resources
from llmbuild.system.paths import real

NEEDED = {
    "runtime": ("iree-base-runtime", "numpy", "tokenizers", "jinja2"),
    "build": ("iree-base-compiler", "torch", "transformers", "safetensors", "optuna"),
}


def _row(check: str, state: str, found: str, todo: str = "") -> dict[str, object]:
    return {"check": check, "state": state, "found": found, "todo": todo}


def checks(catalog: Path) -> list[dict[str, object]]:
    """Return every check as a row; `state` is ok, note or wrong."""
    rows = [_row("python", "ok", sys.version.split()[0])]
    for extra, names in NEEDED.items():
        rows += [_package(name, extra) for name in names]
    rows += [
        _versions(),
        _row("architectures", "ok", TAKEN),
        _features(),
        _memory(),
        _cpus(),
        *_energy(),
        _disk(catalog),
    ]
    return [*rows, *_catalog(catalog)]


def _package(name: str, extra: str) -> dict[str, object]:
    found = package_version(name)
    if found != "absent":
        return _row(name, "ok", found)
    state = "wrong" if extra == "runtime" else "note"
    return _row(
        name, state, "absent", f"pip install 'llmbuild[{extra}]'" if extra == "build" else f"pip install {name}"
    )


def _versions() -> dict[str, object]:
    compiler, runtime = compiler_version(), host.runtime_version()
    if "absent" in (compiler, runtime) or same_minor(compiler, runtime):
        return _row("compiler and runtime", "ok", f"{compiler} and {runtime}")
    return _row(
        "compiler and runtime", "wrong", f"{compiler} and {runtime}", f"pip install iree-base-runtime=={compiler}"
    )


def _features() -> dict[str, object]:
    found = host.features()
    if not found:
        return _row(
            "CPU features", "wrong", "this system does not report them", "artifacts cannot be checked before opening"
        )
    named = [
        f
        for f in ("avx2", "avxvnni", "avx512f", "avx512vnni", "avx512bf16", "amx-int8", "dotprod", "i8mm", "sve")
        if f in found
    ]
    return _row("CPU features", "ok", f"{host.machine().chip}: {' '.join(named) or 'baseline'}")


def _memory() -> dict[str, object]:
    free, limit = resources.memory_available(), resources.group_memory_limit()
    if free is None:
        return _row("memory", "note", "this system does not report how much is free", "picks are not held against it")
    told = f"{free.bytes / 1e9:.1f} GB available"
    return _row("memory", "ok", told if limit is None else f"{told}, {limit.bytes / 1e9:.1f} GB at most ({limit.file})")


def _cpus() -> dict[str, object]:
    quota, cores, all_ = resources.cpu_quota(), host.cores(), len(resources.host_cpus() or ())
    told = f"{cores} of {all_} usable" if all_ else f"{cores} usable"
    return _row("CPUs", "ok", told if quota is None else f"{told}, a control group allows the time of {quota:g}")


def _energy() -> list[dict[str, object]]:
    """Return a row for the CPU's meter, one for the GPU's, and one for the estimate where it is enabled."""
    counter = nvml.find_counter()
    board = [counter] if not isinstance(counter, Absent) else [counter, nvml.find_polled()]
    rows = [_meters("energy of the CPU", [rapl.find()]), _meters("energy of the GPU", board)]
    if not estimate.asked():
        return rows
    try:
        return [*rows, _row("energy estimate", "note", estimate.find().describe(), "it ranks nothing")]
    except InputError as error:
        return [*rows, _row("energy estimate", "wrong", str(error), f"unset {estimate.VARIABLE}, or correct it")]


def _meters(check: str, tried: Sequence[Meter | Absent]) -> dict[str, object]:
    """Return the meter that is found, and why the better ones are not used."""
    why = [f"{one.source}: {one.reason}" for one in tried if isinstance(one, Absent)]
    found = next((one for one in tried if not isinstance(one, Absent)), None)
    if found is None:
        return _row(check, "note", "no meter, energy stays absent", "; ".join(why))
    memory = found.conditions().get("memory")
    whose = f"{found.boundary} {memory}" if memory else found.boundary
    told = f"{found.source} of the {whose}, updated every {found.step_s:g} s"
    return _row(check, "ok", told, "; ".join(why))


def _disk(catalog: Path) -> dict[str, object]:
    whole = real(catalog)
    existing = next(p for p in (whole, *whole.parents) if os.path.exists(p))  # noqa: PTH110 - false where not allowed
    free = shutil.disk_usage(existing).free
    if free < 1 << 30:
        return _row(
            "disk",
            "wrong",
            f"{free / 1e9:.1f} GB free at {existing}",
            "free some space, or name another catalog with -C",
        )
    return _row("disk", "ok", f"{free / 1e9:.0f} GB free at {existing}")


def _catalog(catalog: Path) -> list[dict[str, object]]:
    try:
        with as_our_errors():
            there = (catalog / FILE).is_file()
        if not there:
            return [_row("catalog", "note", f"none at {catalog}", "llmbuild build RECIPE makes one")]
        with reader.opened(catalog) as connection:
            found = connection.execute("PRAGMA integrity_check").fetchone()[0]
        lost = len(Known(catalog).lost()) if is_current(catalog) else 0
    except (LlmbuildError, sqlite3.Error) as error:
        return [_row("catalog", "wrong", str(error), "restore it from a copy, or build into another folder")]
    rows = [_row("catalog", "ok" if found == "ok" else "wrong", f"{catalog}: integrity {found}")]
    if lost:
        rows.append(_row("artifacts", "wrong", f"{lost} variants lack a file", "llmbuild build makes them again"))
    return rows
