"""Read recorded trials as objects."""

from __future__ import annotations

from collections import Counter, defaultdict

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from llmbuild.catalog import tables as t
from llmbuild.spec.measurement import Measurement, Operator, Reading
from llmbuild.spec.space import Point
from llmbuild.spec.trial import Trial
from llmbuild.spec.variant import Failure
from llmbuild.spec.workload import Workload


def trials(session: Session, scope: str) -> list[Trial]:
    """Return the finished trials of a scope, in order."""
    measured: dict[str, list[Measurement]] = defaultdict(list)
    for row in session.scalars(select(t.MeasurementRow).where(t.MeasurementRow.scope == scope)):
        measured[row.variant].append(_measurement(row))
    found = session.execute(
        select(t.TrialRow, t.VariantRow, t.FailureRow, t.ArtifactRow.size_bytes, t.ProgramRow.parameter_bytes)
        .join(t.VariantRow, t.VariantRow.digest == t.TrialRow.variant)
        .outerjoin(t.FailureRow, t.FailureRow.id == t.TrialRow.failure)
        .outerjoin(t.ArtifactRow, t.ArtifactRow.digest == t.VariantRow.artifact)
        .outerjoin(t.ProgramRow, t.ProgramRow.digest == t.VariantRow.program)
        .where(t.TrialRow.scope == scope)
        .order_by(t.TrialRow.number)
    )
    return [_trial(*row, measured=measured) for row in found]


def measurements(session: Session, scope: str, variant: str, machine: str) -> list[Measurement]:
    """Return the measurements of a variant on a machine within a scope."""
    mine = (t.MeasurementRow.scope == scope, t.MeasurementRow.variant == variant, t.MeasurementRow.machine == machine)
    return [_measurement(row) for row in session.scalars(select(t.MeasurementRow).where(*mine))]


def scopes(session: Session, backend: str, at_most: int) -> list[str]:
    """Return the scopes that have trials for a backend, the latest first."""
    latest = func.max(t.TrialRow.created_at)
    rows = (
        select(t.TrialRow.scope)
        .join(t.VariantRow, t.VariantRow.digest == t.TrialRow.variant)
        .join(t.TargetRow, t.TargetRow.digest == t.VariantRow.target)
        .where(t.TargetRow.body["backend"].as_string() == backend)
        .group_by(t.TrialRow.scope)
        .order_by(latest.desc(), t.TrialRow.scope)
    )
    return list(session.scalars(rows.limit(at_most)))


def scopes_of(session: Session, model: str) -> dict[str, str]:
    """Return the scopes of a model's builds, the latest first, each with the name of its target."""
    rows = session.execute(
        select(t.BuildRow.scope, t.TargetRow.name, func.max(t.BuildRow.created_at).label("latest"))
        .join(t.TrialRow, t.TrialRow.scope == t.BuildRow.scope)
        .join(t.VariantRow, t.VariantRow.digest == t.TrialRow.variant)
        .join(t.TargetRow, t.TargetRow.digest == t.VariantRow.target)
        .where(t.BuildRow.model == model)
        .group_by(t.BuildRow.scope, t.TargetRow.name)
        .order_by(func.max(t.BuildRow.created_at).desc(), t.BuildRow.scope)
    )
    return {scope: target for scope, target, _ in rows}


def fronts_elsewhere(session: Session, model: str, target: str) -> list[Point]:
    """Return the points of other models' and targets' fronts, those of this target and of many fronts first."""
    rows = session.execute(
        select(t.VariantRow.point, t.StandingRow.target)
        .join(t.StandingRow, t.StandingRow.variant == t.VariantRow.digest)
        .where(t.StandingRow.status == "pareto")
        .where((t.StandingRow.model != model) | (t.StandingRow.target != target))
        .order_by(t.VariantRow.created_at)
    ).all()
    count = Counter(Point.of(body) for body, _ in rows)
    near = {Point.of(body) for body, of in rows if of == target}
    return sorted(count, key=lambda point: (point not in near, -count[point]))


def _trial(
    row: t.TrialRow,
    variant: t.VariantRow,
    failure: t.FailureRow | None,
    artifact_bytes: int | None,
    parameter_bytes: int | None,
    measured: dict[str, list[Measurement]],
) -> Trial:
    told = Failure(failure.stage, failure.reason, failure.command, failure.log, failure.lasting) if failure else None  # type: ignore[arg-type]
    return Trial(
        scope=row.scope,
        number=row.number,
        point=Point.of(variant.point),
        variant=variant.digest,
        is_default=variant.is_default,
        program=variant.program,
        artifact=variant.artifact,
        artifact_bytes=artifact_bytes,
        parameter_bytes=parameter_bytes,
        measurements=() if told else tuple(sorted(measured[variant.digest], key=lambda m: m.workload.name)),
        failure=told,
        seconds=row.seconds,
    )


def _measurement(row: t.MeasurementRow) -> Measurement:
    readings = {}
    for name, (low, high) in row.intervals.items():
        samples = tuple(row.samples.get(name, ()))
        median = getattr(row, name)
        if median is not None:
            readings[name] = Reading(median, low, high, samples)
    return Measurement(
        key=row.key,
        variant=row.variant,
        artifact=row.artifact,
        workload=Workload(**row.workload_body),
        machine=row.machine,
        readings=readings,
        ratios={name: Reading(middle, low, high, ()) for name, (middle, low, high) in row.ratios.items()},
        notes=dict(row.notes),
        operators=tuple(Operator(**body) for body in row.operators),
        energy_source=row.energy_source,
        energy=row.energy,
        session=row.session,
        protocol=row.protocol,
    )


def compiled(session: Session, lineage: str) -> list[Point]:
    """Return the points of a lineage that have an artifact, oldest first."""
    rows = session.scalars(
        select(t.VariantRow.point)
        .where(t.VariantRow.lineage == lineage, t.VariantRow.artifact.is_not(None))
        .order_by(t.VariantRow.created_at)
    )
    return [Point.of(body) for body in rows]
