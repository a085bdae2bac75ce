"""Pull a publication: its manifest is checked first, then the requested blobs are fetched and verified."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from llmbuild.catalog import locks
from llmbuild.catalog.exchange.interface import Remote
from llmbuild.catalog.exchange.remote import remote, renamed, replaced, reported_by_place
from llmbuild.catalog.location import folder as folder_of
from llmbuild.catalog.location import is_url, resolved
from llmbuild.catalog.place import FILE, PUBLISHED_FILE, exists
from llmbuild.catalog.store import BlobStore
from llmbuild.errors import CatalogError, InputError, LoadRefused, NoVariant
from llmbuild.runtime import reader
from llmbuild.runtime.choose import choose, nothing_chosen
from llmbuild.runtime.model import LOADED, host_facts
from llmbuild.runtime.trust import Policy, checked, pointer_of, signer
from llmbuild.spec.rows import Row
from llmbuild.spec.slo import Slo
from llmbuild.system.paths import real
from llmbuild.system.strict_json import JsonObject, dumps

if TYPE_CHECKING:
    from llmbuild.catalog.writer import Catalog

Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Wanted:
    """What to fetch: the variants that an SLO picks on this host, one for each model, or everything."""

    slo: Slo
    models: Sequence[str] = ()
    target: str | None = None
    workload: str | None = None
    everything: bool = False


@dataclass(frozen=True)
class Pulled:
    """The fetched bytes, the signing key, and the picked rows."""

    digest: str
    rows: tuple[Row, ...]
    fetched_blobs: int
    fetched_bytes: int
    left_bytes: int
    signed_by: str


@dataclass(frozen=True)
class _Source:
    place: Remote
    pointer: JsonObject
    manifest: bytes
    body: JsonObject


def pull(location: str, into: Path, wanted: Wanted, rule: Policy, tell: Tell = lambda w, d, t: None) -> Pulled:
    """Fetch from a publication into a folder; into a catalog that is built in, everything is merged.

    Nothing is fetched when nothing meets the SLO on this host. A reader of `into` sees either the previous publication
    or this one, complete.

    Raises:
        CatalogError, InputError, LoadRefused, NoVariant: what is wrong, where, and what to do.
    """
    local = not is_url(location) or location.lower().startswith("file://")
    if local and real(folder_of(location)) == real(into):
        raise InputError(f"{location}: is where it would be pulled into: name another folder with -C")
    source = _source(location, rule)
    built = exists(into) and not (into / PUBLISHED_FILE).is_file()
    store = BlobStore(into)
    with TemporaryDirectory(prefix="llmbuild-") as name:
        database = _database(source, Path(name))
        rows = _picked(Path(name), wanted)
        complete = wanted.everything or built
        blobs = _needed(source.body, rows, complete)
        before = sum(store.intact(b) for b in blobs)
        if built:
            fetched = _fetch(source, store, blobs, tell)
            _merge(Path(name), into)
        else:
            with reported_by_place(str(into)), locks.held(into / locks.PUBLISHING), replaced(into):
                fetched = _fetch(source, store, blobs, tell)
                _mirror(source, store, into, database, complete)
    total = sum(entry["bytes"] for entry in source.body["blobs"].values())
    who = signer(source.pointer, source.manifest, rule, location)
    return Pulled(
        source.pointer["manifest"], tuple(rows), len(blobs) - before, fetched, total - _size(source.body, blobs), who
    )


def rows_only(location: str, folder: Path, rule: Policy) -> None:
    """Fetch a publication's database into an empty, temporary folder."""
    _database(_source(location, rule), folder)


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Catalog]:
    """Open a published folder for reading through the models: its rows are copied, its blobs are used in place."""
    from llmbuild.catalog.writer import Catalog

    with TemporaryDirectory(prefix="llmbuild-") as name:
        shutil.copyfile(reader.database(folder), Path(name) / FILE)
        catalog = Catalog(Path(name))
        catalog.blobs = BlobStore(folder)
        try:
            yield catalog
        finally:
            catalog.close()


def _source(location: str, rule: Policy) -> _Source:
    place = remote(location)
    data = place.pointer()
    if data is None:
        raise CatalogError(f"{location}: nothing is published there: `llmbuild publish {location}` does")
    pointer = pointer_of(data, location)
    with TemporaryDirectory(prefix="llmbuild-") as name:
        path = Path(name) / "manifest.json"
        place.fetch(pointer["manifest"], path)
        manifest = path.read_bytes()
    return _Source(place, pointer, manifest, checked(pointer, manifest, rule, location))


def _database(source: _Source, folder: Path) -> Path:
    entry = source.body["catalog"]
    scratch = BlobStore(folder)
    _take(source, scratch, entry["digest"], "database")
    path = folder / FILE
    shutil.copyfile(scratch.path(entry["digest"]), path)
    return path


def _take(source: _Source, store: BlobStore, name: str, kind: str) -> None:
    def fetch(path: Path) -> None:
        try:
            source.place.fetch(name, path)
        except CatalogError as error:
            if not source.pointer.get("partial"):
                raise
            whole = source.pointer.get("source", "where it came from")
            raise CatalogError(
                f"{source.place.location}: was pulled in part and lacks {kind} {name[:12]}: pull from {whole}"
            ) from error

    if not store.take(name, fetch):
        raise LoadRefused(
            f"{source.place.location}: {kind} {name[:12]} has other bytes than the manifest says: it was changed or "
            "cut short after it was published; have it published again"
        )


def _picked(folder: Path, wanted: Wanted) -> list[Row]:
    """Return the row that the SLO picks on this host for each requested model.

    Raises:
        InputError: no such model is published.
        NoVariant: nothing of a model meets the SLO here.
    """
    there = reader.models(folder)
    absent = sorted(set(wanted.models) - set(there))
    if absent:
        raise InputError(f"no model {', '.join(absent)} is published there: it has {', '.join(there)}")
    if wanted.everything:
        return []
    picked = []
    for model in wanted.models or there:
        rows = reader.variants(folder, model, wanted.target, wanted.workload, everything=True)
        made = choose(rows, host_facts(), wanted.slo)
        if made.chosen is None:
            raise NoVariant(nothing_chosen(made, wanted.slo, model), made)
        picked.append(made.chosen)
    return picked


def _needed(body: JsonObject, rows: Sequence[Row], complete: bool) -> list[str]:
    if complete:
        return sorted(body["blobs"])
    named = {name for row in rows for kind in LOADED if (name := row.get(kind))}
    if named - set(body["blobs"]):
        raise LoadRefused("the published database names blobs that its manifest does not: have it published again")
    return sorted(named)


def _size(body: JsonObject, blobs: Sequence[str]) -> int:
    return sum(int(body["blobs"][name]["bytes"]) for name in blobs)


def _fetch(source: _Source, store: BlobStore, blobs: Sequence[str], tell: Tell) -> int:
    total, done, fetched = _size(source.body, blobs), 0, 0
    for name in blobs:
        entry = source.body["blobs"][name]
        if not store.intact(name):
            _take(source, store, name, entry["kind"])
            fetched += entry["bytes"]
        done += entry["bytes"]
        tell(name, done, total)
    return fetched


def _mirror(source: _Source, store: BlobStore, into: Path, database: Path, complete: bool) -> None:
    """Make `into` a publication with the fetched blobs; the pointer is replaced last."""
    store.put_bytes(source.manifest)
    name = store.put_file(database)
    pointer = {**source.pointer, "source": resolved(source.place.location), "partial": not complete}
    for file, data in ((PUBLISHED_FILE, dumps(pointer, indent=1).encode() + b"\n"), (FILE, None)):
        with reported_by_place(str(into)):
            renamed(into / file, store.path(name).read_bytes() if data is None else data)


def _merge(folder: Path, into: Path) -> None:
    from llmbuild.catalog.exchange.merge import merge
    from llmbuild.catalog.writer import Catalog

    catalog, arrived = Catalog(into), Catalog(folder)
    try:
        arrived.blobs = catalog.blobs
        merge(arrived, catalog)
    finally:
        arrived.close()
        catalog.close()
