"""Measure a packed folder on this machine, and write the rows into its catalog: no network, compiler or SQLAlchemy.

A packed folder is a catalog's folder (`catalog.sqlite`, `blobs/`) with a job beside it; `llmbuild merge FOLDER` takes
the readings home as rows of the machine that ran it.
"""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

from llmbuild import digest
from llmbuild.digest import plain
from llmbuild.errors import InputError
from llmbuild.fleet import seeded
from llmbuild.fleet.table import Across, Line, across, as_json, table
from llmbuild.process import Limits
from llmbuild.profiler import bandwidth, nvml, wire
from llmbuild.profiler.bench import Bench
from llmbuild.profiler.energy import CPU_DRIVERS
from llmbuild.profiler.protocol import Subject
from llmbuild.profiler.roofline import work
from llmbuild.profiler.serve import bench_of, unfit
from llmbuild.profiler.statistics import paired_ratio
from llmbuild.runtime import host
from llmbuild.runtime.reader import FILE, blob_path
from llmbuild.search.front import contenders, standings
from llmbuild.spec.machine import Machine
from llmbuild.spec.measurement import Measurement, Reading, row_of
from llmbuild.spec.program import abi_from
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
STEP_S = 90.0
"""Seconds after which a device that does not answer is given up."""
PEER_S = 45.0
"""Seconds that must be left for PyTorch."""


class Run:
    """The jobs of a packed folder, on this machine, within so many seconds."""

    def __init__(self, folder: Path, budget_s: float, tell: Tell) -> None:
        self.folder, self.tell = folder, tell
        self.end = monotonic() + budget_s
        self.machine = host.machine()
        self._rates: dict[str, float] = {}
        try:
            self.jobs: list[Body] = json.loads((folder / JOB).read_text())["jobs"]
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{folder / JOB}: not a job of a packed folder: {error}") from None

    def all(self) -> list[Line]:
        """Run every job that this machine can; what is left out is told in its lines."""
        return [line for body in self.jobs for line in self._job(body)]

    def across(self, lines: Sequence[Line]) -> list[Across]:
        """Race the best variant of each target in the same rounds, the fastest first; nothing for only one."""
        best: dict[str, Line] = {}
        for line in sorted((x for x in lines if x.measurement), key=lambda x: _time(x.measurement)):
            best.setdefault(line.target, line)
        if len(best) < 2 or self.end - monotonic() < RACE_S:
            return []
        self.tell(f"the best of {', '.join(best)} in the same rounds")
        bodies = {one["subject"]["variant"]: (body, one) for body in self.jobs for one in body["subjects"]}
        body = bodies[next(iter(best.values())).variant][0]
        bench = bench_of(body["bench"], self._where)
        try:
            subjects = [wire.subject_of(bodies[x.variant][1]["subject"], self._where) for x in best.values()]
            everyone = {s.variant for s in subjects}
            raced = {found[0].variant: found[0] for found in bench.race(subjects, lambda *_: everyone)}
        finally:
            bench.close()
        targets = {line.variant: line.target for line in best.values()}
        return _ranked(targets, raced)

    def on_gpu(self, lines: Sequence[Line]) -> bool:
        """Say whether any of the variants ran on a GPU."""
        drivers = {one["subject"]["variant"]: one["subject"]["driver"] for b in self.jobs for one in b["subjects"]}
        return any(drivers[line.variant] not in CPU_DRIVERS for line in lines)

    def peers(self) -> list[Line]:
        """Time the same shape in PyTorch, where this Python has it, in what is left of the time."""
        if not any(body.get("shape") for body in self.jobs) or self.end - monotonic() < PEER_S:
            return []
        body = next(body for body in self.jobs if body.get("shape"))
        load = wire.workloads_of(body["bench"])[0]
        shape = self.folder / "shape.json"
        shape.write_text(json.dumps(body["shape"]))
        command = [sys.executable, str(self.folder / "torch_peer.py"), str(shape), str(load.prompt), str(load.output)]
        clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, env=clean, timeout=self.end - monotonic()
            )
            told = [json.loads(line) for line in done.stdout.splitlines()]
        except (subprocess.TimeoutExpired, ValueError):
            told, done = [], None
        if not told:
            why = done.stderr.strip().splitlines()[-1:] if done else ["the time was up"]
            self.tell(f"PyTorch is left out: {why[0] if why else 'it said nothing'}")
        return [_peer(body["model"], one) for one in told]

    def _job(self, body: Body) -> list[Line]:
        why = unfit(body["bench"]["target"], body["bench"]["runtime"]) or self._draw(body)
        if why:
            self.tell(f"{body['model']} on {body['target']}: left out: {why}")
            return [self._line(body, one, why) for one in body["subjects"]]
        machine = machine_of({one["subject"]["driver"] for one in body["subjects"]})
        bench = bench_of(body["bench"], self._where, machine, Limits(seconds=STEP_S))
        rate = self._bandwidth(body)
        known: list[Trial] = []
        left: list[Line] = []
        try:
            for number, one in enumerate(body["subjects"], 1):
                if monotonic() > self.end:
                    left.append(self._line(body, one, "left out: the time was up"))
                    continue
                known.append(self._trial(bench, body, one, number, scope_of(body, machine), rate))
            known = self._raced(bench, body, known)
        finally:
            bench.close()
            self._record(body, machine, known)
        return [*(self._found(body, trial) for trial in known), *left]

    def _draw(self, body: Body) -> str:
        """Draw weights that were not carried here from their seed; return why they cannot be used, or nothing."""
        for name, made in body.get("seeded", {}).items():
            path = self._where(name)
            if path.is_file():
                continue
            self.tell(f"{body['model']}: weights {digest.short(name)} are drawn from their seed")
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_suffix(".part")
            seeded.put_together(made, self._where(made["rest"]), draft)
            if digest.of_file(draft) != name:
                draft.unlink()
                return f"weights drawn here are not {digest.short(name)}: pack again with the weights themselves"
            draft.replace(path)
        return ""

    def _bandwidth(self, body: Body) -> float | None:
        """Measure how fast code for a target reads the memory of what it runs on; None where that failed."""
        blob = body.get("bandwidth")
        if not blob or monotonic() > self.end:
            return None
        driver = next((d for one in body["subjects"] if (d := one["subject"]["driver"]) != "local-sync"), "local-sync")
        with TemporaryDirectory(prefix="llmbuild-") as name:
            found = bandwidth.measure(self._where(blob), driver, Path(name) / "bandwidth.json")
        if isinstance(found, Failure):
            self.tell(f"  no bandwidth: {found.reason}")
            return None
        self.tell(f"{body['model']} on {body['target']}: sums of rows read {found / 1e9:.1f} GB/s")
        self._rates[body["target"]] = found
        return found

    def _trial(self, bench: Bench, body: Body, one: Body, number: int, scope: str, rate: float | None) -> Trial:
        self.tell(f"{body['model']} on {body['target']}: {one['choices']}")
        begin, subject = monotonic(), wire.subject_of(one["subject"], self._where)
        found = bench.measure(subject, baseline=one["default"])
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
            measurements=() if isinstance(found, Failure) else tuple(_with_fraction(m, subject, rate) for m in found),
            failure=found if isinstance(found, Failure) else None,
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
        rate = self._rates.get(body["target"])
        return [replace(t, measurements=_again(t, again.get(t.variant), bodies[t.variant], rate)) for t in known]

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


def _again(
    trial: Trial, raced: tuple[Measurement, ...] | None, body: Body, rate: float | None
) -> tuple[Measurement, ...]:
    """Return the readings of a race in place of the first ones, where the variant took part."""
    if raced is None:
        return trial.measurements
    subject = wire.subject_of(body, Path)
    return tuple(_with_fraction(m, subject, rate) for m in raced)


def _with_fraction(measured: Measurement, subject: Subject, rate: float | None) -> Measurement:
    """Return a measurement with the part of the read rate that a decode step makes of the bytes it must read."""
    if rate is None:
        return measured
    done, tpot = work(abi_from(subject.abi), subject.parameter_bytes, measured.workload), measured.readings["tpot_s"]
    bytes_read = done.parameter_bytes + done.kv_bytes
    middle, low, high = (bytes_read / t / rate for t in (tpot.median, tpot.high, tpot.low))
    told = f"bandwidth is that of sums of rows by the same compiler: {rate / 1e9:.1f} GB/s"
    readings = {**measured.readings, "bandwidth_fraction": Reading(middle, low, high, ())}
    return replace(measured, readings=readings, notes={**measured.notes, "limits": told})


def _ranked(targets: Mapping[str, str], raced: Mapping[str, Measurement]) -> list[Across]:
    ordered = sorted(raced.values(), key=_time)
    found = []
    for m in ordered:
        both = list(zip(m.readings["tpot_s"].samples, ordered[0].readings["tpot_s"].samples, strict=False))
        ratio = paired_ratio([mine for mine, _ in both], [first for _, first in both])
        found.append(Across(targets[m.variant], m.variant, _time(m), ratio))
    return found


def _peer(model: str, told: Body) -> Line:
    seconds: dict[str, float] = {name: float(told[name]) for name in ("tpot_s", "ttft_s") if name in told}
    return Line(model, "-", told["runtime"], "", told.get("reason", ""), None, seconds)


def machine_of(drivers: Collection[str]) -> Machine:
    """Return this machine as the drivers' readings are of it: with the GPU first, where one of them uses it."""
    here = host.machine()
    gpu = nvml.name() if "cuda" in drivers else ""
    return replace(here, chip=f"{gpu}; {here.chip}") if gpu else here


def scope_of(body: Body, machine: Machine) -> str:
    """Return what a build of the same job on this machine would call its trials' scope."""
    return digest.of({**body["scope_inputs"], "machine": digest.of(machine)})


def _time(measured: Measurement | None) -> float:
    found = measured.readings.get("tpot_s") if measured else None
    return found.median if found else float("inf")


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


def main(folder: str, budget_s: float, as_document: bool, tell: Tell, with_torch: bool = False) -> int:
    """Run a packed folder and print its table; return 0 where anything was measured, 1 where nothing was.

    PyTorch takes part where a GPU was measured, or `with_torch`.
    """
    try:
        run = Run(Path(folder), budget_s, tell)
    except InputError as error:
        tell(f"error: {error}")
        return error.exit_code
    begin = monotonic()
    lines = run.all()
    done = [line for line in lines if line.measurement is not None]
    raced = run.across(done)
    peers = run.peers() if with_torch or run.on_gpu(done) else []
    if as_document:
        print(as_json([*lines, *peers], raced))
    else:
        print(f"{run.machine.describe()}\n{table([*lines, *peers])}")
        print(f"in the same rounds:\n{across(raced)}" if raced else "", end="\n" if raced else "")
    for told in sorted({m.notes["energy"] for line in done if (m := line.measurement) and "energy" in m.notes}):
        tell(f"energy: {told}")
    tell(f"{len(done)} of {len(lines)} variants measured in {monotonic() - begin:.0f} s; {budget_s:.0f} s were given")
    if not done:
        reasons = sorted({line.reason for line in lines})
        tell(f"error: nothing was measured: {'; '.join(reasons) or 'the folder holds no variant'}")
        return 1
    tell(f"take the folder home: `llmbuild merge {folder} -C CATALOG` adds these rows")
    return 0
