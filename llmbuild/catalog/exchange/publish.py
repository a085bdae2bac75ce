"""Upload the fronts of a catalog to a place that others pull from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from llmbuild.catalog.exchange.interface import Pointer, Remote
from llmbuild.catalog.exchange.publication import Publication, prepare
from llmbuild.catalog.exchange.remote import remote
from llmbuild.catalog.exchange.signing import sign
from llmbuild.catalog.references import RECORDS
from llmbuild.catalog.schema import database_errors, now
from llmbuild.catalog.writer import Catalog
from llmbuild.errors import CatalogError
from llmbuild.runtime.trust import pointer_of

Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Sent:
    """The result of a publication: its digest, the number of its blobs, the bytes sent, and whether it is new."""

    digest: str
    blobs: int
    bytes: int
    sent_blobs: int
    sent_bytes: int
    changed: bool
    signed: bool


def publish(
    catalog: Catalog,
    models: Sequence[str],
    location: str,
    key: Path | None,
    tell: Tell = lambda what, done, total: None,
) -> Sent:
    """Publish the fronts of `models` (default: all), signed where a `key` is given.

    Blobs of an earlier, interrupted upload are not sent again. The pointer is replaced last, atomically.

    Raises:
        CatalogError, InputError: the catalog, the place or the key is invalid.
    """
    place = remote(location)
    place.ready()
    with TemporaryDirectory(prefix="llmbuild-") as name:
        folder = Path(name)
        publication = prepare(catalog, models, folder)
        signature = sign(publication.manifest, key) if key else None
        done = _published(place, publication, signature, folder, tell)
    _record(catalog, publication)
    return done


def _published(place: Remote, publication: Publication, signature: str | None, folder: Path, tell: Tell) -> Sent:
    with place.alone():
        sent = _send(place, publication, folder, tell)
        pointer: Pointer = {"manifest": publication.digest, "published_at": now()}
        if signature:
            pointer["signature"] = signature
        changed = not _same(place, pointer)
        if changed:
            place.finish(pointer, publication)
    return Sent(publication.digest, len(publication.blobs), *sent, changed, signature is not None)


def _send(place: Remote, publication: Publication, folder: Path, tell: Tell) -> tuple[int, int, int]:
    """Send missing blobs; return the bytes of all, and the numbers of sent blobs and bytes."""
    manifest = folder / "manifest.json"
    manifest.write_bytes(publication.manifest)
    blobs = {**publication.blobs, publication.digest: manifest}
    total, done, count, sent = sum(p.stat().st_size for p in blobs.values()), 0, 0, 0
    for name, path in blobs.items():
        size = path.stat().st_size
        if not place.has(name, size):
            place.put(name, path)
            count, sent = count + 1, sent + size
        done += size
        tell(name, done, total)
    return total, count, sent


def _same(place: Remote, pointer: Pointer) -> bool:
    """Return whether this publication is already current; Ed25519 signatures are deterministic."""
    there = place.pointer()
    if there is None:
        return False
    found = pointer_of(there, place.location)
    return (found["manifest"], found.get("signature")) == (pointer["manifest"], pointer.get("signature"))


def _record(catalog: Catalog, publication: Publication) -> None:
    """Keep a copy of the manifest, so that `gc` keeps its blobs."""
    folder = catalog.folder / RECORDS
    try:
        with database_errors(catalog.folder):
            folder.mkdir(exist_ok=True)
            temporary = folder / f".{publication.digest}"
            temporary.write_bytes(publication.manifest)
            temporary.replace(folder / f"{publication.digest}.json")
    except CatalogError:
        raise CatalogError(f"{folder}: published, but the record for `llmbuild gc` cannot be written") from None
