"""The interface of a place for publishing and pulling."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from llmbuild.system.strict_json import JsonObject

if TYPE_CHECKING:
    from llmbuild.catalog.exchange.publication import Publication


Pointer = JsonObject


class Remote(Protocol):
    """A place for publishing and pulling; every error is a `CatalogError`."""

    location: str

    def ready(self) -> None:
        """Refuse a place that cannot be published to, before any upload."""

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Lock out other publishers meanwhile, as far as the place can."""

    def pointer(self) -> bytes | None:
        """Return the current pointer; None where nothing is published yet."""

    def has(self, digest: str, size: int) -> bool:
        """Return whether a blob is uploaded completely."""

    def put(self, digest: str, path: Path) -> None:
        """Upload a blob."""

    def fetch(self, digest: str, path: Path) -> None:
        """Download a blob to a file; the caller checks its bytes."""

    def finish(self, pointer: Pointer, publication: Publication) -> None:
        """Make the uploaded publication current, atomically."""
