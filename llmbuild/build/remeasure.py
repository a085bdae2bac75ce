"""Measure single variants again on this machine, paired with their default, from the catalog alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from llmbuild import digest
from llmbuild.build.events import Event
from llmbuild.build.steps import TOLERANCE
from llmbuild.build.trials import scoped
from llmbuild.catalog.names import Registered
from llmbuild.catalog.writer import Catalog
from llmbuild.errors import LoadRefused, NothingUsable
from llmbuild.process.child import Limits
from llmbuild.profiler.protocol import Prepared, Protocol, Quality, Stage, Subject
from llmbuild.runtime import host, reader
from llmbuild.runtime.choose import HostFacts, refusal
from llmbuild.runtime.model import host_facts, verify
from llmbuild.spec.machine import NOWHERE
from llmbuild.spec.measurement import Measurement, Reading
from llmbuild.spec.rows import Row, number, present
from llmbuild.spec.slo import is_quality
from llmbuild.spec.target import Target, target_from
from llmbuild.spec.trial import Standing
from llmbuild.spec.variant import Failure, Toolchain
from llmbuild.spec.workload import Workload

if TYPE_CHECKING:
    from llmbuild.profiler.bench import Bench
    from llmbuild.profiler.remote import Remote, RemoteBench
    from llmbuild.profiler.roofline import Roofline

KEPT = "quality"


@dataclass(frozen=True)
class Known:
    """A variant in the catalog: one of its rows, its machine, and its check data."""

    row: Row
    scope: str
    key: str
    """Name of the known measurement."""
    workload: Workload
    checks: str
    target: Target
    toolchain: Toolchain


def remeasure(
    folder: Path, prefixes: Sequence[str], tell: Callable[[Event], None], remote: Remote | None = None
) -> list[Row]:
    """Measure variants again, here or on another machine, and return their rows.

    On the machine that measured them before, the readings replace the earlier ones and quality is kept, since it does
    not depend on the machine; on another machine they are added.

    Raises:
        InputError: no such variant.
        LoadRefused: this host must not open it.
        NothingUsable: the variant does not run here.
    """
    facts = remote.facts if remote is not None else host_facts()
    known = [known_of(folder, row, facts) for prefix in prefixes for row in reader.find_variant(folder, prefix)]
    catalog = Catalog(folder)
    try:
        for number, one in enumerate(known, 1):
            name = digest.short(one.row["variant"])
            _measure(catalog, folder, one, remote, partial(_tell, tell, name, number, len(known)))
            tell(Event("done", name, number, len(known)))
    finally:
        catalog.close()
    rows = [row for prefix in prefixes for row in reader.find_variant(folder, prefix)]
    return [row for row in rows if row["machine_digest"] == facts.machine]


def _tell(tell: Callable[[Event], None], name: str, number: int, total: int, stage: Stage) -> None:
    rounds = f", {stage.done} rounds" if stage.done else ""
    tell(Event(stage.name, f"{name}{rounds}", number, total))


def known_of(folder: Path, row: Row, facts: HostFacts | None = None) -> Known:
    """Return the variant of a row, after the loader's checks.

    Raises:
        LoadRefused: this host must not open it, or it was never measured.
    """
    why = refusal(row, facts or host_facts())
    if why:
        raise LoadRefused(f"variant {digest.short(row['variant'])} {why}")
    verify(folder, row)
    with reader.opened(folder) as connection:
        measured = connection.execute(
            "SELECT m.scope, m.key, m.workload_body FROM measurement m LEFT JOIN standing s ON s.measurement = m.key "
            "AND s.model = ? AND s.machine = ? WHERE m.variant = ? AND m.workload = ? ORDER BY s.id IS NULL, m.key",
            (row["model"], row["machine_digest"], row["variant"], row["workload"]),
        ).fetchone()
        checks = connection.execute("SELECT checks FROM program WHERE digest = ?", (row["program"],)).fetchone()
        body = connection.execute("SELECT body FROM toolchain WHERE digest = ?", (row["toolchain"],)).fetchone()
    if measured is None:
        raise LoadRefused(f"variant {digest.short(row['variant'])} was never measured: give its recipe instead")
    decoded = reader.decode({"workload_body": measured["workload_body"], "notes": body["body"]})
    return Known(
        row=row,
        scope=measured["scope"],
        key=measured["key"],
        workload=Workload(**decoded["workload_body"]),
        checks=checks["checks"],
        target=target_from(row["target_body"]),
        toolchain=Toolchain(**present(decoded["notes"])),
    )


def _measure(
    catalog: Catalog, folder: Path, known: Known, remote: Remote | None, tell: Callable[[Stage], None]
) -> None:
    from llmbuild.profiler.roofline import from_body

    machine = remote.machine if remote is not None else host.machine()
    known_as = catalog.machine_known_as(digest.of(machine))[0]
    names = Registered(known.target, machine, known.toolchain, known_as)
    catalog.register(names)
    quality = Quality(None, "kept from the first measurement")
    with catalog.measuring():
        limits = catalog.find_limits(names.machine_digest) if known.target.is_cpu else None
        known_limits = from_body(limits) if limits else None
        bench = _bench(known, quality, names.machine_digest, known_limits, remote)
        bench.tell = tell
        try:
            default = find_default(folder, known, remote.facts if remote is not None else None)
            if default:
                there = catalog.measurements(default.scope, default.row["variant"], names.machine_digest)
                bench.open_baseline(replace(subject_of(folder, default), known=Prepared.of(there)))
            measured = bench.measure(subject_of(folder, known), baseline=default is None)
        finally:
            bench.close()
    if isinstance(measured, Failure):
        catalog.record_failure(known.row["model"], known.row["variant"], measured)
        raise NothingUsable(f"variant {digest.short(known.row['variant'])}: {measured.stage}: {measured.reason}")
    fresh = _with_quality(measured[0], known.row)
    here = known.row["machine_digest"] == digest.of(machine)
    fresh = replace(fresh, key=known.key) if here else scoped(fresh, known.scope)
    catalog.update_measurement(known.scope, fresh)
    if not here:
        reason = "measured alone on this machine"
        catalog.add_standing(
            known.row["model"],
            names,
            Standing(known.row["variant"], known.workload.name, "undecided", None, reason, fresh.key),
        )


def _bench(
    known: Known, quality: Quality, machine: str, limits: Roofline | None, remote: Remote | None
) -> Bench | RemoteBench:
    from llmbuild.profiler.bench import Bench
    from llmbuild.profiler.remote import RemoteBench

    if remote is None:
        return Bench([known.workload], quality, machine, Limits(), Protocol(), limits)
    return RemoteBench(
        remote, [known.workload], quality, Protocol(), limits, known.target, present(known.row["runtime"])
    )


def find_default(folder: Path, known: Known, facts: HostFacts | None = None) -> Known | None:
    """Return the compiler's default of the same model, target and workload; None for a default, or without one."""
    row = known.row
    rows = reader.variants(folder, row["model"], row["target"], row["workload"], everything=True)
    found = next((r for r in rows if r["default"] and r["artifact"] and r["machine_digest"] != NOWHERE), None)
    return None if found is None or found["variant"] == row["variant"] else known_of(folder, found, facts)


def subject_of(folder: Path, known: Known) -> Subject:
    """Return the profiler's subject of a variant."""
    return subject_from(folder, known.row, known.checks, known.target)


def subject_from(folder: Path, row: Row, checks: str, target: Target) -> Subject:
    """Return the profiler's subject of a row, with absolute paths: the profiler works in another folder."""
    point, folder = row["point"], folder.absolute()
    return Subject(
        variant=row["variant"],
        artifact=present(row["artifact"]),
        artifact_path=reader.blob_path(folder, present(row["artifact"])),
        parameters_path=reader.blob_path(folder, present(row["parameters"])),
        check_path=reader.blob_path(folder, checks),
        abi=present(row["abi"]),
        driver=str(point["driver"]),
        workers=int(point["workers"]),
        parameter_bytes=present(row["parameter_bytes"]),
        meters=target.meters,
        integer=str(point["weight_format"]).startswith("int"),
        tolerance=max(TOLERANCE[str(point["weight_format"])], TOLERANCE[str(point["kv_dtype"])]),
    )


def _with_quality(measured: Measurement, row: Row) -> Measurement:
    scored = {n: number(row, n) for n, cell in row.items() if is_quality(n) and cell is not None}
    kept = {n: Reading(found, found, found, ()) for n, found in scored.items()}
    notes = {k: v for k, v in measured.notes.items() if k != KEPT}
    absent = (row["notes"] or {}).get(KEPT)
    return replace(
        measured, readings={**measured.readings, **kept}, notes={**notes, **({KEPT: absent} if absent else {})}
    )
