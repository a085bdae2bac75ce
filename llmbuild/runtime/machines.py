"""Digests under which a catalog stores a machine: earlier llmbuild versions included more fields in the digest.

Rows keep the digest that they were stored under, and are read with the machine's present fingerprint, so that nothing
already measured is measured again.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Final

from llmbuild import digest
from llmbuild.runtime.connection import Connection
from llmbuild.spec.machine import Machine, machine_from
from llmbuild.spec.rows import Row

STORED: Final = "machine_stored"
"""The column of a row with the stored machine digest."""


def fingerprints(connection: Connection) -> dict[str, str]:
    """Return the fingerprint of every machine of a catalog, by its stored digest."""
    found = connection.execute("SELECT digest, body FROM machine").fetchall()
    return {row[0]: _fingerprint(row[1] if isinstance(row[1], str) else json.dumps(row[1])) or row[0] for row in found}


def known_as(connection: Connection, fingerprint: str) -> tuple[str, ...]:
    """Return the digests that a machine is stored under; its fingerprint where the catalog does not have it."""
    return tuple(name for name, found in fingerprints(connection).items() if found == fingerprint) or (fingerprint,)


def stored(connection: Connection, name: str) -> Machine | None:
    """Return the machine stored under a digest; None where there is none, or its record is damaged."""
    row = connection.execute("SELECT body FROM machine WHERE digest = ?", (name,)).fetchone()
    return None if row is None else _machine(row[0] if isinstance(row[0], str) else json.dumps(row[0]))


def named(rows: list[Row], connection: Connection) -> list[Row]:
    """Return rows of a catalog with the present fingerprints of their machines."""
    found = fingerprints(connection)
    return [
        {**r, "machine_digest": found.get(r["machine_digest"], r["machine_digest"]), STORED: r["machine_digest"]}
        for r in rows
    ]


@lru_cache(256)
def _fingerprint(body: str) -> str:
    machine = _machine(body)
    return "" if machine is None else digest.of(machine)


def _machine(body: str) -> Machine | None:
    try:
        return machine_from(json.loads(body))
    except (TypeError, KeyError, ValueError, AttributeError):
        return None
