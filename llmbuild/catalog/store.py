"""The blob store: files named by the sha256 of their bytes, written atomically."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from llmbuild.errors import CatalogError

_CHUNK = 1 << 20

SEALED_NS = 10**18
"""Modification time of every blob: a write changes it, so that modified blobs are found cheaply."""


class _OtherBytes(Exception):
    """The received bytes are not those of the requested blob."""


class BlobStore:
    """`blobs/sha256/ab/<digest>` under a catalog's folder."""

    def __init__(self, folder: Path) -> None:
        self.root = folder.absolute() / "blobs" / "sha256"  # children that receive a path work in another folder

    def path(self, digest: str) -> Path:
        """Return the path of a blob, present or not."""
        return self.root / digest[:2] / digest

    def has(self, digest: str) -> bool:
        """Return whether a blob is present; its bytes are not read."""
        return self.path(digest).is_file()

    def find(self, prefix: str) -> str | None:
        """Return the digest of a blob by its prefix."""
        return next((path.name for path in sorted(self.path(prefix).parent.glob(f"{prefix}*"))), None)

    def put_file(self, source: Path, moved: bool = False, digest: str = "") -> str:
        """Copy a file in and return its digest, which is not computed where it is given; a present blob is unchanged.

        The bytes are written to a temporary name, synced, then renamed: a reader sees all of them or none. A file that
        may be `moved` is renamed instead of copied on the same file system: no other process may have it open for
        writing.

        Raises:
            CatalogError: the store cannot be written, or the disk is full; no partial file remains.
        """
        digest = digest or _digest_of(source)
        final = self.path(digest)
        if final.is_file() and final.stat().st_size == source.stat().st_size and _digest_of(final) == digest:
            return digest
        with self._arriving(final) as temporary:
            if not (moved and _renamed(source, temporary)):
                with open(temporary, "wb") as out, open(source, "rb") as data:
                    shutil.copyfileobj(data, out, _CHUNK)
        return digest

    def take(self, digest: str, write: Callable[[Path], None]) -> bool:
        """Let `write` fetch a blob and keep it only if its bytes match its digest; return whether they do."""
        if self.intact(digest):
            return True
        try:
            with self._arriving(self.path(digest)) as temporary:
                write(temporary)
                if _digest_of(temporary) != digest:
                    raise _OtherBytes
        except _OtherBytes:
            return False
        return True

    @contextlib.contextmanager
    def _arriving(self, final: Path) -> Iterator[Path]:
        """Yield an empty temporary file; it is synced, sealed and renamed, or removed on failure."""
        with _storage_errors(self.root):
            final.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=".put-", dir=final.parent)
            os.close(handle)
            temporary = Path(name)
            try:
                yield temporary
                with open(temporary, "rb") as data:
                    os.fsync(data.fileno())
                temporary.chmod(0o444)
                _seal(temporary)
                temporary.replace(final)
                _sync_folder(final.parent)
            finally:
                temporary.unlink(missing_ok=True)

    def put_bytes(self, data: bytes) -> str:
        """Store bytes and return their digest."""
        with _storage_errors(self.root), tempfile.NamedTemporaryFile() as file:
            file.write(data)
            file.flush()
            return self.put_file(Path(file.name))

    def verify(self, digest: str) -> bool:
        """Return whether a blob is present and its bytes match its digest."""
        path = self.path(digest)
        return path.is_file() and _digest_of(path) == digest

    def intact(self, digest: str) -> bool:
        """Return the same as `verify`, but read only blobs that were modified or copied after they were stored."""
        path = self.path(digest)
        try:
            if path.stat().st_mtime_ns == SEALED_NS:
                return True
        except OSError:
            return False
        whole = self.verify(digest)
        if whole:
            with contextlib.suppress(OSError):
                _seal(path)
        return whole

    def digests(self) -> Iterator[tuple[str, int]]:
        """Yield the digest and the size in bytes of every blob.

        Raises:
            OSError: a folder cannot be read; its blobs would count as lost.
        """
        folders = sorted(self.root.iterdir()) if self.root.is_dir() else []
        for folder in (path for path in folders if len(path.name) == 2 and path.is_dir()):
            for path in sorted(folder.iterdir()):
                if not path.name.startswith("."):
                    with contextlib.suppress(FileNotFoundError):
                        yield path.name, path.stat().st_size

    def leftovers(self) -> Iterator[Path]:
        """Yield the temporary files of killed processes."""
        yield from sorted(self.root.glob("??/.put-*"))

    def remove(self, digest: str) -> int:
        """Remove a blob and return the freed bytes; processes that have it open or mapped keep it."""
        path = self.path(digest)
        try:
            size = path.stat().st_size
            path.unlink()
        except FileNotFoundError:
            return 0
        return size


def _renamed(source: Path, path: Path) -> bool:
    """Return whether a file can be renamed: not from another file system, nor with another owner."""
    try:
        source.replace(path)
    except OSError:
        return False
    return True


def _seal(path: Path) -> None:
    os.utime(path, ns=(SEALED_NS, SEALED_NS))


def _digest_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _storage_errors(root: Path) -> Iterator[None]:
    try:
        yield
    except NotADirectoryError:
        raise CatalogError(f"cannot write to {root}: a file is in the way: name another folder") from None
    except OSError as error:
        raise CatalogError(f"cannot write to {root}: {error.strerror or error}; what was finished is kept") from None
