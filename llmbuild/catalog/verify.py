"""Check a whole catalog: the database, every row's references, and every byte of every blob."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from sqlalchemy import select, text
from sqlalchemy.orm import Session

from llmbuild.catalog import tables as t
from llmbuild.catalog.place import FILE
from llmbuild.catalog.references import (
    Reference,
    blobs_of,
    collected,
    front_variants,
    published_blobs,
    references,
    stranger,
)
from llmbuild.catalog.store import BlobStore
from llmbuild.catalog.writer import Catalog
from llmbuild.digest import of_file
from llmbuild.runtime import trust

PLACE = ("model", "target", "machine", "workload", "variant")
"""The key of a standing."""
REBUILD = "run `llmbuild build` with its recipe: it is made again"
FORGET = "run `llmbuild gc`: no front needs it, and the next build that does makes it again"


@dataclass(frozen=True)
class Finding:
    """One error or remark; `wrong` is false for files that only take space."""

    problem: str
    what: str
    detail: str
    remedy: str
    wrong: bool

    def row(self) -> dict[str, object]:
        """Return what the command prints."""
        return asdict(self)


def verify(catalog: Catalog, progress: Callable[[int, int], None] = lambda done, total: None) -> list[Finding]:
    """Return all findings of a catalog; empty when every row and byte is valid."""
    with catalog.session() as session:
        rows = [*_database(session), *_dangling(session)]
        named = {r.digest: r for r in references(session, catalog.blobs)}
        gone = collected(session)
        needed = blobs_of(session, front_variants(session))
    missed = {name for names in catalog.lost_blobs().values() for name in names}
    kept = published_blobs(catalog.folder)
    sizes = dict(catalog.blobs.digests())
    why = stranger(named, gone, kept, sizes)
    return [
        *rows,
        *([Finding("stranger", FILE, why, f"bring {FILE} and blobs of one catalog together", True)] if why else []),
        *_bytes(catalog, named, needed, sizes, progress),
        *(
            Finding(
                "missing", f"{r.kind} {name[:12]}", f"named by {r.owner}", REBUILD if name in needed else FORGET, True
            )
            for name, r in named.items()
            if name not in sizes and (name in missed or name not in gone)
        ),
        *(
            Finding("orphan", f"blob {name[:12]}", f"{size} bytes that no row names", "llmbuild gc frees them", False)
            for name, size in sizes.items()
            if name not in named and name not in kept and not why
        ),
        *(
            Finding("leftover", path.name, "half-written by a process that was killed", "llmbuild gc removes it", False)
            for path in catalog.blobs.leftovers()
        ),
    ]


def promised(folder: Path, catalog: Catalog) -> list[Finding]:
    """Return the differences between a folder's publication and its pointer; `catalog` is its opened database."""
    pointer, body = trust.published(folder)
    store, again = BlobStore(folder), "pull or publish it again"
    entries = {**body["blobs"], body["catalog"]["digest"]: {"kind": "database", **body["catalog"]}}
    found = []
    for name, entry in entries.items():
        path = store.path(name)
        if not path.is_file():
            if not pointer.get("partial"):
                found.append(Finding("missing", f"{entry['kind']} {name[:12]}", "named by the manifest", again, True))
        elif path.stat().st_size != entry["bytes"]:
            told = f"{path.stat().st_size} bytes, the manifest says {entry['bytes']}"
            found.append(Finding("corrupt", f"{entry['kind']} {name[:12]}", told, again, True))
    with catalog.session() as session:
        rows = {tuple(row) for row in session.execute(select(*(getattr(t.StandingRow, name) for name in PLACE)))}
        named = {r.digest for r in references(session, catalog.blobs)}
    said = {tuple(each.get(name) for name in PLACE) for each in body.get("variants", ())}
    if not said or not rows:
        found.append(Finding("empty", "publication", "there is no variant in it", "publish it again", True))
    elif rows != said:
        told = f"{len(rows)} rows in the database, {len(said)} in the manifest, {len(rows & said)} in both"
        found.append(Finding("rows", "publication", told, "publish it again", True))
    if unnamed := sorted(named - set(entries)):
        told = f"{len(unnamed)} blobs that rows name are not in the manifest, {unnamed[0][:12]} is one"
        found.append(Finding("rows", "manifest", told, "publish it again", True))
    copy = folder / FILE
    if not copy.is_file() or of_file(copy) != body["catalog"]["digest"]:
        found.append(Finding("copy", FILE, "is not the database that was published", again, True))
    return found


def _bytes(
    catalog: Catalog,
    named: Mapping[str, Reference],
    needed: set[str],
    sizes: dict[str, int],
    progress: Callable[[int, int], None],
) -> Iterator[Finding]:
    total, done = sum(sizes.values()), 0
    for name, size in sizes.items():
        if not catalog.blobs.verify(name):
            kind = named[name].kind if name in named else "blob"
            path = catalog.blobs.path(name)
            after = f" and {REBUILD if name in needed else FORGET}" if name in named else ""
            remedy = f"rm -f {shlex.quote(str(path))}{after}"
            yield Finding(
                "corrupt", f"{kind} {name[:12]}", f"{path}: its bytes are not those of its name", remedy, True
            )
        done += size
        progress(done, total)


def _database(session: Session) -> Iterator[Finding]:
    if session.get_bind().dialect.name != "sqlite":
        return
    for (told,) in session.execute(text("PRAGMA integrity_check")):
        if told != "ok":
            yield Finding("database", "integrity_check", str(told), "restore catalog.sqlite from a copy", True)


def _dangling(session: Session) -> Iterator[Finding]:
    """Yield rows that refer to a missing row; Postgres prevents them, SQLite has them only if another tool wrote."""
    for table in t.Base.metadata.sorted_tables:
        for key in table.foreign_keys:
            there = session.execute(
                text(
                    f'SELECT count(*) FROM "{table.name}" a WHERE a."{key.parent.name}" IS NOT NULL AND NOT EXISTS '
                    f'(SELECT 1 FROM "{key.column.table.name}" b WHERE b."{key.column.name}" = a."{key.parent.name}")'
                )
            ).scalar()
            if there:
                yield Finding(
                    "dangling",
                    f"{table.name}.{key.parent.name}",
                    f"{there} rows name a {key.column.table.name} that is not there",
                    "restore catalog.sqlite from a copy, or build into a new catalog",
                    True,
                )
