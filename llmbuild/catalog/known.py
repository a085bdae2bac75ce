"""A catalog's data on a build, read with the standard library's sqlite3: a build with nothing to do needs no more.

The writer uses these reads too, so that both give the same results.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TypedDict

from llmbuild import digest
from llmbuild.catalog.place import PUBLISHED_FILE, exists
from llmbuild.catalog.store import BlobStore
from llmbuild.errors import CatalogError
from llmbuild.runtime import machines, reader
from llmbuild.runtime.connection import Fetched
from llmbuild.spec.machine import Machine
from llmbuild.spec.program import Program, abi_from
from llmbuild.spec.space import Point, Value
from llmbuild.spec.trial import FRONT, USABLE, Finished
from llmbuild.spec.variant import Artifact
from llmbuild.system.strict_json import JsonObject, loads

_FINISHED = """
SELECT v.point, v.digest, v.is_default FROM variant v JOIN trial t ON t.variant = v.digest
LEFT JOIN failure f ON f.id = t.failure WHERE t.scope = ? AND (t.failure IS NULL OR f.lasting)
"""
_DEFAULTS = "SELECT digest FROM variant WHERE is_default AND digest IN (SELECT variant FROM standing)"
_EARLIER = """
SELECT t.scope, p.abi, t.seconds FROM trial t JOIN variant v ON v.digest = t.variant
JOIN program p ON p.digest = v.program
WHERE t.failure IS NULL AND t.scope IN (SELECT scope FROM measurement WHERE machine = ?)
"""
_MADE = """
SELECT v.digest, v.artifact, p.parameters, p.module, p.checks,
CASE WHEN s.source IS NULL THEN v.tokenizer ELSE s.tokenizer END,
CASE WHEN s.source IS NULL THEN v.chat ELSE s.chat END
FROM variant v JOIN program p ON p.digest = v.program LEFT JOIN standing s ON s.variant = v.digest
WHERE v.artifact IS NOT NULL
"""


class State(TypedDict):
    """The progress of a build."""

    seconds: float
    raced: bool
    ended: str


class Known:
    """A catalog opened read-only. It has the newest schema: opening it as a `Catalog` would change nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.blobs = BlobStore(folder)

    def _rows(self, query: str, *values: object) -> list[Fetched]:
        with reader.opened(self.folder) as connection:
            return list(connection.execute(query, values).fetchall())

    def _names(self, query: str, *values: object) -> set[str]:
        return {row[0] for row in self._rows(query, *values)}

    # --- results ---------------------------------------------------------------------------------------------------

    def find_import(self, key: str) -> Program | None:
        """Return the program of an earlier import, if all its blobs are present."""
        query = 'SELECT p.* FROM program p JOIN "import" i ON i.program = p.digest WHERE i.key = ?'
        for row in self._rows(query, key):
            program = Program(row["module"], row["parameters"], row["checks"], abi_from(_parsed(row["abi"])))
            if all(self.blobs.intact(d) for d in (program.module, program.parameters, program.check)):
                return program
        return None

    def find_compile(self, key: str) -> Artifact | None:
        """Return the artifact of an earlier compile, if its blob is present and intact."""
        query = "SELECT a.* FROM artifact a JOIN compile c ON c.artifact = a.digest WHERE c.key = ?"
        found = [Artifact(row["digest"], row["size_bytes"], row["runtime"]) for row in self._rows(query, key)]
        return next((artifact for artifact in found if self.blobs.intact(artifact.digest)), None)

    def tunings(self, target: str, compiler: str) -> dict[str, str]:
        """Return the winning configurations on a target (its digest), by kind of dispatch."""
        rows = self._rows("SELECT inputs, configuration FROM dispatch_tuning WHERE configuration <> ''")
        found = [(_parsed(row["inputs"]), row["configuration"]) for row in rows]
        return {i["signature"]: c for i, c in found if (i["target"], i["compiler"]) == (target, compiler)}

    def lost(self) -> set[str]:
        """Return the variants with a missing or damaged file."""
        return set(self.lost_blobs())

    def lost_blobs(self) -> dict[str, set[str]]:
        """Return, by variant, its needed files that are missing or damaged.

        Files that `gc` removed, or a packed folder left out, count as missing only while their variant is on a front,
        or is a default that others are ranked and paired with.
        """
        gone = self._names("SELECT digest FROM collected")
        alive = self._names(f"SELECT variant FROM standing WHERE status IN ({_listed(FRONT)})") if gone else set()
        alive |= self._names(_DEFAULTS) if gone else set()
        whole: dict[str, bool] = {}
        found: dict[str, set[str]] = {}
        for variant, *names in map(tuple, self._rows(_MADE)):
            for name in filter(None, names):
                needed = name not in gone or variant in alive
                if needed and name not in whole:
                    whole[name] = self.blobs.intact(name)
                if needed and not whole[name]:
                    found.setdefault(variant, set()).add(name)
        return found

    # --- trials and builds ---------------------------------------------------------------------------------------

    def finished(self, scope: str) -> list[Finished]:
        """Return the finished trials of a scope, without their measurements."""
        told = "SELECT variant FROM measurement WHERE scope = ? AND CAST(notes AS TEXT) LIKE ?"
        reused = self._names(told, scope, '%"reused"%')
        rows = self._rows(_FINISHED, scope)
        return [Finished(_point(row[0]), row[1], bool(row[2]), row[1] in reused) for row in rows]

    def earlier(self, machine: str) -> list[tuple[int, float]]:
        """Return the builds with trials on a machine: the weights of each one's model, and its trials' mean seconds."""
        told: dict[str, list[tuple[int, float]]] = {}
        for scope, abi, seconds in map(tuple, self._rows(_EARLIER, machine)):
            told.setdefault(scope, []).append((int(_parsed(abi)["parameters"]), float(seconds)))
        return [(found[0][0], sum(s for _, s in found) / len(found)) for found in told.values()]

    def has_limits(self, machine: str) -> bool:
        """Return whether a machine's limits are known."""
        return bool(self._rows("SELECT machine FROM machine_limit WHERE machine = ?", machine))

    def usable(self, model: str, target: str, machine: str) -> int:
        """Return the number of usable variants of a recipe on a target and machine."""
        query = (
            "SELECT count(DISTINCT variant) FROM standing WHERE model = ? AND target = ? AND machine = ? "
            f"AND status IN ({_listed(USABLE)})"
        )
        return int(self._rows(query, model, target, machine)[0][0])

    def rankings(self, model: str, target: str, machine: str) -> set[str | None]:
        """Return the ranking digests of the standings of a recipe on a target and machine."""
        query = "SELECT DISTINCT ranking FROM standing WHERE model = ? AND target = ? AND machine = ?"
        return {row[0] for row in self._rows(query, model, target, machine)}

    def sources(self, model: str) -> set[str]:
        """Return the digests of the models that a name stands for: one, unless rows are older than these digests."""
        return self._names("SELECT DISTINCT source FROM standing WHERE model = ? AND source IS NOT NULL", model)

    def kinds(self, blobs: Iterable[str]) -> dict[str, str]:
        """Return the role of each of these blobs in the variants that need it."""
        asked, kinds = set(blobs), ("artifact", "parameters", "module", "checks", "tokenizer", "chat_template")
        rows = [tuple(row)[1:] for row in self._rows(_MADE)] if asked else []
        return {name: kind for row in rows for kind, name in zip(kinds, row, strict=True) if name in asked}

    def build_state(self, key: str) -> State | None:
        """Return the progress of a build: `seconds`, `raced`, `ended`."""
        rows = self._rows("SELECT seconds, raced, ended FROM build WHERE key = ?", key)
        return next((State(seconds=r[0], raced=bool(r[1]), ended=r[2]) for r in rows), None)

    def machine_known_as(self, fingerprint: str) -> tuple[str, ...]:
        """Return the digests that a machine is stored under; its fingerprint where it is not stored."""
        with reader.opened(self.folder) as connection:
            return machines.known_as(connection, fingerprint)

    def machine(self, name: str) -> Machine | None:
        """Return the machine stored under a digest."""
        with reader.opened(self.folder) as connection:
            return machines.stored(connection, name)

    def last_inputs(self, model: str) -> list[dict[str, object]]:
        """Return the inputs of a recipe's builds, the latest first."""
        rows = self._rows("SELECT inputs FROM build WHERE model = ? ORDER BY created_at DESC", model)
        return [dict(_parsed(row[0])) for row in rows]


def name_of(tunings: dict[str, str]) -> str:
    """Return the knob's name of a set of configurations; empty for none."""
    return digest.short(digest.of(tunings)) if tunings else ""


def is_current(folder: Path) -> bool:
    """Return whether a catalog can be read as `Known`; the writer reports errors of one that cannot."""
    if (folder / PUBLISHED_FILE).is_file():
        return False
    try:
        with reader.opened(folder) as connection:
            found = connection.execute("SELECT schema_version FROM info").fetchone()[0]
    except CatalogError:
        return False
    return bool(found == reader.SCHEMA_VERSIONS[-1])


@contextlib.contextmanager
def looked_at(folder: Path) -> Iterator[Known | None]:
    """Yield a catalog's data without changing it; None where there is no catalog yet."""
    if not exists(folder) or is_current(folder):
        yield Known(folder) if exists(folder) else None
        return
    from llmbuild.catalog.schema import migrated_copy

    with migrated_copy(folder) as copy:
        known = Known(copy)
        known.blobs = BlobStore(folder)
        yield known


def known_in(folder: Path) -> Known | None:
    """Yield a catalog's data, migrated to the newest schema; None where there is no catalog yet."""
    if not exists(folder):
        return None
    if not is_current(folder):
        from llmbuild.catalog.schema import open_engine

        open_engine(folder).dispose()
    return Known(folder)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _parsed(body: str | JsonObject) -> JsonObject:
    """Return a JSON column: SQLite's is text, a server's is parsed already."""
    return loads(body) if isinstance(body, str) else body


@lru_cache(1 << 14)
def _of_text(text: str) -> Point:
    return Point.of(loads(text))


def _point(body: str | Mapping[str, Value]) -> Point:
    return _of_text(body) if isinstance(body, str) else Point.of(body)
