"""Places of publications: a folder, or any fsspec file system. Blobs first, then one small pointer.

The pointer is the only file that changes, and it is replaced atomically: a reader sees either the previous publication
or the new one, complete. Blobs are named by their digests, so a resumed upload does not send them again.
"""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from llmbuild.catalog import locks
from llmbuild.catalog.exchange.interface import Pointer, Remote
from llmbuild.catalog.exchange.oci import Registry
from llmbuild.catalog.location import OCI, bucket, folder, is_url
from llmbuild.catalog.place import FILE, PUBLISHED_FILE, exists
from llmbuild.catalog.store import BlobStore
from llmbuild.errors import CatalogError, InputError, LoadRefused
from llmbuild.runtime.trust import published
from llmbuild.system.extras import advice
from llmbuild.system.strict_json import dumps, loads

if TYPE_CHECKING:
    from llmbuild.catalog.exchange.publication import Publication


def remote(location: str) -> Remote:
    """Return the place of a folder or URL.

    Raises:
        InputError: a URL whose library is not installed, or of an unknown kind.
    """
    if location.startswith(OCI):
        return Registry(location)
    if is_url(location) and not location.lower().startswith("file://"):
        return Filesystem(location)
    return Folder(location)


class Folder:
    """A folder on this machine; `catalog.sqlite` in it is a copy for any SQLite client."""

    def __init__(self, location: str) -> None:
        self.location = location
        self.folder = folder(location)
        self.blobs = BlobStore(self.folder)

    def ready(self) -> None:
        """Refuse a folder in which a catalog is built."""
        with reported_by_place(self.location):
            if exists(self.folder) and not (self.folder / PUBLISHED_FILE).is_file():
                raise CatalogError(f"{self.location}: holds a catalog that is built in: publish to another folder")

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Lock the folder: another publisher's new blobs would look unused."""
        with reported_by_place(self.location), locks.held(self.folder / locks.PUBLISHING):
            yield

    def pointer(self) -> bytes | None:
        """Return the current pointer."""
        with reported_by_place(self.location):
            path = self.folder / PUBLISHED_FILE
            return path.read_bytes() if path.is_file() else None

    def has(self, digest: str, size: int) -> bool:
        """Return whether a blob is present; it is renamed into place when complete."""
        path = self.blobs.path(digest)
        return path.is_file() and path.stat().st_size == size

    def put(self, digest: str, path: Path) -> None:
        """Copy a blob in."""
        self.blobs.put_file(path)

    def fetch(self, digest: str, path: Path) -> None:
        """Copy a blob out."""
        with reported_by_place(self.location):
            shutil.copyfile(self.blobs.path(digest), path)

    def finish(self, pointer: Pointer, publication: Publication) -> None:
        """Rename the pointer into place."""
        body = loads(publication.manifest)
        with reported_by_place(self.location), replaced(self.folder):
            renamed(self.folder / PUBLISHED_FILE, (dumps(pointer, indent=1) + "\n").encode())
            renamed(self.folder / FILE, self.blobs.path(body["catalog"]["digest"]).read_bytes())


@contextlib.contextmanager
def replaced(folder: Path) -> Iterator[None]:
    """After the pointer is replaced, remove the blobs that are in neither the new nor the previous publication.

    The previous one is kept for readers of its pointer that have not opened its files yet; open files survive their
    removal. Where the previous publication is unknown, nothing is removed.
    """
    before = _named(folder)
    yield
    now = _named(folder)
    if not before or not now:
        return
    store = BlobStore(folder)
    for name in [name for name, _ in store.digests() if name not in before | now]:
        store.remove(name)
    for path in store.leftovers():
        path.unlink(missing_ok=True)


def _named(folder: Path) -> frozenset[str]:
    """Return the blobs of a folder's current publication and its manifest; none where nothing is published."""
    try:
        pointer, body = published(folder)
    except LoadRefused:
        return frozenset()
    return frozenset((pointer["manifest"], body["catalog"]["digest"], *body["blobs"]))


def renamed(path: Path, data: bytes) -> None:
    """Write a file that is read-only afterwards; it appears, or replaces an earlier one, atomically."""
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(data)
        temporary.chmod(0o444)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class Filesystem:
    """Any fsspec URL: s3, gs, az, sftp, memory, ..."""

    OBJECTS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "memory")
    """File systems with atomic writes of a file; on others it is renamed into place."""

    def __init__(self, location: str) -> None:
        try:
            import fsspec
        except ImportError as error:
            raise InputError(f"{location}: needs fsspec: {advice(error, 'publish')}") from None
        self.location = bucket(location)
        try:
            with reported_by_place(location):
                self.system, self.root = fsspec.core.url_to_fs(self.location)
        except (ImportError, ValueError, TypeError) as error:
            raise InputError(f"{location}: {error}") from None
        protocol = self.system.protocol
        self.whole = bool(set([protocol] if isinstance(protocol, str) else protocol) & set(self.OBJECTS))

    def ready(self) -> None:
        """Accept any place: nothing is built in one."""

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Do nothing: no blob is ever removed there."""
        return contextlib.nullcontext()

    def _path(self, digest: str) -> str:
        return f"{self.root}/blobs/sha256/{digest[:2]}/{digest}"

    def pointer(self) -> bytes | None:
        """Return the current pointer."""
        with reported_by_place(self.location):
            self.system.invalidate_cache()
            try:
                return bytes(self.system.cat_file(f"{self.root}/{PUBLISHED_FILE}"))
            except FileNotFoundError:
                return None

    def has(self, digest: str, size: int) -> bool:
        """Return whether a blob is uploaded completely."""
        with reported_by_place(self.location):
            try:
                return int(self.system.info(self._path(digest))["size"]) == size
            except FileNotFoundError:
                return False

    def put(self, digest: str, path: Path) -> None:
        """Upload a blob."""
        with reported_by_place(self.location):
            self._write(self._path(digest), path)

    def _write(self, name: str, path: Path) -> None:
        if self.whole:
            self.system.put_file(str(path), name)
            return
        temporary = f"{name}.{uuid.uuid4().hex}.part"
        self.system.makedirs(name.rsplit("/", 1)[0], exist_ok=True)
        self.system.put_file(str(path), temporary)
        self._rename(temporary, name)

    def _rename(self, source: str, name: str) -> None:
        from fsspec.spec import AbstractFileSystem

        if type(self.system).mv is AbstractFileSystem.mv:  # it interprets `?`, `*` and `[` of a path as a pattern
            self.system.cp_file(source, name)
            self.system.rm_file(source)
        else:
            self.system.mv(source, name)

    def fetch(self, digest: str, path: Path) -> None:
        """Download a blob to a file."""
        with reported_by_place(self.location):
            self.system.get_file(self._path(digest), str(path))

    def finish(self, pointer: Pointer, publication: Publication) -> None:
        """Replace the pointer."""
        data = (dumps(pointer, indent=1) + "\n").encode()
        with reported_by_place(self.location):
            if self.whole:
                self.system.pipe_file(f"{self.root}/{PUBLISHED_FILE}", data)
                return
            temporary = f"{self.root}/.{uuid.uuid4().hex}.part"
            self.system.pipe_file(temporary, data)
            self._rename(temporary, f"{self.root}/{PUBLISHED_FILE}")


CLIENTS = ("botocore", "aiobotocore", "google", "gcsfs", "aiohttp", "requests")
"""Libraries whose errors concern the place and are not llmbuild's bugs."""


@contextlib.contextmanager
def reported_by_place(location: str) -> Iterator[None]:
    """Turn an error of a file system or a network into one message."""
    try:
        yield
    except FileNotFoundError as error:
        raise CatalogError(f"{location}: not there: {error}") from None
    except OSError as error:
        raise CatalogError(
            f"{location}: cannot be used: {error.strerror or error}; run the same command again"
        ) from None
    except ValueError as error:  # the library detects an invalid URL only on use
        raise InputError(f"{location}: no place that can be used: {error}") from None
    except Exception as error:  # each kind of place has its own library, which is not imported only to name its errors
        if type(error).__module__.split(".")[0] not in CLIENTS:
            raise
        raise CatalogError(f"{location}: cannot be used: {type(error).__name__}: {error}") from None
