"""Remove blobs that no front, no publication and no pairing needs; rows and measurements are kept."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import delete
from sqlalchemy.dialects.postgresql import insert as upsert

from llmbuild.catalog import locks
from llmbuild.catalog import tables as t
from llmbuild.catalog.place import FILE
from llmbuild.catalog.references import blobs_of, collected, front_variants, published_blobs, references, stranger
from llmbuild.catalog.schema import now
from llmbuild.catalog.writer import IMPORTS, Catalog
from llmbuild.errors import CatalogError

ORDER = (
    *("orphan", "front_half", "artifact", "checks", "module", "parameters", "tokenizer", "chat_template", "tuning"),
    "reference",
)
"""The order of removal under a size budget; a reference, which takes the longest to make again, is last."""


@dataclass(frozen=True)
class Removal:
    """One blob that is, or would be, removed."""

    digest: str
    kind: str
    size_bytes: int


@dataclass(frozen=True)
class Swept:
    """The result of a collection, in bytes; `over` is by how much the kept bytes exceed the budget."""

    removed: tuple[Removal, ...]
    freed_bytes: int
    kept_bytes: int
    over: int


def collect(catalog: Catalog, budget: int | None = None, dry_run: bool = False) -> Swept:
    """Remove blobs that nothing needs, or, with a `budget` in bytes, only as many as necessary.

    Nothing is removed where rows and blobs are not of one catalog: unreferenced blobs may then belong to another
    database.

    `catalog` must be open exclusively. A blob that is missing already and that no front needs is marked as collected:
    it does not count as missing any more. Blobs are marked before they are removed, so that a killed collection leaves
    no blob that counts as lost.

    Raises:
        CatalogError: the database is not the one of these blobs.
    """
    plan, absent, total = _plan(catalog)
    chosen, left = [], total
    for removal in plan:
        if budget is not None and left <= budget and removal.kind != "orphan":
            break
        chosen.append(removal)
        left -= removal.size_bytes
    if not dry_run:
        _mark(catalog, [*chosen, *absent])
        for removal in chosen:
            catalog.blobs.remove(removal.digest)
        _tidy(catalog)
    over = max(0, left - budget) if budget is not None else 0
    return Swept(tuple(chosen), total - left, left, over)


def _plan(catalog: Catalog) -> tuple[list[Removal], list[Removal], int]:
    """Return the removable blobs, the missing ones that no front needs, and the total bytes."""
    with catalog.session() as session:
        named = {r.digest: r for r in references(session, catalog.blobs)}
        needed = blobs_of(session, front_variants(session))
        keep = needed | published_blobs(catalog.folder)
        keep |= {r.digest for r in named.values() if r.kind in ("reference", "tuning")}
        gone, published = collected(session), published_blobs(catalog.folder)
    sizes = dict(catalog.blobs.digests())
    if why := stranger(named, gone, published, sizes):
        raise CatalogError(
            f"{catalog.folder}: nothing is freed: {why}: bring {FILE} and blobs of one catalog together, or remove the "
            "folder"
        )
    free = [
        Removal(name, named[name].kind if name in named else "orphan", size)
        for name, size in sizes.items()
        if name not in keep
    ]
    absent = [Removal(name, r.kind, 0) for name, r in named.items() if name not in sizes and name not in needed]

    def order(removal: Removal) -> tuple[int, str, str]:
        at = ORDER.index(removal.kind) if removal.kind in ORDER else len(ORDER)
        return at, _age(named, removal.digest), removal.digest

    return sorted(free, key=order), absent, sum(sizes.values())


def _age(named: Mapping[str, object], digest: str) -> str:
    return str(getattr(named.get(digest), "created_at", ""))


def _mark(catalog: Catalog, removals: list[Removal]) -> None:
    rows = [
        {"digest": r.digest, "size_bytes": r.size_bytes, "created_at": now()} for r in removals if r.kind != "orphan"
    ]
    if rows:
        with catalog.session(write=True) as session:
            session.execute(upsert(t.CollectedRow).values(rows).on_conflict_do_nothing())


def _tidy(catalog: Catalog) -> None:
    """Remove the remains of killed processes: temporary files, and lock files that cannot be in use now."""
    for path in catalog.blobs.leftovers():
        path.unlink(missing_ok=True)
    for path in (catalog.folder / locks.FOLDER).glob("*"):
        path.unlink(missing_ok=True)
    shutil.rmtree(catalog.folder / IMPORTS, ignore_errors=True)
    there = {name for name, _ in catalog.blobs.digests()}
    with catalog.session(write=True) as session:
        session.execute(delete(t.CollectedRow).where(t.CollectedRow.digest.in_(there)))
