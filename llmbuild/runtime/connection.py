"""The readers' interface to a catalog's database: an SQLite connection, or a server's with the same methods."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

Fetched = Any
"""A row of a query: cells by name and by index, of any type."""


class Found(Protocol):
    """The result of a query."""

    @property
    def description(self) -> Fetched:
        """The columns, each a tuple whose first item is the name."""

    def fetchone(self) -> Fetched:
        """Return the next row; None after the last."""

    def fetchall(self) -> list[Fetched]:
        """Return all remaining rows."""

    def __iter__(self) -> Iterator[Fetched]: ...


class Connection(Protocol):
    """Runs queries."""

    def execute(self, query: str, values: Sequence[object] = ..., /) -> Found:
        """Run a query, with a value for each `?` in it."""

    def close(self) -> None:
        """Release the database."""
