"""Write a catalog: one short transaction for each finished item, so that an interruption loses at most one."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Unpack

from sqlalchemy import delete, select, update
from sqlalchemy.dialects.postgresql import Insert
from sqlalchemy.dialects.postgresql import insert as upsert  # its ON CONFLICT clause works for SQLite too
from sqlalchemy.orm import Session

from llmbuild import digest
from llmbuild.catalog import history, locks
from llmbuild.catalog import tables as t
from llmbuild.catalog.known import Known, State
from llmbuild.catalog.names import Owner, Ranking, Registered
from llmbuild.catalog.schema import BUSY_SECONDS, begin_writing, database_errors, now, open_engine
from llmbuild.digest import plain
from llmbuild.spec.load_curve import LoadCurve
from llmbuild.spec.load_curve import row_of as row_of_curve
from llmbuild.spec.machine import NOWHERE
from llmbuild.spec.measurement import Measurement, row_of
from llmbuild.spec.program import Program
from llmbuild.spec.space import Point
from llmbuild.spec.trial import FAILED, UNDECIDED, Standing, Trial
from llmbuild.spec.variant import Artifact, Failure
from llmbuild.system.strict_json import JsonObject

NOT_TOLD = Ranking()
IMPORTS = ".imports"
"""Folder of a catalog with the imports that are under way."""
COMPILED = "compiled, and never measured"
OF_TEXT = ("tokenizer", "chat")
"""Columns with the blobs that texts need."""
_NOWHERE = {"digest": NOWHERE, "name": "none yet", "body": {}}


class Catalog(Known):
    """A catalog open for writing. Blobs are added first, then the row that refers to them.

    All open catalogs share a lock, so that `gc`, which opens it exclusively, never removes a blob of a running build.
    One class: only it writes to a catalog, with a method for each kind of row; `history` has the reads of many rows.
    """

    def __init__(self, folder: Path, alone: bool = False) -> None:
        super().__init__(folder)
        self.engine = open_engine(folder)
        with database_errors(folder):
            using = locks.take(folder / ".using", alone, BUSY_SECONDS)
        self._release = weakref.finalize(self, os.close, using)

    @contextlib.contextmanager
    def session(self, write: bool = False) -> Iterator[Session]:
        """Open a transaction; write transactions are serialized and atomic."""
        with database_errors(self.folder), Session(self.engine) as session:
            if write:
                begin_writing(session.connection())
            yield session
            if write:
                session.commit()

    def close(self) -> None:
        """Release the database and the locks."""
        self.engine.dispose()
        self._release()

    def making(self, key: str, waiting: Callable[[], None] | None = None) -> contextlib.AbstractContextManager[None]:
        """Hold the lock of one item to be made: a second process waits, and then finds it."""
        return locks.held(self.folder / locks.FOLDER / key, waiting)

    def importing(self, key: str) -> Path:
        """Return the folder in which an import is made: one that was interrupted goes on there."""
        folder = self.folder.absolute() / IMPORTS / key
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Hold the measuring lock: builds of one catalog compile in parallel but measure in turn."""
        with locks.held(self.folder / ".measuring"):
            yield

    # --- programs ------------------------------------------------------------------------------------------------

    def record_import(self, key: str, inputs: Mapping[str, object], program: Program, seconds: float) -> None:
        """Record the result of an import."""
        name = digest.of(program)
        row = {
            "digest": name,
            "module": program.module,
            "parameters": program.parameters,
            "checks": program.check,
            "parameter_bytes": self.blobs.path(program.parameters).stat().st_size,
            "abi": plain(program.abi),
        }
        with self.session(write=True) as session:
            session.execute(upsert(t.ProgramRow).values(row).on_conflict_do_nothing())
            _made(session, program.module, program.parameters, program.check)
            values = {"key": key, "inputs": plain(inputs), "program": name, "seconds": seconds, "created_at": now()}
            _replace(session, t.ImportRow, values)

    def parameters_of(self, program: str) -> str | None:
        """Return the digest of a program's parameter archive."""
        with self.session() as session:
            return session.execute(select(t.ProgramRow.parameters).where(t.ProgramRow.digest == program)).scalar()

    def find_reference(self, key: str) -> str | None:
        """Return the blob of an earlier reference."""
        with self.session() as session:
            blob = session.execute(select(t.ReferenceRow.blob).where(t.ReferenceRow.key == key)).scalar()
        return blob if blob and self.blobs.intact(blob) else None

    def record_reference(self, key: str, inputs: Mapping[str, object], blob: str) -> None:
        """Record the logits of the library's own model."""
        values = {"key": key, "blob": blob, "inputs": plain(inputs), "created_at": now()}
        with self.session(write=True) as session:
            _replace(session, t.ReferenceRow, values)

    def found_again(self, blobs: Iterable[str]) -> None:
        """Record that missing blobs are present again."""
        with self.session(write=True) as session:
            _made(session, *blobs)

    # --- artifacts -----------------------------------------------------------------------------------------------

    def record_compile(self, key: str, inputs: Mapping[str, object], artifact: Artifact, seconds: float) -> None:
        """Record the result of a compile."""
        with self.session(write=True) as session:
            row = {
                "digest": artifact.digest,
                "size_bytes": artifact.size_bytes,
                "runtime": artifact.runtime,
                "created_at": now(),
            }
            session.execute(upsert(t.ArtifactRow).values(row).on_conflict_do_nothing())
            _made(session, artifact.digest)
            values = {
                "key": key,
                "inputs": plain(inputs),
                "artifact": artifact.digest,
                "seconds": seconds,
                "created_at": now(),
            }
            _replace(session, t.CompileRow, values)

    # --- trials --------------------------------------------------------------------------------------------------

    def register(self, job: Registered) -> None:
        """Record target, machine and toolchain of a build; known ones cost one read."""
        self._keep(t.TargetRow, {"digest": job.target_digest, "name": job.target.name, "body": plain(job.target)})
        self._keep(
            t.MachineRow, {"digest": job.machine_digest, "name": job.machine.describe(), "body": plain(job.machine)}
        )
        self._keep(t.ToolchainRow, {"digest": job.toolchain_digest, "body": plain(job.toolchain)})

    def _keep(self, table: type[t.Base], row: Mapping[str, object]) -> None:
        with self.session() as session:
            known = session.get(table, row["digest"]) is not None
        if not known:
            with self.session(write=True) as session:
                session.execute(upsert(table).values(row).on_conflict_do_nothing())

    def record_trial(self, trial: Trial, owner: Owner) -> None:
        """Record one finished trial: the variant, its measurements or its failure, in one transaction."""
        with self.session(write=True) as session:
            session.execute(_variant_upsert(trial, owner))
            failure = self._add_failure(session, trial, owner.model) if trial.failure else None
            for measurement in trial.measurements:
                session.execute(_measurement_upsert(trial.scope, measurement))
            row = {
                "scope": trial.scope,
                "point": digest.of(trial.point.as_dict()),
                "number": trial.number,
                "variant": trial.variant,
                "failure": failure,
                "seconds": trial.seconds,
                "created_at": now(),
            }
            session.execute(
                upsert(t.TrialRow).values(row).on_conflict_do_update(index_elements=["scope", "point"], set_=row)
            )

    def record_failure(self, model: str, variant: str | None, failure: Failure) -> None:
        """Record a failure without a trial, such as that of a plain compile."""
        with self.session(write=True) as session:
            session.add(_failure_row(model, variant, failure))

    def _add_failure(self, session: Session, trial: Trial, model: str) -> int:
        assert trial.failure is not None
        row = _failure_row(model, trial.variant, trial.failure)
        session.add(row)
        session.flush()
        return row.id

    def record_compiled(self, trial: Trial, owner: Owner, workloads: Sequence[str], unmade: str = "") -> None:
        """Record a compiled variant, and make it visible to a loader; a variant with measurements is unchanged.

        A variant that could not be compiled has the standing failed. `unmade` is this variant's name in an earlier
        failure. Compiled variants of earlier inputs, or of another model with this name, lose their standing.
        """
        row = {"model": owner.model, "target": owner.target, "variant": trial.variant, "measurement": None}
        row |= {"source": owner.source, **({name: getattr(owner, name) for name in OF_TEXT} if owner.source else {})}
        told = {"status": UNDECIDED, "reason": COMPILED}
        if trial.failure:
            told = {"status": FAILED, "reason": f"{trial.failure.stage}: {trial.failure.reason}"}
        with self.session(write=True) as session:
            session.execute(_variant_upsert(trial, owner))
            failure = self._add_failure(session, trial, owner.model) if trial.failure else None
            _retire(session, owner.model, owner.source)
            _give_chat(session, owner.model, owner.source, owner.chat)
            _retire_compiled(session, owner.model, owner.target, {owner.lineage})
            nowhere = (t.StandingRow.machine == NOWHERE, t.StandingRow.status == FAILED)
            gone = t.StandingRow.variant.in_({unmade, trial.variant})
            session.execute(delete(t.StandingRow).where(t.StandingRow.model == owner.model, *nowhere, gone))
            same = (t.StandingRow.variant == trial.variant, t.StandingRow.model == owner.model)
            known = set(session.scalars(select(t.StandingRow.workload).where(*same)))
            session.execute(upsert(t.MachineRow).values(_NOWHERE).on_conflict_do_nothing())
            for workload in sorted(set(workloads) - known):
                session.add(t.StandingRow(**row, **told, workload=workload, machine=NOWHERE, failure=failure))

    def compiled(self, lineage: str) -> list[Point]:
        """Return the points of a lineage that have an artifact, oldest first."""
        with self.session() as session:
            return history.compiled(session, lineage)

    def update_measurement(self, scope: str, measurement: Measurement) -> None:
        """Replace a measurement by a longer one of the same key."""
        with self.session(write=True) as session:
            session.execute(_measurement_upsert(scope, measurement))

    def trials(self, scope: str) -> list[Trial]:
        """Return the finished trials of a scope, in the order in which they were made."""
        with self.session() as session:
            return history.trials(session, scope)

    def measurements(self, scope: str, variant: str, machine: str) -> list[Measurement]:
        """Return the measurements of a variant on a machine, one for each workload."""
        with self.session() as session:
            return history.measurements(session, scope, variant, machine)

    def trials_elsewhere(self, scope: str, backend: str, at_most: int) -> list[list[Trial]]:
        """Return the finished trials of a backend's other scopes (models, targets, machines), the latest first."""
        with self.session() as session:
            others = [other for other in history.scopes(session, backend, at_most + 1) if other != scope][:at_most]
            return [history.trials(session, other) for other in others]

    def scopes_of(self, model: str) -> dict[str, str]:
        """Return the scopes of a model's builds, the latest first, each with the name of its target."""
        with self.session() as session:
            return history.scopes_of(session, model)

    def find_limits(self, machine: str) -> JsonObject | None:
        """Return the measured limits of a machine."""
        with self.session() as session:
            return session.execute(select(t.LimitRow.body).where(t.LimitRow.machine == machine)).scalar()

    def record_limits(self, machine: str, body: object) -> None:
        """Record a machine's limits."""
        values = {"machine": machine, "body": plain(body), "created_at": now()}
        with self.session(write=True) as session:
            session.execute(
                upsert(t.LimitRow).values(values).on_conflict_do_update(index_elements=["machine"], set_=values)
            )

    def record_load_curve(self, curve: LoadCurve) -> None:
        """Record a load curve in place of an earlier one of the same artifact, settings and machine."""
        with self.session(write=True) as session:
            _replace(session, t.LoadCurveRow, {**row_of_curve(curve), "created_at": now()})

    # --- builds and standings ------------------------------------------------------------------------------------

    def record_build(
        self, key: str, model: str, scope: str, inputs: Mapping[str, object], **state: Unpack[State]
    ) -> None:
        """Record the progress of a build; `state` holds `seconds`, `raced` and `ended`."""
        values = {"key": key, "model": model, "scope": scope, "inputs": plain(inputs), "created_at": now(), **state}
        with self.session(write=True) as session:
            _replace(session, t.BuildRow, values)

    def reset_build(self, key: str) -> None:
        """Delete the progress of a build."""
        with self.session(write=True) as session:
            session.execute(delete(t.BuildRow).where(t.BuildRow.key == key))

    def fronts_elsewhere(self, model: str, target: str) -> list[Point]:
        """Return the points of other models' and targets' fronts, those of this target and of many fronts first."""
        with self.session() as session:
            return history.fronts_elsewhere(session, model, target)

    def add_standing(self, model: str, names: Registered, standing: Standing) -> None:
        """Add or replace one standing, without changing those of other machines."""
        row = {"model": model, "target": names.target_digest, "machine": names.machine_digest, **plain(standing)}
        keys = ["model", "target", "machine", "workload", "variant"]
        same = (t.StandingRow.model == model, t.StandingRow.variant == standing.variant)
        with self.session(write=True) as session:
            columns = [getattr(t.StandingRow, name) for name in ("source", *OF_TEXT)]
            known = session.execute(select(*columns).where(*same, t.StandingRow.source.is_not(None))).first()
            row |= dict.fromkeys(("source", *OF_TEXT)) if known is None else known._mapping
            session.execute(upsert(t.StandingRow).values(row).on_conflict_do_update(index_elements=keys, set_=row))

    def record_standings(
        self,
        model: str,
        target: str,
        machine: str,
        standings: list[Standing],
        by: Ranking = NOT_TOLD,
    ) -> None:
        """Replace the standings of a recipe on a target and machine, atomically: these are the current ones.

        Standings of another source with this name are removed; the others get this chat template. The build becomes
        the latest one.
        """
        place = {"model": model, "target": target, "machine": machine}
        told = {name: getattr(by, name) for name in ("ranking", "source", *OF_TEXT)}
        rows = [{**place, **told, **plain(s), "failure": None} for s in standings]
        where = (t.StandingRow.model == model, t.StandingRow.target == target)
        known = t.StandingRow.variant.in_({s.variant for s in standings})
        with self.session(write=True) as session:
            session.execute(delete(t.StandingRow).where(*where, t.StandingRow.machine == machine))
            session.execute(delete(t.StandingRow).where(*where, t.StandingRow.machine == NOWHERE, known))
            _retire(session, model, by.source)
            _give_chat(session, model, by.source, by.chat)
            of = select(t.VariantRow.lineage).where(t.VariantRow.digest.in_({s.variant for s in standings}))
            _retire_compiled(session, model, target, set(session.scalars(of)))
            session.execute(update(t.BuildRow).where(t.BuildRow.key == by.build).values(created_at=now()))
            for row in rows:
                session.add(t.StandingRow(**row))


def _retire(session: Session, model: str, source: str | None) -> None:
    """Remove the standings of another model with this name."""
    if source is not None:
        session.execute(delete(t.StandingRow).where(t.StandingRow.model == model, t.StandingRow.source != source))


def _give_chat(session: Session, model: str, source: str | None, chat: str | None) -> None:
    """Give all standings of a model its chat template: a name has one, whatever machine a standing is of."""
    if source is not None:
        same = (t.StandingRow.model == model, t.StandingRow.source == source)
        session.execute(update(t.StandingRow).where(*same).values(chat=chat))


def _retire_compiled(session: Session, model: str, target: str, lineages: set[str]) -> None:
    """Remove the standings of compiled variants whose inputs are not those of these `lineages`."""
    mine = select(t.VariantRow.digest).where(t.VariantRow.lineage.in_(lineages))
    where = (t.StandingRow.model == model, t.StandingRow.target == target, t.StandingRow.machine == NOWHERE)
    if lineages:
        session.execute(delete(t.StandingRow).where(*where, t.StandingRow.variant.not_in(mine)))


def _made(session: Session, *blobs: str) -> None:
    """Record that blobs which may have been collected are present again."""
    session.execute(delete(t.CollectedRow).where(t.CollectedRow.digest.in_(blobs)))


def _replace(session: Session, table: type[t.Base], values: Mapping[str, object]) -> None:
    session.execute(upsert(table).values(values).on_conflict_do_update(index_elements=["key"], set_=values))


def _failure_row(model: str, variant: str | None, failure: Failure) -> t.FailureRow:
    return t.FailureRow(model=model, variant=variant, created_at=now(), **plain(failure))


def _variant_upsert(trial: Trial, owner: Owner) -> Insert:
    row = {
        "digest": trial.variant,
        "program": trial.program,
        "target": owner.target,
        "toolchain": owner.toolchain,
        "lineage": owner.lineage,
        "artifact": trial.artifact,
        "tokenizer": owner.tokenizer,
        "chat": owner.chat,
        "point": trial.point.as_dict(),
        "is_default": trial.is_default,
        "created_at": now(),
    }
    changed = {k: v for k, v in row.items() if k in ("program", "artifact", *OF_TEXT, "is_default", "lineage")}
    return upsert(t.VariantRow).values(row).on_conflict_do_update(index_elements=["digest"], set_=changed)


def _measurement_upsert(scope: str, m: Measurement) -> Insert:
    row = {**row_of(scope, m), "created_at": now()}
    return upsert(t.MeasurementRow).values(row).on_conflict_do_update(index_elements=["key"], set_=row)
