"""The best rows of a front, cached between picks until the next commit to the catalog.

The cache holds the few numbers that a pick compares, per model and objective. SQLite's `data_version` changes with
every commit, so that a pick always sees the current catalog.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import operator
import os
import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path

from llmbuild.errors import CatalogError
from llmbuild.runtime import machines, reader, trust
from llmbuild.runtime.connection import Connection
from llmbuild.spec.rows import Row
from llmbuild.spec.slo import METRICS, Slo
from llmbuild.system.paths import real

CATALOGS = 4
"""Maximum number of catalogs that are kept open for reading."""
RANKINGS = 8
"""Maximum number of rankings kept per catalog."""
_TABLES = {
    "artifact_bytes": ("a.size_bytes", "LEFT JOIN artifact a ON a.digest = v.artifact"),
    "parameter_bytes": ("p.parameter_bytes", "LEFT JOIN program p ON p.digest = v.program"),
}
"""Metrics that are not readings: their column, and its table."""
_HOLDS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    "<": operator.lt,
    ">=": operator.ge,
    ">": operator.gt,
}


@dataclass(frozen=True)
class Asked:
    """What decides a ranking: the model's rows, the objective, and the bounded metrics."""

    model: str
    target: str | None
    workload: str | None
    machine: str
    objective: str
    bounded: tuple[str, ...]


Ranked = tuple[float, float, int, *tuple[float, ...]]
"""A row of a ranking: the objective (negative where more is better), the memory, its standing, its bounded metrics."""


@dataclass
class _Kept:
    """A catalog that is kept open."""

    connection: Connection
    identity: tuple[int, ...] = ()
    version: int | None = None
    rankings: OrderedDict[Asked, list[Ranked]] = field(default_factory=OrderedDict)


_lock = threading.Lock()
_kept: OrderedDict[Path, _Kept] = OrderedDict()
_inherited: list[_Kept] = []
"""Connections that a forked child inherited: SQLite forbids to use or even close them there."""


def leaders(
    catalog: Path, model: str, target: str | None, workload: str | None, slo: Slo, machine: str, count: int
) -> list[Row]:
    """Return the first rows of a front that are inside `slo`, the best first: only this machine's, if it has any."""
    asked = Asked(model, target, workload, machine, slo.objective, tuple(sorted({b.metric for b in slo.bounds})))
    with _lock, _open(catalog) as kept:
        try:
            inside = _inside(_ranking(kept, asked), asked, slo)
            best = list(islice(_untied(kept.connection, inside), count))
        except TypeError:  # SQLite columns may hold any type: text does not compare with numbers
            raise CatalogError(f"{catalog}: a reading is damaged: restore catalog.sqlite from a copy") from None
        rows = [_whole(kept.connection, standing) for standing in best]
    return [row for row in rows if row is not None]


def forget() -> None:
    """Close every catalog that is kept open."""
    with _lock:
        while _kept:
            _kept.popitem()[1].connection.close()


def _forked() -> None:
    global _lock
    _lock = threading.Lock()
    _inherited.extend(_kept.values())
    _kept.clear()


atexit.register(forget)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


# --- open --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _open(catalog: Path) -> Iterator[_Kept]:
    """Yield a catalog whose rankings are those of its latest commit.

    Raises:
        CatalogError: missing, not a catalog, damaged, or of another schema.
    """
    file = reader.database(catalog)
    if not _keepable(catalog, file):
        with reader.opened(catalog) as connection:
            yield _Kept(connection)
        return
    name = real(file)
    try:
        connection = _connection(name)
        connection.execute("BEGIN")  # a pick reads everything from one commit
        yield _current(name, file)
        connection.execute("COMMIT")
    except sqlite3.Error as error:
        _close(name)
        raise CatalogError(f"{file}: cannot be read: {error}") from None
    except BaseException:  # the caller's code may raise anything: close the transaction
        _close(name)
        raise


def _keepable(catalog: Path, file: Path) -> bool:
    """Return whether SQLite reports every commit: not for rows in a server, nor for a database opened `immutable`."""
    return (
        not (catalog / reader.URL_FILE).is_file()
        and file.is_file()
        and (reader.may_have_writers(file) or (catalog / trust.POINTER).is_file())
    )


def _connection(name: Path) -> Connection:
    """Return the connection to a database, a new one where the file was replaced or overwritten."""
    found = name.stat()
    identity = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
    kept = _kept.get(name)
    if kept is None or kept.identity != identity:
        _close(name)
        kept = _kept[name] = _Kept(reader.connected(name), identity)
        if len(_kept) > CATALOGS:
            _kept.popitem(last=False)[1].connection.close()
    _kept.move_to_end(name)
    return kept.connection


def _current(name: Path, file: Path) -> _Kept:
    """Return the cache of a database, without the rankings of an earlier commit."""
    kept = _kept[name]
    version = kept.connection.execute("PRAGMA data_version").fetchone()[0]
    if kept.version != version:
        kept.rankings.clear()
        reader.check_schema(kept.connection, file)
        kept.version = version
    return kept


def _close(file: Path) -> None:
    kept = _kept.pop(file, None)
    if kept is not None:
        kept.connection.close()


# --- rank --------------------------------------------------------------------------------------------------------


def _ranking(kept: _Kept, asked: Asked) -> list[Ranked]:
    found = kept.rankings.get(asked)
    if found is None:
        found = kept.rankings[asked] = sorted(_rows(kept.connection, asked))
        if len(kept.rankings) > RANKINGS:
            kept.rankings.popitem(last=False)
    kept.rankings.move_to_end(asked)
    return found


def _rows(connection: Connection, asked: Asked) -> list[Ranked]:
    """Return the rows of a front that have every required metric, from as few tables as possible."""
    metrics = (asked.objective, *asked.bounded)
    if any(reader.known(connection, metric) == reader.NEVER for metric in metrics):
        return []  # a catalog of an earlier schema without this metric
    joins = ["standing s JOIN measurement r ON r.key = s.measurement"]
    files = [metric for metric in dict.fromkeys(metrics) if metric in _TABLES]
    joins += ["JOIN variant v ON v.digest = s.variant"] * bool(files) + [_TABLES[metric][1] for metric in files]
    where, values = [f"s.{reader.FRONT}", "s.model = ?"], [asked.model]
    for metric in metrics:
        where.append(reader.known(connection, metric).replace(metric, _column(metric), 1))
    names = machines.known_as(connection, asked.machine)
    on_these = f"machine IN ({', '.join('?' * len(names))})"
    here = f"SELECT 1 FROM standing WHERE model = ? AND {on_these} LIMIT 1"
    if connection.execute(here, (asked.model, *names)).fetchone():
        where.append(f"s.{on_these}")
        values += names
    elif reader.machines(connection, asked.model) != 1:
        return []  # readings of several machines, or of none, do not rank by value: see `choose.ladder`
    for column, value in (("t.name", asked.target), ("s.workload", asked.workload)):
        if value is not None:
            where.append(f"{column} = ?")
            values.append(value)
    joins += ["JOIN target t ON t.digest = s.target"] * (asked.target is not None)
    sign = "" if METRICS[asked.objective].direction == "min" else "-"
    bounded = "".join(f", {_column(metric)} AS at_{metric}" for metric in asked.bounded)
    memory = "COALESCE(NULLIF(r.peak_memory_bytes, 0), 9e18) AS memory"
    found = connection.execute(
        f"SELECT {sign}{_column(asked.objective)} AS objective, {memory}, s.id AS standing{bounded} "
        f"FROM {' '.join(joins)} WHERE {' AND '.join(where)}",
        values,
    )
    return [tuple(row.values()) if isinstance(row, dict) else tuple(row) for row in found.fetchall()]


def _column(metric: str) -> str:
    return _TABLES[metric][0] if metric in _TABLES else f"r.{metric}"


def _inside(rows: list[Ranked], asked: Asked, slo: Slo) -> Iterator[Ranked]:
    bounds = [(3 + asked.bounded.index(b.metric), _HOLDS[b.operator], b.limit) for b in slo.bounds]
    return (row for row in rows if all(holds(row[at], limit) for at, holds, limit in bounds))


def _untied(connection: Connection, rows: Iterator[Ranked]) -> Iterator[int]:
    """Yield standings in order; ties are broken by the artifact's size, then by name."""
    for _, group in groupby(rows, key=lambda row: row[:2]):
        tied = [row[2] for row in group]
        yield from tied if len(tied) == 1 else _by_size(connection, tied)


def _by_size(connection: Connection, standings: list[int]) -> list[int]:
    query = (
        "SELECT a.size_bytes, s.variant, s.id FROM standing s JOIN variant v ON v.digest = s.variant "
        "LEFT JOIN artifact a ON a.digest = v.artifact WHERE s.id IN"
    )
    found: list[tuple[float, str, int]] = []
    for start in range(0, len(standings), 500):
        some = standings[start : start + 500]
        rows = connection.execute(f"{query} ({', '.join('?' * len(some))})", some)
        found += [(row[0] or math.inf, row[1], row[2]) for row in rows.fetchall()]
    return [standing for _, _, standing in sorted(found)]


def _whole(connection: Connection, standing: int) -> Row | None:
    place = connection.execute(
        "SELECT model, variant, machine, target, workload FROM standing WHERE id = ?", (standing,)
    ).fetchone()
    if place is None:
        return None
    names = ("model", "variant", "machine_digest", "target_digest", "workload")
    where = " AND ".join(f"{name} = ?" for name in names)
    row = connection.execute(f"SELECT * FROM variants WHERE {where}", [place[n] for n in range(len(names))]).fetchone()
    return None if row is None else machines.named([reader.decode(row)], connection)[0]
