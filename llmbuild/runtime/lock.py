"""`llmbuild.lock`: one pick, pinned by digests, so that each deployment opens the same bytes until the next pick."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from llmbuild.errors import InputError, LoadRefused
from llmbuild.runtime.machines import STORED
from llmbuild.spec.pick import Pick
from llmbuild.spec.rows import Row, cells
from llmbuild.spec.slo import METRICS
from llmbuild.system.strict_json import JsonObject, dumps, loads

VERSION = 1
PINNED = ("artifact", "parameters", "tokenizer", "runtime")
CHAT = "chat"
"""The chat template is pinned too; lock files of earlier llmbuild versions, and their catalogs, have no such key."""
PLACE = ("model", "variant", "target_digest", "machine_digest", "workload")


def pinned(made: Pick) -> dict[str, object]:
    """Return the contents of a lock file: the variant, its files, the request, and the readings."""
    row = made.chosen
    assert row is not None
    return {
        "version": VERSION,
        **cells(row, (*PLACE, "target", "machine", *PINNED)),
        CHAT: row.get(CHAT),
        "requires": row["target_body"]["requires"],
        "slo": [str(bound) for bound in made.slo.bounds],
        "objective": made.slo.objective,
        "metrics": cells(row, (name for name in METRICS if row.get(name) is not None)),
    }


def write(made: Pick, path: Path) -> None:
    """Write a lock file; it replaces an earlier one at once.

    Raises:
        InputError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.new")
    try:
        temporary.write_text(dumps(pinned(made), indent=1) + "\n")
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"{path}: the lock cannot be written: {error.strerror or error}") from None


def read(path: Path) -> JsonObject:
    """Return what a lock file pins.

    Raises:
        InputError: missing, or not an llmbuild lock file.
    """
    try:
        found = loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}: `llmbuild pick --lock {path}` writes one") from None
    except ValueError:
        found = None
    if not isinstance(found, dict) or any(not isinstance(found.get(name), str) for name in (*PLACE, "objective")):
        raise InputError(f"{path}: not a lock file: `llmbuild pick --lock {path}` writes one")
    if found.get("version") != VERSION:
        raise InputError(f"{path}: a lock file of version {found.get('version')}, this llmbuild reads {VERSION}")
    return found


def row_of(lock: JsonObject, rows: list[Row], path: Path) -> Row:
    """Return the row of a catalog that a lock pins.

    Raises:
        LoadRefused: the catalog does not have it, or has it with other files.
    """
    again = f"`llmbuild pick --lock {path}` pins what there is now"
    # Lock files of earlier llmbuild versions pin the digest that the machine is stored under.
    as_stored: Iterator[Mapping[str, object]] = ({**r, "machine_digest": r.get(STORED)} for r in rows)
    pairs = [*zip(rows, rows, strict=True), *zip(rows, as_stored, strict=True)]
    row = next((r for r, told in pairs if cells(told, PLACE) == cells(lock, PLACE)), None)
    if row is None:
        raise LoadRefused(f"{path}: variant {lock['variant'][:12]} is not in this catalog: pull it, or {again}")
    for name, there in {**cells(row, PINNED), **({CHAT: row.get(CHAT)} if CHAT in lock else {})}.items():
        if there != lock.get(name):
            raise LoadRefused(f"{path}: pins {name} {lock.get(name)}, this catalog has {there}: {again}")
    return row
