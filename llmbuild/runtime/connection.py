"""A catalog's database as its readers see it: SQLite's own connection, or a server's that takes the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

Cells = Any
"""A row of a query: cells by name and by number, of whatever type the database says."""


class Found(Protocol):
    """What a query found."""

    @property
    def description(self) -> Cells:
        """The columns, each a tuple that begins with its name."""

    def fetchone(self) -> Cells:
        """Return the next row; None after the last."""

    def fetchall(self) -> list[Cells]:
        """Return all rows that are left."""

    def __iter__(self) -> Iterator[Cells]: ...


class Connection(Protocol):
    """What runs queries."""

    def execute(self, query: str, values: Sequence[object] = ..., /) -> Found:
        """Run a query, with a value for each `?` in it."""

    def close(self) -> None:
        """Release the database."""
