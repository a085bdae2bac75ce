"""Intermediate results of compiles: front halves, and winning configurations of dispatches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert as upsert

from llmbuild import digest
from llmbuild.catalog import tables as t
from llmbuild.catalog.known import name_of
from llmbuild.catalog.schema import now
from llmbuild.catalog.writer import Catalog
from llmbuild.digest import plain
from llmbuild.errors import CatalogError


@dataclass(frozen=True)
class Front:
    """A partial compile, a gzipped blob, and the seconds it took.

    It is a front half as text, with its scheduling features, or translated dispatches as bytecode.
    """

    blob: str
    features: dict[str, object]
    seconds: float


@dataclass(frozen=True)
class Tuned:
    """The winner for a kind of dispatch: its configuration (empty: the compiler's own), gain, and candidates."""

    configuration: str
    gain: float
    tried: tuple[dict[str, object], ...]


def find_front(catalog: Catalog, key: str) -> Front | None:
    """Return a partial compile, if its blob is present and intact."""
    with catalog.session() as session:
        row = session.get(t.FrontHalfRow, key)
        found = None if row is None else Front(row.blob, dict(row.features), row.seconds)
    return found if found and catalog.blobs.intact(found.blob) else None


def record_front(catalog: Catalog, key: str, inputs: Mapping[str, object], front: Front) -> None:
    """Record a partial compile."""
    _replace(catalog, t.FrontHalfRow, {"key": key, "inputs": plain(inputs), "created_at": now(), **plain(front)})


def find_tuning(catalog: Catalog, key: str) -> Tuned | None:
    """Return the winner for a kind of dispatch."""
    with catalog.session() as session:
        row = session.get(t.TuningRow, key)
        return None if row is None else Tuned(row.configuration, row.gain, tuple(row.tried))


def record_tuning(catalog: Catalog, key: str, inputs: Mapping[str, object], tuned: Tuned) -> None:
    """Record the winner for a kind of dispatch."""
    _replace(catalog, t.TuningRow, {"key": key, "inputs": plain(inputs), "created_at": now(), **plain(tuned)})


def winners_of(catalog: Catalog, target: str, compiler: str) -> str:
    """Return the name of all winning configurations on a target (its digest); empty when there are none.

    They become a separate row, so that the name keeps its meaning when more winners are found.
    """
    found = catalog.tunings(target, compiler)
    if not found:
        return ""
    if find_tuning(catalog, digest.of(found)) is None:
        record_tuning(catalog, digest.of(found), {"winners": found}, Tuned("", 1.0, ()))
    return name_of(found)


def winners(catalog: Catalog, name: str) -> dict[str, str]:
    """Return configurations by signature.

    Raises:
        CatalogError: this catalog has no such configurations.
    """
    with catalog.session() as session:
        row = session.scalar(select(t.TuningRow).where(t.TuningRow.key.startswith(name)))
        if row is None or "winners" not in row.inputs:
            raise CatalogError(f"{catalog.folder}: no tuning {name} in this catalog: tune again, or pin tuning=none")
        return dict(row.inputs["winners"])


def _replace(catalog: Catalog, table: type[t.Base], values: dict[str, object]) -> None:
    with catalog.session(write=True) as session:
        session.execute(upsert(table).values(values).on_conflict_do_update(index_elements=["key"], set_=values))
