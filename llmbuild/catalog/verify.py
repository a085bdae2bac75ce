"""Check a whole catalog: the database, every row's references, and every byte of every blob."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import text
from sqlalchemy.orm import Session

from llmbuild.catalog import tables as t
from llmbuild.catalog.references import blobs_of, collected, front_variants, published_blobs, references
from llmbuild.catalog.writer import Catalog

REBUILD = "run `llmbuild build` with its recipe: it is made again"
FORGET = "run `llmbuild gc`: no front needs it, and the next build that does makes it again"


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be; `wrong` is false for what only takes room."""

    problem: str
    what: str
    detail: str
    remedy: str
    wrong: bool

    def row(self) -> dict[str, Any]:
        """Return what the command prints."""
        return asdict(self)


def verify(catalog: Catalog, progress: Callable[[int, int], None] = lambda done, total: None) -> list[Finding]:
    """Return all that is wrong with a catalog; empty when every row and byte is as it should be."""
    with catalog.session() as session:
        rows = [*_database(session), *_dangling(session)]
        named = {r.digest: r for r in references(session, catalog.blobs)}
        gone = collected(session)
        needed = blobs_of(session, front_variants(session))
    missed = {name for names in catalog.lost_blobs().values() for name in names}
    kept = published_blobs(catalog.folder)
    sizes = dict(catalog.blobs.digests())
    return [
        *rows,
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
            if name not in named and name not in kept
        ),
        *(
            Finding("leftover", path.name, "half-written by a process that was killed", "llmbuild gc removes it", False)
            for path in catalog.blobs.leftovers()
        ),
    ]


def _bytes(
    catalog: Catalog,
    named: dict[str, Any],
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
    """Yield rows that name a row which is not there; Postgres never has any, SQLite only if another tool wrote."""
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
