"""Measure a packed folder on this machine, and write the rows into its catalog: no network, compiler or SQLAlchemy.

A packed folder is a catalog's folder (`catalog.sqlite`, `blobs/`) and a job; `llmbuild merge FOLDER` adds the readings
to a catalog as rows of the machine that ran it.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic

from llmbuild import digest
from llmbuild.carry import seeded
from llmbuild.carry.peers import Peer, Versus, versus
from llmbuild.carry.table import Across, Line, Tables, as_json, text
from llmbuild.digest import plain
from llmbuild.errors import InputError
from llmbuild.process.child import Limits
from llmbuild.profiler import bandwidth, wire
from llmbuild.profiler.bench import Bench
from llmbuild.profiler.board_operators import board_operators
from llmbuild.profiler.child import ChildFailed
from llmbuild.profiler.live import Live
from llmbuild.profiler.meters.energy import CPU_DRIVERS
from llmbuild.profiler.protocol import Protocol, Subject
from llmbuild.profiler.readings import OPERATORS
from llmbuild.profiler.roofline import work
from llmbuild.profiler.serve import bench_of, unfit
from llmbuild.profiler.statistics import paired_ratio
from llmbuild.runtime import host
from llmbuild.runtime.reader import FILE, blob_path
from llmbuild.search.front import contenders, standings
from llmbuild.spec.machine import Machine
from llmbuild.spec.measurement import ESTIMATES, Measurement, Operator, Reading, row_of
from llmbuild.spec.program import abi_from
from llmbuild.spec.slo import ENERGY, parse_bound
from llmbuild.spec.space import Point
from llmbuild.spec.trial import FRONT, Standing, Trial
from llmbuild.spec.variant import Failure
from llmbuild.system.strict_json import JsonObject, loads
from llmbuild.system.terminal import guarded

Tell = Callable[[str], None]

JOB = "job.json"
RACE_S = 10.0
"""Least remaining seconds for a race."""
RACERS = 4
WINDOWS_S = 12.0
"""Seconds of each racer's energy windows on a board: a race has only as many racers as fit."""
STEP_S = 90.0
"""Seconds after which an unresponsive device is given up."""
PEER_S = 45.0
"""Least remaining seconds for PyTorch, which compiles its model first."""
SCREEN_S = 25.0
"""Least seconds for a variant's first measurement with several windows of energy; else it has one."""
LEADING = 2
"""Time shares of the first target of a model; each other target has one."""
AFTER = 0.4
"""Share of a model's time that is reserved for its targets in the same rounds, and for PyTorch."""
RACE = 0.4
"""Share of a target's time that is reserved for racing its survivors."""


class Run:
    """The jobs of a packed folder, on this machine, within so many seconds.

    One class: the clock, the catalog and the rows that are printed are shared by all of its steps.
    """

    def __init__(
        self, folder: Path, budget_s: float, tell: Tell, only: Sequence[str] = (), with_torch: bool = False
    ) -> None:
        self.folder, self.tell, self.with_torch = folder, tell, with_torch
        self.end = monotonic() + budget_s
        self.limits = Limits(seconds=STEP_S, until=self.end)
        self.machine = host.machine()
        self.rates: dict[str, float] = {}
        self.raced: list[Across] = []
        self.versus: list[Versus] = []
        try:
            jobs: list[JsonObject] = loads((folder / JOB).read_text())["jobs"]
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{folder / JOB}: not a job of a packed folder: {error}") from None
        models = list(dict.fromkeys(body["model"] for body in jobs))
        if unknown := sorted(set(only) - set(models)):
            raise InputError(f"the folder holds no {', '.join(unknown)}; it holds {', '.join(models)}")
        self.jobs = [body for body in jobs if not only or body["model"] in only]

    def all(self) -> list[Line]:
        """Run every job that this machine supports; its lines list the omissions.

        The remaining time is divided equally among the remaining models. Within a model it goes first to its targets,
        twice as much to the first as to each other, then to the best of all of them and to PyTorch.
        """
        models = list(dict.fromkeys(body["model"] for body in self.jobs))
        lines: list[Line] = []
        for left, model in zip(range(len(models), 0, -1), models, strict=True):
            bodies = [body for body in self.jobs if body["model"] == model]
            lines += self._model(bodies, monotonic() + (self.end - monotonic()) / left)
        return lines

    def _model(self, bodies: Sequence[JsonObject], end: float) -> list[Line]:
        begin, shares = monotonic(), LEADING + len(bodies) - 1
        compared = len(bodies) > 1 or self.with_torch or self._on_board(bodies)
        last = end - AFTER * (end - begin) if compared else end
        lines: list[Line] = []
        for number, body in enumerate(bodies):
            mine = LEADING if number == 0 else 1
            lines += self._job(body, monotonic() + max(0.0, last - monotonic()) * mine / shares)
            shares -= mine
        raced = self.across(lines, end)
        self.raced += raced
        if self._with_peers(lines):
            self._peers(lines, {a.variant for a in raced[:1]}, end)
        return lines

    def across(self, lines: Sequence[Line], end: float) -> list[Across]:
        """Race the best variant of each target in the same rounds, the fastest first; nothing for a single target."""
        best: dict[str, Line] = {}
        for line in sorted((x for x in lines if x.measurement), key=lambda x: _time(x.measurement)):
            best.setdefault(line.target, line)
        left = end - monotonic() - (PEER_S if self._with_peers(lines) else 0.0)
        if len(best) < 2 or end - monotonic() < RACE_S:
            return []
        self.tell(f"the best of {', '.join(best)} in the same rounds")
        bodies = {one["subject"]["variant"]: (body, one) for body in self.jobs for one in body["subjects"]}
        body = bodies[next(iter(best.values())).variant][0]
        bench = bench_of(_within(body["bench"], max(left, RACE_S), len(best)), self._where, limits=self.limits)
        try:
            subjects = [wire.subject_of(bodies[x.variant][1]["subject"], self._where) for x in best.values()]
            everyone = {s.variant for s in subjects}
            raced = {found[0].variant: found[0] for found in bench.race(subjects, lambda *_: everyone)}
        finally:
            bench.close()
        targets = {line.variant: line.target for line in best.values()}
        return _ranked(body["model"], targets, raced)

    @staticmethod
    def _on_board(bodies: Sequence[JsonObject]) -> bool:
        """Return whether any of the variants is for a GPU."""
        return any(one["subject"]["driver"] not in CPU_DRIVERS for body in bodies for one in body["subjects"])

    def _with_peers(self, lines: Sequence[Line]) -> bool:
        """Return whether PyTorch takes part: where requested, and where a GPU was measured."""
        done = {line.variant for line in lines if line.measurement}
        mine = [(b, one) for b in self.jobs for one in b["subjects"] if one["subject"]["variant"] in done]
        return (
            bool(mine)
            and (self.with_torch or any(one["subject"]["driver"] not in CPU_DRIVERS for _, one in mine))
            and any(b.get("shape") for b, _ in mine)
        )

    def _peers(self, lines: Sequence[Line], first: Collection[str], end: float) -> None:
        """Run PyTorch and the best variant in turns on the same shape, where this Python has PyTorch.

        The best variant is the `first` among the targets in the same rounds, else the fastest measured one.
        """
        measured = [line for line in lines if line.measurement]
        best = min(
            (line for line in measured if not first or line.variant in first), key=lambda line: _time(line.measurement)
        )
        body, one = next(
            (body, one)
            for body in self.jobs
            for one in body["subjects"]
            if (body["model"], body["target"], one["subject"]["variant"]) == (best.model, best.target, best.variant)
        )
        left_s = end - monotonic()
        if not body.get("shape") or left_s < PEER_S:
            self.tell(f"{best.model}: PyTorch is left out: {left_s:.0f} s were left, it takes {PEER_S:.0f}")
            return
        shape = self.folder / "shape.json"
        shape.write_text(json.dumps(body["shape"]))
        loads = wire.workloads_of(body["bench"])
        for left, load in zip(range(len(loads), 0, -1), loads, strict=True):
            named = Versus(best.model, load, "PyTorch", best.variant, f"{best.target}: {best.choices}")
            self.tell(f"{best.model}, {load.name}: PyTorch in turns with {named.choices}")
            self.versus += self._turns(one, shape, named, monotonic() + (end - monotonic()) / left)

    def _turns(self, one: JsonObject, shape: Path, named: Versus, end: float) -> list[Versus]:
        peer = Peer(self.folder / "torch_peer.py", shape, named.workload)
        live = Live(wire.subject_of(one["subject"], self._where), self.limits)
        try:
            live.open(1)
            live.warm(named.workload, 0.0)
            return versus(peer, live, named, end)
        except ChildFailed as error:
            self.tell(f"  left out: {error.failure.reason}")
            return []
        finally:
            live.child.close()
            peer.close()

    def _job(self, body: JsonObject, end: float) -> list[Line]:
        why = unfit(body["bench"]["target"], body["bench"]["runtime"])
        if why:
            self.tell(f"{body['model']} on {body['target']}: left out: {why}")
            return [self._line(body, one, why) for one in body["subjects"]]
        begin = monotonic()
        each_s = (end - begin) * (1 - RACE) / len(body["subjects"])
        bench = bench_of(
            _within(body["bench"], RACE * (end - begin), RACERS, each_s),
            self._where,
            self.machine,
            self.limits,
        )
        known: list[Trial] = []
        left: list[Line] = []
        rate, last, screened = None, 0.0, begin + (1 - RACE) * (end - begin)
        try:
            for number, one in enumerate(body["subjects"], 1):
                now = monotonic()
                if now > self.end or (known and now + last > screened):
                    left.append(self._line(body, one, "left out: the time was up"))
                    continue
                if why := self._draw(body, one):
                    self.tell(f"{body['model']} on {body['target']}: left out: {why}")
                    left.append(self._line(body, one, why))
                    continue
                rate = rate or self._bandwidth(body)
                trial = self._trial(bench, body, one, number, scope_of(body, self.machine), rate)
                if trial.failure and monotonic() >= self.end:  # the worker was ended, not the variant at fault
                    left.append(self._line(body, one, "left out: the time was up"))
                    continue
                known.append(trial)
                last = monotonic() - now
            known = self._timed(body, self._raced(bench, body, known, end), end)
        finally:
            bench.close()
            self._record(body, known)
        fronts = _fronts(known)
        return [*(self._found(body, trial, fronts.get(trial.variant, "")) for trial in known), *left]

    def _draw(self, body: JsonObject, one: JsonObject) -> str:
        """Draw a variant's weights from their seed where they were not packed; return why they cannot be used."""
        name = one["subject"]["parameters_path"]
        made, path = body.get("seeded", {}).get(name), self._where(name)
        if made is None or path.is_file():
            return ""
        begin = monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".part")
        seeded.put_together(made, self._where(made["rest"]), draft)
        if digest.of_file(draft) != name:
            draft.unlink()
            return f"weights drawn here are not {digest.short(name)}: pack again with the weights themselves"
        draft.replace(path)
        self.tell(f"{body['model']}: weights {digest.short(name)} drawn from their seed in {monotonic() - begin:.0f} s")
        return ""

    def _bandwidth(self, body: JsonObject) -> float | None:
        """Measure the read bandwidth of a target's device; None where that failed."""
        blob = body.get("bandwidth")
        if not blob or monotonic() > self.end:
            return None
        driver = next((d for one in body["subjects"] if (d := one["subject"]["driver"]) != "local-sync"), "local-sync")
        with TemporaryDirectory(prefix="llmbuild-") as name:
            found = bandwidth.measure(self._where(blob), driver, Path(name) / "bandwidth.json", until=self.end)
        if isinstance(found, Failure):
            self.tell(f"  no bandwidth: {found.reason}")
            return None
        self.tell(f"{body['model']} on {body['target']}: sums of rows read {found / 1e9:.1f} GB/s")
        self.rates[body["target"]] = found
        return found

    def _trial(
        self, bench: Bench, body: JsonObject, one: JsonObject, number: int, scope: str, rate: float | None
    ) -> Trial:
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

    def _raced(self, bench: Bench, body: JsonObject, known: list[Trial], end: float) -> list[Trial]:
        """Measure the best again in common rounds, if there is time."""
        alive = {s.variant for s in self._standings(body, known) if s.status in FRONT}
        leader = body["objectives"][0]
        racers = sorted((t for t in known if t.variant in alive), key=lambda t: _value(t, leader))[:RACERS]
        seconds = end - monotonic()
        if any(t.measurements[0].energy_source for t in racers):
            racers = racers[: max(2, int((seconds - RACE_S) / WINDOWS_S))]
        if len(racers) < 2 or seconds < RACE_S:
            return known
        bench.protocol = Protocol(**_within(body["bench"], seconds, len(racers))["protocol"])
        self.tell(f"{body['model']} on {body['target']}: {len(racers)} survivors in interleaved rounds")
        bodies = {one["subject"]["variant"]: one["subject"] for one in body["subjects"]}
        subjects: list[Subject] = [wire.subject_of(bodies[t.variant], self._where) for t in racers]
        left = partial(contenders, known)
        measured = bench.race(subjects, lambda found, reach: left(found, body["objectives"], reach))
        again = {found[0].variant: found for found in measured}
        rate = self.rates.get(body["target"])
        return [replace(t, measurements=_again(t, again.get(t.variant), bodies[t.variant], rate)) for t in known]

    def _timed(self, body: JsonObject, known: list[Trial], end: float) -> list[Trial]:
        """Time the operators of the fastest variant on a board; a note reports why it was skipped."""
        best = min((t for t in known if t.measurements), key=lambda t: _value(t, "tpot_s"), default=None)
        bodies = {one["subject"]["variant"]: one["subject"] for one in body["subjects"]}
        if best is None or bodies[best.variant]["driver"] in CPU_DRIVERS or monotonic() > end:
            return known
        subject = wire.subject_of(bodies[best.variant], self._where)
        found = board_operators(subject, self.folder / "torch_kernels.py", self.limits)
        if isinstance(found, Failure):
            self.tell(f"  operators: {found.reason}")
        return [replace(t, measurements=_with_operators(t, found)) if t is best else t for t in known]

    def _standings(self, body: JsonObject, known: Sequence[Trial]) -> list[Standing]:
        bounds = tuple(parse_bound(text) for text in body["bounds"])
        loads = wire.workloads_of(body["bench"])
        return [s for w in loads for s in standings(list(known), w.name, tuple(body["objectives"]), bounds)]

    def _where(self, name: str) -> Path:
        return blob_path(self.folder, name)

    # --- rows ----------------------------------------------------------------------------------------------------

    def _line(self, body: JsonObject, one: JsonObject, why: str) -> Line:
        return Line(body["model"], body["target"], one["choices"], one["subject"]["variant"], why)

    def _found(self, body: JsonObject, trial: Trial, front: str) -> Line:
        one = next(o for o in body["subjects"] if o["subject"]["variant"] == trial.variant)
        why = f"{trial.failure.stage}: {trial.failure.reason}" if trial.failure else ""
        return replace(self._line(body, one, why), measurement=next(iter(trial.measurements), None), front=front)

    def _record(self, body: JsonObject, known: Sequence[Trial]) -> None:
        """Record the results as rows of this machine, in one transaction."""
        on = self.machine
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
    trial: Trial, raced: tuple[Measurement, ...] | None, body: JsonObject, rate: float | None
) -> tuple[Measurement, ...]:
    """Return a race's readings in place of the first ones, where the variant took part."""
    if raced is None:
        return trial.measurements
    subject = wire.subject_of(body, Path)
    return tuple(_with_fraction(m, subject, rate) for m in raced)


def _with_fraction(measured: Measurement, subject: Subject, rate: float | None) -> Measurement:
    """Return a measurement with the share of the read bandwidth that a decode step reaches for its required bytes."""
    if rate is None:
        return measured
    done, tpot = work(abi_from(subject.abi), subject.parameter_bytes, measured.workload), measured.readings["tpot_s"]
    bytes_read = done.parameter_bytes + done.kv_bytes
    middle, low, high = (bytes_read / t / rate for t in (tpot.median, tpot.high, tpot.low))
    told = f"bandwidth is that of sums of rows by the same compiler: {rate / 1e9:.1f} GB/s"
    readings = {**measured.readings, "bandwidth_fraction": Reading(middle, low, high, ())}
    return replace(measured, readings=readings, notes={**measured.notes, "limits": told})


def _with_operators(trial: Trial, found: tuple[Operator, ...] | Failure) -> tuple[Measurement, ...]:
    if isinstance(found, Failure):
        return tuple(replace(m, notes={**m.notes, "operators": f"absent: {found.reason}"}) for m in trial.measurements)
    kept = [{k: v for k, v in m.notes.items() if k != "operators"} for m in trial.measurements]
    return tuple(
        replace(m, operators=found[:OPERATORS], notes=notes) for m, notes in zip(trial.measurements, kept, strict=True)
    )


def _fronts(known: Sequence[Trial]) -> dict[str, str]:
    """Return each variant's standing by time per token and energy; nothing where no energy was measured."""
    metered = [t for t in known if t.measurements and t.measurements[0].energy_source]
    metered = [t for t in metered if t.measurements[0].energy_source not in ESTIMATES]
    if not metered:
        return {}
    found = standings(metered, metered[0].measurements[0].workload.name, ("tpot_s", ENERGY), ())
    return {s.variant: s.status for s in found}


def _within(body: JsonObject, race_s: float, racers: int, each_s: float = SCREEN_S) -> JsonObject:
    """Return a bench whose races end within that many seconds, energy included, and whose screens last as requested.

    A racer's window of energy is long; none begins beyond the time that gives each racer one.
    """
    protocol = body["protocol"]
    times = {
        "race_seconds": min(protocol["race_seconds"], max(race_s - racers * WINDOWS_S, race_s / 3)),
        "race_energy_seconds": min(protocol["race_energy_seconds"], max(0.0, race_s - 2 * racers * WINDOWS_S)),
        "energy_windows": protocol["energy_windows"] if each_s >= SCREEN_S else 1,
    }
    return {**body, "protocol": {**protocol, **times}}


def _ranked(model: str, targets: Mapping[str, str], raced: Mapping[str, Measurement]) -> list[Across]:
    ordered = sorted(raced.values(), key=_time)
    found = []
    for m in ordered:
        both = list(zip(m.readings["tpot_s"].samples, ordered[0].readings["tpot_s"].samples, strict=False))
        ratio = paired_ratio([mine for mine, _ in both], [first for _, first in both])
        found.append(Across(model, targets[m.variant], m.variant, m.readings, ratio, m.energy))
    return found


def scope_of(body: JsonObject, machine: Machine) -> str:
    """Return the scope of the trials of a build of the same job on this machine."""
    return digest.of({**body["scope_inputs"], "machine": digest.of(machine)})


def _time(measured: Measurement | None) -> float:
    found = measured.readings.get("tpot_s") if measured else None
    return found.median if found else float("inf")


def _value(trial: Trial, metric: str) -> float:
    readings = trial.measurements[0].readings if trial.measurements else {}
    return readings[metric].median if metric in readings else float("inf")


def _insert(connection: sqlite3.Connection, table: str, row: Mapping[str, object]) -> int:
    cells = {n: json.dumps(v) if isinstance(v, (dict, list)) else v for n, v in row.items()}
    names, marks = ", ".join(f'"{n}"' for n in cells), ", ".join("?" * len(cells))
    done = connection.execute(f'INSERT OR REPLACE INTO "{table}" ({names}) VALUES ({marks})', list(cells.values()))
    return int(done.lastrowid or 0)


def _record_failure(connection: sqlite3.Connection, model: str, trial: Trial, now: str) -> int:
    return _insert(
        connection, "failure", {"model": model, "variant": trial.variant, "created_at": now, **plain(trial.failure)}
    )


def main(
    folder: str, budget_s: float, as_document: bool, tell: Tell, with_torch: bool = False, only: Sequence[str] = ()
) -> int:
    """Run a packed folder, or `only` some of its models, and print its tables; return 1 where nothing was measured.

    PyTorch takes part where a GPU was measured, or `with_torch`.
    """
    try:
        run = Run(Path(folder), budget_s, tell, only, with_torch)
    except InputError as error:
        tell(f"error: {error}")
        return error.exit_code
    begin = monotonic()
    lines = run.all()
    done = [line for line in lines if line.measurement is not None]
    found = Tables(run.machine, lines, run.raced, run.versus, run.rates)
    with guarded():
        print(as_json(found) if as_document else text(found))
    for told in sorted({m.notes["energy"] for line in done if (m := line.measurement) and "energy" in m.notes}):
        tell(f"energy: {told}")
    tell(f"{len(done)} of {len(lines)} variants measured in {monotonic() - begin:.0f} s; {budget_s:.0f} s were given")
    if not done:
        reasons = sorted({line.reason for line in lines})
        tell(f"error: nothing was measured: {'; '.join(reasons) or 'the folder holds no variant'}")
        return 1
    tell(f"take the folder home: `llmbuild merge {folder} -C CATALOG` adds these rows")
    return 0
