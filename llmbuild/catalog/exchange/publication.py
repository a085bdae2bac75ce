"""The contents of a publication: a database of the fronts' rows, their blobs, and a manifest of both."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sqlalchemy import FromClause, Table, insert, select
from sqlalchemy.orm import Session

import llmbuild
from llmbuild import digest
from llmbuild.catalog import tables as t
from llmbuild.catalog.place import FILE
from llmbuild.catalog.references import front_variants, references
from llmbuild.catalog.schema import SCHEMA_VERSION, copied
from llmbuild.catalog.tables import Cells
from llmbuild.catalog.writer import OF_TEXT, Catalog
from llmbuild.errors import InputError
from llmbuild.spec.slo import METRICS
from llmbuild.spec.trial import FRONT

EXPORT = ".export"


@dataclass(frozen=True)
class Publication:
    """A manifest's bytes, and the path of every blob in it; `annotations` describe a blob to a registry."""

    manifest: bytes
    blobs: dict[str, Path]
    annotations: dict[str, dict[str, str]]
    summary: dict[str, str]

    @property
    def digest(self) -> str:
        """The manifest's digest."""
        return digest.of_bytes(self.manifest)


def prepare(catalog: Catalog, models: Sequence[str], folder: Path) -> Publication:
    """Write the rows of the fronts into a database in `folder`, and list all that belongs to them.

    The same catalog gives the same bytes.

    Raises:
        InputError: no variant of these models is on a front.
    """
    with catalog.session() as session:
        rows = _rows(session, models)
        kinds = {r.digest: r.kind for r in references(session, catalog.blobs)}
    if not rows["standing"]:
        raise InputError(
            f"{catalog.folder}: no front of {', '.join(models) or 'any model'} to publish: build one first"
        )
    database = _export(rows, folder)
    named = sorted(_named(rows))
    absent = [name for name in named if not catalog.blobs.verify(name)]
    if absent:
        raise InputError(
            f"{catalog.folder}: {kinds.get(absent[0], 'blob')} {absent[0][:12]} is missing or damaged: run "
            "`llmbuild verify`, then `llmbuild build`"
        )
    paths = {name: catalog.blobs.path(name) for name in named}
    body = _manifest(rows, database, paths, kinds)
    manifest = (digest.canonical(body) + "\n").encode()
    return Publication(manifest, {**paths, body["catalog"]["digest"]: database}, _annotations(body), _summary(body))


def _rows(session: Session, models: Sequence[str]) -> dict[str, list[Cells]]:
    """Return the rows of each table that a front needs, in a deterministic order."""
    front = front_variants(session)
    rows: dict[str, list[Cells]] = {}
    standings = [
        r
        for r in _all(session, t.StandingRow.__table__)
        if r["variant"] in front
        and (not models or r["model"] in models)
        and (r["status"] in FRONT or _zero(session, r))
    ]
    rows["standing"] = sorted(standings, key=lambda r: tuple(str(r[n]) for n in _PLACE))
    for number, row in enumerate(rows["standing"], 1):
        row.update(id=number, failure=None)
    wanted: dict[str, set[object]] = {}
    _want(wanted, t.StandingRow.__table__, rows["standing"])
    for table in reversed(t.Base.metadata.sorted_tables):
        if table.name in rows or table.name in _LEFT_BEHIND:
            continue
        found = [r for r in _all(session, table) if _belongs(table, r, wanted)]
        names = table.primary_key.columns.keys()
        rows[table.name] = sorted(found, key=partial(_order, names))
        _want(wanted, table, rows[table.name])
    told = {r["variant"]: {name: r[name] for name in OF_TEXT} for r in rows["standing"] if r["source"]}
    for row in rows["variant"]:  # another recipe, which is not published, may have written different values
        row |= told.get(row["digest"], {})
    return rows


def _order(names: Sequence[str], row: Cells) -> list[str]:
    return [str(row[n]) for n in names]


_PLACE = ("model", "target", "machine", "workload", "variant")
_LEFT_BEHIND = ("info", "trial", "build", "failure", "collected", "reference")
"""Tables of build state, which a reader of artifacts does not need."""


def _all(session: Session, table: FromClause) -> Iterable[Cells]:
    for row in session.execute(select(table)):
        yield dict(row._mapping)


def _zero(session: Session, row: Cells) -> bool:
    variant = session.get(t.VariantRow, row["variant"])
    return variant is not None and variant.is_default


def _want(wanted: dict[str, set[object]], table: FromClause, rows: Iterable[Cells]) -> None:
    for row in rows:
        for key in table.foreign_keys:
            if row[key.parent.name] is not None:
                wanted.setdefault(key.column.table.name, set()).add(row[key.parent.name])


def _belongs(table: Table, row: Cells, wanted: dict[str, set[object]]) -> bool:
    """Return whether a published row refers to this row, or this row refers only to published rows."""
    (key,) = table.primary_key.columns.keys()[:1]
    if row[key] in wanted.get(table.name, set()):
        return True
    if table.name in ("measurement", "variant"):
        return False
    named = [(k.column.table.name, row[k.parent.name]) for k in table.foreign_keys]
    return bool(named) and all(value in wanted.get(name, set()) for name, value in named)


def _export(rows: dict[str, list[Cells]], folder: Path) -> Path:
    scratch = Catalog(folder / EXPORT)
    try:
        with scratch.session(write=True) as session:
            for table in t.Base.metadata.sorted_tables:
                if rows.get(table.name):
                    session.execute(insert(table), rows[table.name])
            session.execute(t.Info.__table__.update().values(created_at=_latest(rows)))  # type: ignore[attr-defined]
    finally:
        scratch.close()
    database = folder / FILE
    copied(folder / EXPORT / FILE, database)
    return database


def _latest(rows: dict[str, list[Cells]]) -> str:
    return max((str(r["created_at"]) for found in rows.values() for r in found if "created_at" in r), default="")


def _named(rows: dict[str, list[Cells]]) -> set[str]:
    found = {row["digest"] for row in rows["artifact"]}
    found |= {row[name] for row in rows["program"] for name in ("module", "parameters", "checks")}
    of_text = [row[column] for name in ("standing", "variant") for row in rows[name] for column in OF_TEXT]
    return found | {*filter(None, of_text)}


def _manifest(rows: dict[str, list[Cells]], database: Path, paths: dict[str, Path], kinds: dict[str, str]) -> Cells:
    return {
        "kind": "llmbuild.publication",
        "version": 1,
        "schema": SCHEMA_VERSION,
        "created_at": _latest(rows),
        "catalog": {"digest": digest.of_file(database), "bytes": database.stat().st_size},
        "blobs": {name: {"kind": kinds[name], "bytes": path.stat().st_size} for name, path in sorted(paths.items())},
        "variants": [_variant(row, rows) for row in rows["standing"]],
        "provenance": {
            "llmbuild": llmbuild.__version__,
            "toolchains": {r["digest"]: r["body"] for r in rows["toolchain"]},
            "targets": {r["digest"]: r["body"] for r in rows["target"]},
            "machines": {r["digest"]: r["body"] for r in rows["machine"]},
            "recipes": {r["program"]: r["inputs"] for r in rows["import"]},
            "protocols": sorted({r["protocol"] for r in rows["measurement"]}),
        },
    }


def _variant(row: Cells, rows: dict[str, list[Cells]]) -> Cells:
    found = {name: {r["digest"]: r for r in rows[name]} for name in ("variant", "program", "artifact", "target")}
    measured = next((r for r in rows["measurement"] if r["key"] == row["measurement"]), {})
    variant = found["variant"][row["variant"]]
    return {
        **{name: row[name] for name in _PLACE},
        "target_name": found["target"][row["target"]]["name"],
        "status": row["status"],
        "artifact": variant["artifact"],
        "parameters": found["program"][variant["program"]]["parameters"],
        **{name: (row if row["source"] else variant)[name] for name in OF_TEXT},
        "runtime": found["artifact"][variant["artifact"]]["runtime"],
        "point": variant["point"],
        "protocol": measured.get("protocol"),
        "metrics": {name: measured[name] for name in METRICS if measured.get(name) is not None},
    }


def _annotations(body: Cells) -> dict[str, dict[str, str]]:
    """Return a registry's annotations of a blob: for an artifact its targets, metrics and required versions."""
    told: dict[str, dict[str, str]] = {
        name: {"dev.llmbuild.kind": entry["kind"], "org.opencontainers.image.title": f"{entry['kind']}-{name[:12]}"}
        for name, entry in body["blobs"].items()
    }
    for row in body["variants"]:
        mine = told[row["artifact"]]
        mine |= {
            "dev.llmbuild.model": row["model"],
            "dev.llmbuild.target": row["target_name"],
            "dev.llmbuild.runtime": row["runtime"],
        }
        mine |= {
            f"dev.llmbuild.{row['workload']}.{name}": format(value, ".6g") for name, value in row["metrics"].items()
        }
    return told


def _summary(body: Cells) -> dict[str, str]:
    variants, made_by = body["variants"], body["provenance"]
    return {
        "org.opencontainers.image.title": "llmbuild catalog",
        "org.opencontainers.image.created": body["created_at"],
        "dev.llmbuild.version": made_by["llmbuild"],
        "dev.llmbuild.schema": str(body["schema"]),
        "dev.llmbuild.models": " ".join(sorted({v["model"] for v in variants})),
        "dev.llmbuild.targets": " ".join(sorted({v["target_name"] for v in variants})),
        "dev.llmbuild.runtimes": " ".join(sorted({v["runtime"] for v in variants})),
        "dev.llmbuild.compilers": " ".join(sorted({str(b["compiler"]) for b in made_by["toolchains"].values()})),
    }
