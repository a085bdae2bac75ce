"""What a catalog keeps of compiles beside their artifacts: front halves, and configurations of dispatches that won."""

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
    """A compile half done, a gzipped blob, and the seconds it took.

    It is a front half as text, with what that schedules, or translated dispatches as bytecode.
    """

    blob: str
    features: dict[str, object]
    seconds: float


@dataclass(frozen=True)
class Tuned:
    """What won for a kind of dispatch: its configuration (empty: the compiler's own), the gain, and what was tried."""

    configuration: str
    gain: float
    tried: tuple[dict[str, object], ...]


def find_front(catalog: Catalog, key: str) -> Front | None:
    """Return what a compile has half done before, if its blob is still there and whole."""
    with catalog.session() as session:
        row = session.get(t.FrontHalfRow, key)
        found = None if row is None else Front(row.blob, dict(row.features), row.seconds)
    return found if found and catalog.blobs.intact(found.blob) else None


def record_front(catalog: Catalog, key: str, inputs: Mapping[str, object], front: Front) -> None:
    """Keep a compile half done."""
    _replace(catalog, t.FrontHalfRow, {"key": key, "inputs": plain(inputs), "created_at": now(), **plain(front)})


def find_tuning(catalog: Catalog, key: str) -> Tuned | None:
    """Return what won for a kind of dispatch."""
    with catalog.session() as session:
        row = session.get(t.TuningRow, key)
        return None if row is None else Tuned(row.configuration, row.gain, tuple(row.tried))


def record_tuning(catalog: Catalog, key: str, inputs: Mapping[str, object], tuned: Tuned) -> None:
    """Keep what won for a kind of dispatch."""
    _replace(catalog, t.TuningRow, {"key": key, "inputs": plain(inputs), "created_at": now(), **plain(tuned)})


def winners_of(catalog: Catalog, target: str, compiler: str) -> str:
    """Return the name of all configurations that won on a target (its digest); empty when there are none.

    They become a row of their own, so that the name says what they are whatever is found later.
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
