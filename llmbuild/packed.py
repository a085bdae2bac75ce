"""Measure a packed folder on this machine, and write the rows into its catalog: no network, compiler or SQLAlchemy.

A packed folder is a catalog's folder (`catalog.sqlite`, `blobs/`) with a job beside it; `llmbuild merge FOLDER` takes
the readings home as rows of the machine that ran it.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

from llmbuild import digest
from llmbuild.digest import plain
from llmbuild.errors import InputError
from llmbuild.profiler import nvml, wire
from llmbuild.profiler.bench import Bench
from llmbuild.profiler.energy import CPU_DRIVERS
from llmbuild.profiler.protocol import Subject
from llmbuild.profiler.serve import bench_of, unfit
from llmbuild.runtime import host
from llmbuild.runtime.reader import FILE, blob_path
from llmbuild.search.front import contenders, standings
from llmbuild.spec.machine import Machine
from llmbuild.spec.measurement import Measurement, row_of
from llmbuild.spec.slo import parse_bound
from llmbuild.spec.space import Point
from llmbuild.spec.trial import FRONT, Standing, Trial
from llmbuild.spec.variant import Failure

Body = dict[str, Any]
Tell = Callable[[str], None]

JOB = "job.json"
RACE_S = 45.0
"""Seconds that must be left for the survivors of a target to be raced."""
RACERS = 4


@dataclass(frozen=True)
class Line:
    """One variant of the table: what came of it, or why nothing did."""

    model: str
    target: str
    choices: str
    variant: str
    reason: str
    measurement: Measurement | None = None


class Run:
    """The jobs of a packed folder, on this machine, within so many seconds."""

    def __init__(self, folder: Path, budget_s: float, tell: Tell) -> None:
        self.folder, self.tell = folder, tell
        self.end = monotonic() + budget_s
        self.machine = host.machine()
        try:
            self.jobs: list[Body] = json.loads((folder / JOB).read_text())["jobs"]
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{folder / JOB}: not a job of a packed folder: {error}") from None

    def all(self) -> list[Line]:
        """Run every job that this machine can; what is left out is told in its lines."""
        return [line for body in self.jobs for line in self._job(body)]

    def _job(self, body: Body) -> list[Line]:
        why = self._unfit(body)
        if why:
            self.tell(f"{body['model']} on {body['target']}: left out: {why}")
            return [self._line(body, one, why) for one in body["subjects"]]
        machine = machine_of({one["subject"]["driver"] for one in body["subjects"]})
        bench = bench_of(body["bench"], self._where, machine)
        known: list[Trial] = []
        left: list[Line] = []
        try:
            for number, one in enumerate(body["subjects"], 1):
                if monotonic() > self.end:
                    left.append(self._line(body, one, "left out: the time was up"))
                    continue
                known.append(self._trial(bench, body, one, number, scope_of(body, machine)))
            known = self._raced(bench, body, known)
        finally:
            bench.close()
            self._record(body, machine, known)
        return [*map(partial(self._found, body), known), *left]

    def _unfit(self, body: Body) -> str:
        found = unfit(body["bench"]["target"], body["bench"]["runtime"])
        drivers = {one["subject"]["driver"] for one in body["subjects"]}
        return next((why for why in map(device_lacks, sorted(drivers)) if why), found)

    def _trial(self, bench: Bench, body: Body, one: Body, number: int, scope: str) -> Trial:
        self.tell(f"{body['model']} on {body['target']}: {one['choices']}")
        begin, subject = monotonic(), wire.subject_of(one["subject"], self._where)
        found = bench.measure(subject, baseline=one["default"])
        failed = isinstance(found, Failure)
        if isinstance(found, Failure):
            self.tell(f"  {found.stage} failed: {found.reason}")
        return Trial(
            scope=scope,
            number=number,
            point=Point.of(one["point"]),
            variant=subject.variant,
            is_default=one["default"],
            program=one["program"],
            artifact=subject.artifact,
            artifact_bytes=subject.artifact_path.stat().st_size,
            parameter_bytes=subject.parameter_bytes,
            measurements=() if failed else tuple(found),  # type: ignore[arg-type]
            failure=found if failed else None,  # type: ignore[arg-type]
            seconds=monotonic() - begin,
        )

    def _raced(self, bench: Bench, body: Body, known: list[Trial]) -> list[Trial]:
        """Measure the best again in common rounds, where there is time for it."""
        alive = {s.variant for s in self._standings(body, known) if s.status in FRONT}
        leader = body["objectives"][0]
        racers = sorted((t for t in known if t.variant in alive), key=lambda t: _value(t, leader))[:RACERS]
        if len(racers) < 2 or self.end - monotonic() < RACE_S:
            return known
        self.tell(f"{body['model']} on {body['target']}: {len(racers)} survivors in interleaved rounds")
        bodies = {one["subject"]["variant"]: one["subject"] for one in body["subjects"]}
        subjects: list[Subject] = [wire.subject_of(bodies[t.variant], self._where) for t in racers]
        left = partial(contenders, known)
        measured = bench.race(subjects, lambda found, reach: left(found, body["objectives"], reach))
        again = {found[0].variant: found for found in measured}
        return [replace(t, measurements=again.get(t.variant, t.measurements)) for t in known]

    def _standings(self, body: Body, known: Sequence[Trial]) -> list[Standing]:
        bounds = tuple(parse_bound(text) for text in body["bounds"])
        loads = wire.workloads_of(body["bench"])
        return [s for w in loads for s in standings(list(known), w.name, tuple(body["objectives"]), bounds)]

    def _where(self, name: str) -> Path:
        return blob_path(self.folder, name)

    # --- rows ----------------------------------------------------------------------------------------------------

    def _line(self, body: Body, one: Body, why: str) -> Line:
        return Line(body["model"], body["target"], one["choices"], one["subject"]["variant"], why)

    def _found(self, body: Body, trial: Trial) -> Line:
        one = next(o for o in body["subjects"] if o["subject"]["variant"] == trial.variant)
        why = f"{trial.failure.stage}: {trial.failure.reason}" if trial.failure else ""
        return replace(self._line(body, one, why), measurement=next(iter(trial.measurements), None))

    def _record(self, body: Body, on: Machine, known: Sequence[Trial]) -> None:
        """Write what was found as rows of this machine, all in one transaction."""
        machine, scope, now = digest.of(on), scope_of(body, on), datetime.now(UTC).isoformat()
        with sqlite3.connect(self.folder / FILE) as connection:
            put = partial(_insert, connection)
            put("machine", {"digest": machine, "name": on.describe(), "body": plain(on)})
            for trial in known:
                failed = _record_failure(connection, body["model"], trial, now) if trial.failure else None
                for measurement in trial.measurements:
                    put("measurement", {**row_of(scope, measurement), "created_at": now})
                place = {"scope": scope, "point": digest.of(trial.point.as_dict()), "variant": trial.variant}
                took = {"number": trial.number, "failure": failed, "seconds": trial.seconds, "created_at": now}
                put("trial", {**place, **took})
            where = {"model": body["model"], "target": body["target_digest"], "machine": machine}
            for standing in self._standings(body, known):
                put("standing", {**where, **plain(standing), "failure": None})
        connection.close()


def machine_of(drivers: Collection[str]) -> Machine:
    """Return this machine as the drivers' readings are of it: with the GPU first, where one of them uses it."""
    here = host.machine()
    gpu = nvml.name() if "cuda" in drivers else ""
    return replace(here, chip=f"{gpu}; {here.chip}") if gpu else here


def scope_of(body: Body, machine: Machine) -> str:
    """Return what a build of the same job on this machine would call its trials' scope."""
    return digest.of({**body["scope_inputs"], "machine": digest.of(machine)})


def device_lacks(driver: str) -> str:
    """Return why this machine has no device for an IREE driver; empty where it has."""
    if driver in CPU_DRIVERS:
        return ""
    import iree.runtime as rt

    name = {"cuda": "NVIDIA driver", "hip": "AMD driver", "vulkan": "Vulkan loader"}.get(driver, f"{driver} driver")
    try:
        found = rt.get_driver(driver).query_available_devices()
    except (RuntimeError, ValueError):
        return f"no {name} on this machine"
    return "" if found else f"no device behind the {name} of this machine"


def _value(trial: Trial, metric: str) -> float:
    readings = trial.measurements[0].readings if trial.measurements else {}
    return readings[metric].median if metric in readings else float("inf")


def _insert(connection: sqlite3.Connection, table: str, row: Mapping[str, Any]) -> int:
    cells = {n: json.dumps(v) if isinstance(v, (dict, list)) else v for n, v in row.items()}
    names, marks = ", ".join(f'"{n}"' for n in cells), ", ".join("?" * len(cells))
    done = connection.execute(f'INSERT OR REPLACE INTO "{table}" ({names}) VALUES ({marks})', list(cells.values()))
    return int(done.lastrowid or 0)


def _record_failure(connection: sqlite3.Connection, model: str, trial: Trial, now: str) -> int:
    return _insert(
        connection, "failure", {"model": model, "variant": trial.variant, "created_at": now, **plain(trial.failure)}
    )


def cell(measurement: Measurement | None, metric: str, scale: float = 1.0) -> str:
    """Return a figure for people, `-` where it is absent."""
    found = measurement.readings.get(metric) if measurement else None
    return "-" if found is None else f"{found.median * scale:.4g}"


HEADER = ("model", "target", "tpot_ms", "ttft_ms", "load_ms", "J/token", "idle_W", "of_bandwidth", "top1", "choices")


def table(lines: Sequence[Line]) -> str:
    """Return the table, ranked by time per token; what was left out comes last, with the reason."""
    ranked = sorted(lines, key=lambda line: _time(line.measurement))
    rows = [HEADER, *(_cells(line) for line in ranked)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _time(measurement: Measurement | None) -> float:
    found = measurement.readings.get("tpot_s") if measurement else None
    return found.median if found else float("inf")


def _cells(line: Line) -> tuple[str, ...]:
    m = line.measurement
    idle = (m.energy or {}).get("idle_w") if m else None
    return (
        line.model,
        line.target,
        cell(m, "tpot_s", 1e3),
        cell(m, "ttft_s", 1e3),
        cell(m, "load_s", 1e3),
        cell(m, "energy_j_per_token"),
        "-" if idle is None else f"{idle:.4g}",
        cell(m, "bandwidth_fraction"),
        cell(m, "quality_top1"),
        f"{line.choices}: {line.reason}" if line.reason else line.choices,
    )


def as_json(lines: Sequence[Line]) -> str:
    """Return the table as one JSON document."""
    machine = host.machine()
    rows = [{**vars(line), "measurement": plain(line.measurement) if line.measurement else None} for line in lines]
    return json.dumps({"machine": plain(machine), "rows": rows})


def main(folder: str, budget_s: float, as_document: bool, tell: Tell) -> int:
    """Run a packed folder and print its table; return 0 where anything was measured, 1 where nothing was."""
    try:
        run = Run(Path(folder), budget_s, tell)
    except InputError as error:
        tell(f"error: {error}")
        return error.exit_code
    begin = monotonic()
    lines = run.all()
    print(as_json(lines) if as_document else f"{run.machine.describe()}\n{table(lines)}")
    done = [line for line in lines if line.measurement is not None]
    meters = {line.measurement.notes.get("energy", "") for line in done if line.measurement} - {""}
    for told in sorted(meters):
        tell(f"energy: {told}")
    tell(f"{len(done)} of {len(lines)} variants measured in {monotonic() - begin:.0f} s; {budget_s:.0f} s were given")
    if not done:
        reasons = sorted({line.reason for line in lines})
        tell(f"error: nothing was measured: {'; '.join(reasons) or 'the folder holds no variant'}")
        return 1
    tell(f"take the folder home: `llmbuild merge {folder} -C CATALOG` adds these rows")
    return 0
