"""Which rows refer to which blobs, and which blobs must stay: shared by `verify`, `gc`, `publish` and `pull`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from llmbuild.catalog import tables as t
from llmbuild.catalog.place import PUBLISHED_FILE
from llmbuild.catalog.store import BlobStore
from llmbuild.spec.space import TUNING, UNTUNED
from llmbuild.spec.trial import FRONT
from llmbuild.system.strict_json import loads

RECORDS = "published"
"""Folder of a catalog that holds a copy of every published manifest."""

_OF_TEXT = {
    "tokenizer": (t.VariantRow.tokenizer, t.StandingRow.tokenizer),
    "chat_template": (t.VariantRow.chat, t.StandingRow.chat),
}
"""Columns with the blobs that texts need, by the blob's role."""


@dataclass(frozen=True)
class Reference:
    """One row's reference to a blob: the blob's role, its owner, and when the row was written."""

    digest: str
    kind: str
    owner: str
    created_at: str


def references(session: Session, blobs: BlobStore) -> list[Reference]:
    """Return every reference of a row to a blob; `blobs` completes the abbreviated names of tunings in points."""
    found: list[Reference] = []
    for program in session.scalars(select(t.ProgramRow)):
        for kind, name in (
            ("module", program.module),
            ("parameters", program.parameters),
            ("checks", program.checks),
        ):
            found.append(Reference(name, kind, f"program {program.digest[:12]}", ""))
    for artifact in session.scalars(select(t.ArtifactRow)):
        found.append(Reference(artifact.digest, "artifact", f"artifact {artifact.digest[:12]}", artifact.created_at))
    for kind, columns in _OF_TEXT.items():
        for column in columns:
            names = session.scalars(select(column).where(column.is_not(None)).distinct())
            found += [Reference(str(name), kind, "variants", "") for name in names]
    for table in t.Base.metadata.sorted_tables:
        if "blob" in table.c:  # all cached results of slow steps: references, front halves of compiles
            for row in session.execute(select(table)).mappings():
                found.append(Reference(row["blob"], table.name, f"{table.name} {row['key'][:12]}", row["created_at"]))
    tunings = {str(point.get(TUNING, UNTUNED)) for point in session.scalars(select(t.VariantRow.point))} - {UNTUNED}
    return found + [Reference(name, "tuning", "variants", "") for name in map(blobs.find, sorted(tunings)) if name]


def front_variants(session: Session) -> set[str]:
    """Return the variants on a front, and the compiler's defaults, which all others are paired with."""
    alive = select(t.StandingRow.variant).where(t.StandingRow.status.in_(FRONT))
    default = select(t.VariantRow.digest).where(t.VariantRow.is_default, t.VariantRow.artifact.is_not(None))
    return {*session.scalars(alive), *session.scalars(default)}


def blobs_of(session: Session, variants: set[str]) -> set[str]:
    """Return every blob that opening or measuring these variants needs."""
    rows = session.execute(
        select(
            t.VariantRow.digest,
            t.VariantRow.artifact,
            t.VariantRow.tokenizer,
            t.VariantRow.chat,
            t.ProgramRow.module,
            t.ProgramRow.parameters,
            t.ProgramRow.checks,
        ).join(t.ProgramRow, t.ProgramRow.digest == t.VariantRow.program)
    )
    stand = select(t.StandingRow.variant, t.StandingRow.tokenizer, t.StandingRow.chat)
    found = [tuple(row) for row in rows] + [tuple(row) for row in session.execute(stand)]
    return {name for row in found if row[0] in variants for name in row[1:] if name}


def published_blobs(folder: Path) -> set[str]:
    """Return the blobs of the publications that were made from this catalog."""
    found: set[str] = set()
    for path in sorted((folder / RECORDS).glob("*.json")):
        manifest = loads(path.read_text())
        found |= {path.stem, manifest["catalog"]["digest"], *manifest["blobs"]}
    return found


def collected(session: Session) -> set[str]:
    """Return the blobs that `gc` removed."""
    return set(session.scalars(select(t.CollectedRow.digest)))


def stranger(named: Collection[str], gone: Collection[str], kept: Collection[str], there: Collection[str]) -> str:
    """Return why rows and blobs cannot be of one catalog; empty where they can be.

    A killed build leaves a few blobs without a row, and a lost file a row without its blob. Where most referenced
    blobs are missing and most present blobs are unreferenced, the database belongs to another catalog.
    """
    orphans = [name for name in there if name not in named and name not in kept]
    missing = [name for name in named if name not in there and name not in gone]
    if not orphans or not (2 * len(orphans) > len(there) and 2 * len(missing) >= len(named)):
        return ""
    lacks = (
        f"and {len(missing)} of the {len(named)} that its rows name are not there" if named else "and it has no rows"
    )
    return f"its database names {len(there) - len(orphans)} of the {len(there)} blobs that are there, {lacks}"


def is_published(folder: Path) -> bool:
    """Return whether a folder holds a publication, which is read-only."""
    return (folder / PUBLISHED_FILE).is_file()
