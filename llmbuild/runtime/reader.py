"""Read a catalog with the standard library's sqlite3, read-only; the loader's and the listing commands' one door."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmbuild.errors import CatalogError, InputError

SCHEMA_VERSIONS = (1, 2, 3)
"""Schemas this loader can read."""

FILE = "catalog.sqlite"
_JSON = (
    "point",
    "target_body",
    "abi",
    "ratios",
    "intervals",
    "notes",
    "samples",
    "workload_body",
    "operators",
    "energy",
)


def default_location() -> str:
    """Return where the catalog is when nobody says: `$LLMBUILD_CATALOG`, then `./catalog`."""
    return os.environ.get("LLMBUILD_CATALOG") or "catalog"


def blob_path(catalog: Path, digest: str) -> Path:
    """Return where a blob lies."""
    return catalog / "blobs" / "sha256" / digest[:2] / digest


@contextlib.contextmanager
def opened(catalog: Path) -> Iterator[sqlite3.Connection]:
    """Open a catalog for reading, after its schema version was found to be one we know.

    Raises:
        CatalogError: missing, not a catalog, damaged, or of another schema.
    """
    file = catalog / FILE
    if not file.is_file():
        raise CatalogError(f"no catalog at {file}: build one with `llmbuild build`, or name one with -C")
    connection = _connect(file)
    connection.row_factory = sqlite3.Row
    try:
        _check_schema(connection, file)
        yield connection
    except sqlite3.Error as error:
        raise CatalogError(f"{file}: cannot be read: {error}") from None
    finally:
        connection.close()


def _connect(file: Path) -> sqlite3.Connection:
    """A WAL database in a folder that cannot be written needs `immutable`; elsewhere that would miss a writer."""
    writable = os.access(file.parent, os.W_OK) or Path(f"{file}-shm").exists()
    mode = "mode=ro" if writable else "mode=ro&immutable=1"
    try:
        return sqlite3.connect(f"{file.resolve().as_uri()}?{mode}", uri=True, timeout=60)
    except sqlite3.Error as error:
        raise CatalogError(f"{file}: cannot be opened: {error}") from None


def _check_schema(connection: sqlite3.Connection, file: Path) -> None:
    try:
        row = connection.execute("SELECT schema_version FROM info").fetchone()
    except sqlite3.OperationalError as error:
        raise CatalogError(f"{file}: not a catalog of llmbuild: {error}") from None
    found = row[0] if row else None
    if found not in SCHEMA_VERSIONS:
        newer = isinstance(found, int) and found > max(SCHEMA_VERSIONS)
        todo = "upgrade llmbuild" if newer else "run `llmbuild build` on it once to migrate it"
        raise CatalogError(
            f"{file}: the catalog's schema is {found}, this llmbuild reads {SCHEMA_VERSIONS[-1]}: {todo}"
        )


def variants(
    catalog: Path,
    model: str | None = None,
    target: str | None = None,
    workload: str | None = None,
    everything: bool = False,
) -> list[dict[str, Any]]:
    """Return rows of the view `variants`; only the front and the default unless `everything` is asked for."""
    where, values = ["1=1"], []
    for column, value in (("model", model), ("target", target), ("workload", workload)):
        if value is not None:
            where.append(f"{column} = ?")
            values.append(value)
    if not everything:
        where.append("status IN ('pareto', 'undecided')")
    with opened(catalog) as connection:
        found = connection.execute(f"SELECT * FROM variants WHERE {' AND '.join(where)}", values).fetchall()
    return [decode(row) for row in found]


def decode(row: sqlite3.Row | dict[str, Any]) -> dict[str, Any]:
    """Return a row as a dict, its JSON columns parsed."""
    out = dict(row)
    for name in _JSON:
        if isinstance(out.get(name), str):
            out[name] = json.loads(out[name])
    if "default" in out:
        out["default"] = bool(out["default"])
    return out


def models(catalog: Path) -> list[str]:
    """Return the models a catalog has rows of."""
    with opened(catalog) as connection:
        return [r[0] for r in connection.execute("SELECT DISTINCT model FROM variants ORDER BY model")]


def find_variant(catalog: Path, prefix: str) -> list[dict[str, Any]]:
    """Return the rows of the one variant whose digest starts with `prefix`.

    Raises:
        InputError: none, or more than one.
    """
    with opened(catalog) as connection:
        found = connection.execute("SELECT * FROM variants WHERE substr(variant, 1, ?) = ?", (len(prefix), prefix))
        rows = [decode(r) for r in found]
    names = {r["variant"] for r in rows}
    if len(prefix) < 4 or not rows:
        raise InputError(f"no variant {prefix!r} in {catalog}: `llmbuild query --all` lists them")
    if len(names) > 1:
        raise InputError(f"{prefix!r} names {len(names)} variants: give more digits")
    return rows
