"""Synthetic catalogs for tests and benchmarks of catalog commands: made with the writer itself.

`fill` records a few complete variants with blobs; `multiply` copies their rows up to the requested number.
"""

from __future__ import annotations

import json
import random
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmbuild import digest
from llmbuild.catalog.schema import FILE
from llmbuild.catalog.writer import Catalog, Owner, Registered
from llmbuild.runtime import host
from llmbuild.spec.machine import Machine
from llmbuild.spec.measurement import Measurement, Reading
from llmbuild.spec.program import Program, abi_from
from llmbuild.spec.space import Point
from llmbuild.spec.target import Target
from llmbuild.spec.trial import Standing, Trial
from llmbuild.spec.variant import Artifact, Toolchain
from llmbuild.spec.workload import Workload

ABI: dict[str, Any] = {"vocabulary": 320, "context": 32, "kv": [], "eos_tokens": [], "parameters": 10}
WORKLOAD = Workload("short", 8, 8, 32)
TARGET = Target("host", "llvm-cpu", host.architecture(), "generic", (), ())


@dataclass(frozen=True)
class Made:
    """One variant: its choices by name, where it stands, and its readings; `width` is the relative interval."""

    name: str
    status: str = "pareto"
    tpot_s: float = 0.01
    ttft_s: float = 0.1
    quality_kl: float = 0.0
    width: float = 0.01
    default: bool = False
    artifact: bytes = b""
    parameters: bytes = b"weights"


def toolchain(runtime: str = "", compiler: str = "3.13.0") -> Toolchain:
    """Return a toolchain whose artifacts this host's runtime opens."""
    return Toolchain("0.1.0", "importer", compiler, runtime or host.runtime_version())


def fill(
    folder: Path,
    made: Sequence[Made],
    model: str = "m",
    tools: Toolchain | None = None,
    machine: Machine | None = None,
    target: Target = TARGET,
) -> Registered:
    """Record variants of a model whole: programs, artifacts, measurements, standings."""
    tools = tools or toolchain()
    names = Registered(target, machine or host.machine(), tools)
    catalog = Catalog(folder)
    try:
        catalog.register(names)
        scope = digest.of({"model": model, "tools": tools, "machine": names.machine_digest})
        owner = Owner(model, names.target_digest, names.toolchain_digest, scope, catalog.blobs.put_bytes(b"{}"))
        standings = [_record(catalog, one, number, scope, owner, names) for number, one in enumerate(made)]
        catalog.record_standings(model, names.target_digest, names.machine_digest, standings)
        state = {"seconds": 1.0, "raced": True, "ended": "done"}
        catalog.record_build(digest.of(["build", scope]), model, scope, {"model": model}, **state)
    finally:
        catalog.close()
    return names


def _record(catalog: Catalog, one: Made, number: int, scope: str, owner: Owner, names: Registered) -> Standing:
    put = catalog.blobs.put_bytes
    program = Program(put(b"module " + one.parameters), put(one.parameters), put(b"checks"), abi_from(ABI))
    tools = names.toolchain
    catalog.record_import(digest.of(["import", one.parameters.hex()]), {"model": owner.model}, program, 0.1)
    data = one.artifact or f"artifact of {one.name} by {tools.compiler}".encode()
    artifact = Artifact(put(data), len(data), tools.runtime)
    catalog.record_compile(digest.of(["compile", one.name, tools.compiler]), {"name": one.name}, artifact, 0.1)
    point = Point.of({"name": one.name, "driver": "local-sync", "workers": 1})
    variant = digest.of({"program": program, "point": point.as_dict(), "tools": tools, "target": names.target_digest})
    measured = measurement(one, variant, artifact.digest, names.machine_digest)
    trial = Trial(
        scope=scope,
        number=number,
        point=point,
        variant=variant,
        is_default=one.default,
        program=digest.of(program),
        artifact=artifact.digest,
        artifact_bytes=artifact.size_bytes,
        parameter_bytes=len(one.parameters),
        measurements=(measured,),
        failure=None,
        seconds=0.1,
    )
    catalog.record_trial(trial, owner)
    return Standing(
        variant, WORKLOAD.name, one.status, None, "" if one.status != "dominated" else "beaten", measured.key
    )


def measurement(one: Made, variant: str, artifact: str, machine: str) -> Measurement:
    """Return readings of a variant that was never run."""

    def timed(value: float) -> Reading:
        return Reading(value, value * (1 - one.width), value * (1 + one.width), (value,) * 10)

    def still(value: float) -> Reading:
        return Reading(value, value, value, (value,))

    readings = {
        "tpot_s": timed(one.tpot_s),
        "ttft_s": timed(one.ttft_s),
        "e2e_s": timed(one.ttft_s + 7 * one.tpot_s),
        "output_tokens_per_s": timed(1 / one.tpot_s),
        "peak_memory_bytes": still(1e6),
        "load_s": timed(0.001),
        "quality_kl": still(one.quality_kl),
        "quality_top1": still(1.0 - one.quality_kl),
    }
    key = digest.of({"variant": variant, "machine": machine, "workload": WORKLOAD})
    notes = {"energy": "no energy counter"}
    return Measurement(key, variant, artifact, WORKLOAD, machine, readings, {"tpot_s": still(1.0)}, notes)


def multiply(folder: Path, rows: int, front: float, seed: int = 0) -> None:
    """Copy the first variant's rows until its model has `rows`; `front` is the share of them that is on the front."""
    draw = random.Random(seed)
    connection = sqlite3.connect(folder / FILE)
    connection.row_factory = sqlite3.Row
    one = {
        name: dict(connection.execute(f'SELECT * FROM "{name}" ORDER BY rowid LIMIT 1').fetchone())
        for name in ("artifact", "compile", "variant", "measurement", "trial", "standing")
    }
    have = connection.execute("SELECT count(*) FROM standing").fetchone()[0]
    for number in range(have, rows):
        _insert(connection, _copies(one, number, draw, draw.random() < front))
    connection.commit()
    connection.execute("ANALYZE")
    connection.commit()
    connection.close()


def _copies(one: dict[str, Any], number: int, draw: random.Random, front: bool) -> dict[str, dict[str, Any]]:
    name = digest.of(["copy", number])
    tpot, ttft = draw.uniform(0.001, 0.1), draw.uniform(0.01, 1.0)
    point = {**json.loads(one["variant"]["point"]), "name": f"copy-{number}"}
    measured = {"key": name, "variant": name, "artifact": name, "tpot_s": tpot, "ttft_s": ttft}
    status = draw.choice(["pareto", "undecided"]) if front else draw.choice(["dominated", "infeasible"])
    placed = {"id": None, "variant": name, "measurement": name, "status": status, "reason": "" if front else "beaten"}
    changes = {
        "artifact": {"digest": name},
        "compile": {"key": name, "artifact": name},
        "variant": {"digest": name, "artifact": name, "point": json.dumps(point), "is_default": 0},
        "measurement": measured,
        "trial": {"point": name, "number": number, "variant": name},
        "standing": placed,
    }
    return {table: {**one[table], **change} for table, change in changes.items()}


def _insert(connection: sqlite3.Connection, rows: dict[str, dict[str, Any]]) -> None:
    for table, row in rows.items():
        names = ", ".join(f'"{n}"' for n in row)
        connection.execute(f'INSERT INTO "{table}" ({names}) VALUES ({", ".join("?" * len(row))})', list(row.values()))


def slower(made: Sequence[Made], factor: float) -> list[Made]:
    """Return the same variants, each token taking `factor` as long."""
    return [replace(one, tpot_s=one.tpot_s * factor) for one in made]
