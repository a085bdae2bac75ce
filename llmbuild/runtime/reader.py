"""Read a catalog with the standard library's sqlite3, read-only; used by the loader and the listing commands."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from llmbuild.errors import CatalogError, InputError, sentence
from llmbuild.runtime import machines as machines_
from llmbuild.runtime import trust
from llmbuild.runtime.connection import Connection, Found
from llmbuild.spec.load_curve import LOAD_PROTOCOL, LoadCurve, curve_from
from llmbuild.spec.machine import NOWHERE
from llmbuild.spec.measurement import ESTIMATES
from llmbuild.spec.rows import Row
from llmbuild.spec.slo import ENERGY, METRICS, Slo
from llmbuild.system.extras import advice
from llmbuild.system.paths import real
from llmbuild.system.strict_json import JsonObject, loads

_WITH_CURVES = 8
"""The first schema with load curves."""
SCHEMA_VERSIONS = (1, 2, 3, 4, 5, 6, 7, 8)
"""Schemas that this loader reads."""

COPIES = 3
"""Attempts to copy a database that is being written to before an error is raised."""

FILE = "catalog.sqlite"
URL_FILE = "catalog.url"
NEVER = "1=0"
LARGEST = "1.7976931348623157e308"
FRONT = "status IN ('pareto', 'undecided')"
NARROW = (
    "variant model target machine workload status reason machine_digest target_digest target_body artifact parameters "
    "tokenizer chat runtime energy_source"
).split()
"""The columns that a verdict on a row needs, besides its metrics; the rest is JSON that is slow to parse."""
CHOICES = "point AS choices"
"""The point as stored: JSON that is parsed only where rows are compared by it."""
_ALIKE = ("target_body", "abi")
"""Columns with few distinct values, parsed once each; the parsed values are never modified."""
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
    """Return the default location of the catalog: `$LLMBUILD_CATALOG`, then `./catalog`.

    Raises:
        InputError: the variable is empty.
    """
    named = os.environ.get("LLMBUILD_CATALOG")
    if named == "":
        raise InputError("$LLMBUILD_CATALOG is empty: unset it, or name a folder")
    return named or "catalog"


def blob_path(catalog: Path, digest: str) -> Path:
    """Return the path of a blob."""
    return catalog / "blobs" / "sha256" / digest[:2] / digest


@contextlib.contextmanager
def opened(catalog: Path) -> Iterator[Connection]:
    """Open a catalog for reading after a check of its schema version.

    Raises:
        CatalogError: missing, not a catalog, damaged, or of another schema.
    """
    file = database(catalog)
    if (catalog / URL_FILE).is_file():
        with _served(catalog / URL_FILE) as server:
            yield server
        return
    if not file.is_file():
        raise CatalogError(f"no catalog at {file}: build one with `llmbuild build`, or name one with -C")
    connection = connected(file)
    try:
        check_schema(connection, file)
        yield connection
    except sqlite3.Error as error:
        raise CatalogError(f"{file}: cannot be read: {error}") from None
    finally:
        connection.close()


def database(catalog: Path) -> Path:
    """Return the file of a catalog's rows: in a published folder, the current one."""
    return trust.database(catalog) if (catalog / trust.POINTER).is_file() else catalog / FILE


def may_have_writers(file: Path) -> bool:
    """Return whether a database may have concurrent writers: a WAL needs a writable folder."""
    return os.access(file.parent, os.W_OK) or (_log(file).exists() and os.access(f"{file}-shm", os.R_OK))


def connected(file: Path) -> sqlite3.Connection:
    """Return a read-only connection to a database; any thread may use it, one at a time.

    A read-only folder cannot hold the index of a write-ahead log. Without a log the database is opened as immutable;
    with one, a private copy of both is read, since the database alone lacks the latest rows.

    Raises:
        CatalogError: it cannot be opened.
    """
    try:
        if os.access(file.parent, os.W_OK):
            return _connection(file, "mode=ro")
        if may_have_writers(file):
            with contextlib.suppress(sqlite3.OperationalError):  # such as an index that does not match the log
                return _connection(file, "mode=ro")
        if not _log(file).exists() or not _log(file).stat().st_size:
            return _connection(file, "mode=ro&immutable=1")
        return _copied(file)
    except sqlite3.Error as error:
        raise CatalogError(_why_unreadable(file) or f"{file}: cannot be opened: {error}") from None
    except OSError as error:
        raise CatalogError(f"{sentence(error)}: without it, rows would be missing from {file}") from None


def _log(file: Path) -> Path:
    return file.with_name(f"{file.name}-wal")


def _why_unreadable(file: Path) -> str:
    try:
        with open(file, "rb"):
            return ""
    except OSError as error:
        return sentence(error)


def _connection(file: Path, mode: str) -> sqlite3.Connection:
    name = f"{real(file).as_uri()}?{mode}"
    connection = sqlite3.connect(name, uri=True, timeout=60, check_same_thread=False)
    try:
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA trusted_schema=OFF")  # a view in an untrusted file may not call arbitrary functions
        connection.execute("SELECT count(*) FROM sqlite_master")  # opens the log, which `connect` does not
    except sqlite3.OperationalError:
        connection.close()
        raise
    except sqlite3.DatabaseError:
        pass  # not a database: the schema check reports it
    return connection


def _copied(file: Path) -> sqlite3.Connection:
    """Return a connection to a private copy of a database and its log; the copy's files are already unlinked.

    Raises:
        OSError: there is no space for a copy, or a file cannot be read.
        CatalogError: it was written to during every copy.
    """
    for _ in range(COPIES):
        with tempfile.TemporaryDirectory(prefix="llmbuild-") as name:
            copy, before = Path(name) / file.name, _state(file)
            shutil.copyfile(file, copy)
            shutil.copyfile(_log(file), _log(copy))
            if _state(file) != before:
                continue
            with contextlib.closing(sqlite3.connect(copy)) as merging:
                merging.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            return _connection(copy, "mode=ro&immutable=1")
    raise CatalogError(f"{file}: is being written to, and its folder cannot be: run this where the writer runs")


def _state(file: Path) -> list[tuple[int, int, int]]:
    return [(s.st_ino, s.st_size, s.st_mtime_ns) for s in (file.stat(), _log(file).stat())]


@contextlib.contextmanager
def _served(file: Path) -> Iterator[Connection]:
    """Open a catalog whose rows are in Postgres."""
    try:
        import psycopg
    except ImportError as error:
        raise CatalogError(f"{file}: rows are in Postgres: {advice(error, 'postgres')}") from None
    try:
        with psycopg.connect(file.read_text().strip(), row_factory=_row_of, connect_timeout=60) as connection:
            server = _Server(connection)
            check_schema(server, file)
            yield server
    except psycopg.Error as error:
        raise CatalogError(f"{file}: the server cannot be read: {str(error).strip()}") from None


class _Row(dict[str, object]):
    """A row by name and by index, as sqlite3's."""

    def __getitem__(self, key: str | int) -> object:
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)


def _row_of(cursor: Any) -> Any:
    names = [column.name for column in cursor.description or ()]
    return lambda values: _Row(zip(names, values, strict=True))


class _Server:
    """A Postgres connection with the interface of sqlite3's."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection

    def execute(self, query: str, values: Sequence[object] = ()) -> Found:
        found: Found = self.connection.execute(query.replace("?", "%s"), values)
        return found

    def close(self) -> None:
        self.connection.close()


def check_schema(connection: Connection, file: Path) -> None:
    """Raise a `CatalogError` unless a catalog's schema is supported."""
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
    slo: Slo | None = None,
    default: bool = False,
) -> list[Row]:
    """Return rows of the view `variants`: the front, or `everything`; only those inside `slo`; `default` rows too."""
    where, values = _where(model, target, workload)
    if not everything:
        where.append(f'({FRONT} OR "default")' if default else FRONT)
    with opened(catalog) as connection:
        if slo is not None:
            _bounded(connection, slo, where, values)
        found = connection.execute(f"SELECT * FROM variants WHERE {' AND '.join(where)}", values).fetchall()
        return machines_.named([decode(row) for row in found], connection)


def candidates(catalog: Path, model: str, target: str | None = None, workload: str | None = None) -> list[Row]:
    """Return every row of a model with only the columns that a verdict needs: see `NARROW`."""
    where, values = _where(model, target, workload)
    with opened(catalog) as connection:
        there = _columns(connection)
        columns = ", ".join([*(name for name in (*NARROW, *METRICS) if name in there), CHOICES, '"default"'])
        found = connection.execute(f"SELECT {columns} FROM variants WHERE {' AND '.join(where)}", values).fetchall()
        return machines_.named([decode(row) for row in found], connection)


def machines(connection: Connection, model: str) -> int:
    """Return how many machines ranked a model's front; none where part of it was never measured."""
    query = f"SELECT DISTINCT machine FROM standing WHERE model = ? AND {FRONT}"
    found = {row[0] for row in connection.execute(query, (model,))}
    names = machines_.fingerprints(connection)
    return 0 if NOWHERE in found else len({names.get(name, name) for name in found})


def _where(model: str | None, target: str | None, workload: str | None) -> tuple[list[str], list[object]]:
    where: list[str] = ["1=1"]
    values: list[object] = []
    for column, value in (("model", model), ("target", target), ("workload", workload)):
        if value is not None:
            where.append(f"{column} = ?")
            values.append(value)
    return where, values


def _bounded(connection: Connection, slo: Slo, where: list[str], values: list[object]) -> None:
    for bound in slo.bounds:
        there = known(connection, bound.metric)
        where.append(there)
        if there != NEVER:
            where.append(f"{bound.metric} {bound.operator} ?")
            values.append(bound.limit)


def known(connection: Connection, metric: str) -> str:
    """Return the SQL condition that a metric is present: false in an older catalog, and where it is an estimate."""
    if metric not in _columns(connection):
        return NEVER
    estimates = ", ".join(f"'{source}'" for source in ESTIMATES)
    measured = f" AND energy_source NOT IN ({estimates})" if metric == ENERGY else ""
    return f"ABS({metric}) <= {LARGEST}{measured}"  # not NULL, and not infinite


def _columns(connection: Connection) -> frozenset[str]:
    """Return the columns of the view `variants`: earlier schemas have fewer."""
    version = connection.execute("SELECT schema_version FROM info").fetchone()[0]
    if version not in _COLUMNS:
        told = connection.execute("SELECT * FROM variants LIMIT 0").description
        _COLUMNS[version] = frozenset(column[0] for column in told)
    return _COLUMNS[version]


_COLUMNS: dict[int, frozenset[str]] = {}
"""Columns of the view `variants` by schema version, cached."""


def decode(row: sqlite3.Row | dict[str, object]) -> Row:
    """Return a row as a dict, its JSON columns parsed.

    Raises:
        CatalogError: a cell has the wrong type: the catalog is damaged.
    """
    out = dict(row)
    try:
        for name in _JSON:
            if isinstance(out.get(name), str):
                out[name] = _shared(out[name]) if name in _ALIKE else loads(out[name])
    except ValueError:
        raise _damaged(out, name) from None
    if "default" in out:
        out["default"] = bool(out["default"])
    return _sound(out)


def _sound(row: JsonObject) -> Row:
    """Return a row after a check of its cells' types; SQLite columns may hold any type."""
    for names, kinds in _KINDS:
        for name in names:
            if name in row and not isinstance(row[name], kinds):
                raise _damaged(row, name)
    target = row.get("target_body")
    if target is not None and not (isinstance(target.get("arch"), str) and _texts(target.get("requires"))):
        raise _damaged(row, "target_body")
    return cast(Row, row)


def _texts(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(text, str) for text in value)


def _damaged(row: JsonObject, name: str) -> CatalogError:
    whose = str(row.get("variant"))[:12]
    return CatalogError(f"variant {whose}: its {name} is damaged in the catalog: restore catalog.sqlite from a copy")


_KINDS: tuple[tuple[tuple[str, ...], type | tuple[type, ...]], ...] = (
    (tuple(METRICS), (int, float, type(None))),
    (("variant", "model", "target", "machine", "workload", "status", "machine_digest", "target_digest"), str),
    (("artifact", "parameters", "tokenizer", "chat", "runtime", "reason", "program"), (str, type(None))),
    (("point", "target_body"), dict),
    (("ratios", "intervals", "notes", "abi"), (dict, type(None))),
)


@functools.lru_cache(64)
def _shared(text: str) -> object:
    return loads(text)


def count(catalog: Path, model: str) -> int:
    """Return how many rows a model has."""
    with opened(catalog) as connection:
        return int(connection.execute("SELECT count(*) FROM standing WHERE model = ?", (model,)).fetchone()[0])


def models(catalog: Path) -> list[str]:
    """Return the models that have rows in a catalog."""
    with opened(catalog) as connection:
        return [r[0] for r in connection.execute("SELECT DISTINCT model FROM standing ORDER BY model")]


def find_variant(catalog: Path, prefix: str) -> list[Row]:
    """Return the rows of the one variant whose digest starts with `prefix`.

    Raises:
        InputError: none, or more than one.
    """
    with opened(catalog) as connection:
        found = connection.execute("SELECT * FROM variants WHERE substr(variant, 1, ?) = ?", (len(prefix), prefix))
        rows = machines_.named([decode(r) for r in found], connection)
    names = {r["variant"] for r in rows}
    if len(prefix) < 4 or not rows:
        raise InputError(f"no variant {prefix!r} in {catalog}: `llmbuild query --all` lists them")
    if len(names) > 1:
        raise InputError(f"{prefix!r} names {len(names)} variants: give more digits")
    return rows


def load_curves(catalog: Path, variants: Sequence[str]) -> list[LoadCurve]:
    """Return the load curves of variants, by the machine's present fingerprint; none in a catalog of an earlier schema.

    Raises:
        CatalogError: a curve is damaged.
    """
    with opened(catalog) as connection:
        if connection.execute("SELECT schema_version FROM info").fetchone()[0] < _WITH_CURVES:
            return []
        names = machines_.fingerprints(connection)
        found = [
            row
            for variant in dict.fromkeys(variants)
            for row in connection.execute(
                "SELECT body, machine_digest FROM load_curves WHERE variant = ? AND protocol = ? ORDER BY load_curve",
                (variant, LOAD_PROTOCOL),
            ).fetchall()
        ]
    return [_curve(row["body"], names) for row in found]


def _curve(body: object, names: Mapping[str, str]) -> LoadCurve:
    try:
        curve = curve_from(loads(body) if isinstance(body, str) else body)  # type: ignore[arg-type]
    except (ValueError, TypeError, KeyError):
        todo = "`llmbuild profile --load` measures it again"
        raise CatalogError(f"a load curve is damaged in the catalog: {todo}") from None
    return replace(curve, machine=names.get(curve.machine, curve.machine))
