"""What publishing and pulling need of a place, whatever kind it is."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from llmbuild.system.strict_json import JsonObject

if TYPE_CHECKING:
    from llmbuild.catalog.exchange.publication import Publication


Pointer = JsonObject


class Remote(Protocol):
    """What publishing and pulling need of a place; every error is a `CatalogError`."""

    location: str

    def ready(self) -> None:
        """Refuse a place that cannot be published to, before anything is sent."""

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Keep others from publishing there meanwhile, as far as the place can."""

    def pointer(self) -> bytes | None:
        """Return the pointer as it stands; None where nothing is published yet."""

    def has(self, digest: str, size: int) -> bool:
        """Say whether a blob was sent whole."""

    def put(self, digest: str, path: Path) -> None:
        """Send a blob."""

    def fetch(self, digest: str, path: Path) -> None:
        """Write a blob to a file; its bytes are checked by the caller."""

    def finish(self, pointer: Pointer, publication: Publication) -> None:
        """Make what was sent current, all at once."""
