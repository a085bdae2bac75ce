"""The blob store: files named by the sha256 of their bytes, never seen half-written."""

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
"""Modification time of every blob: whoever writes to one moves it, so that a changed blob is cheap to suspect."""


class _OtherBytes(Exception):
    """What was brought is not the blob that was asked for."""


class BlobStore:
    """`blobs/sha256/ab/<digest>` under a catalog's folder."""

    def __init__(self, folder: Path) -> None:
        self.root = folder.absolute() / "blobs" / "sha256"  # children that are handed a path work elsewhere

    def path(self, digest: str) -> Path:
        """Return where a blob is or would be."""
        return self.root / digest[:2] / digest

    def has(self, digest: str) -> bool:
        """Say whether a blob is there; its bytes are not read."""
        return self.path(digest).is_file()

    def find(self, prefix: str) -> str | None:
        """Return the name of a blob by its beginning."""
        return next((path.name for path in sorted(self.path(prefix).parent.glob(f"{prefix}*"))), None)

    def put_file(self, source: Path, moved: bool = False) -> str:
        """Copy a file in and return its digest; what is there already stays as it is.

        The bytes go to a temporary name, are synced, then renamed: a reader sees all of them or none. A file that may
        be `moved` is not copied where both are on one file system: nobody else may have it open for writing.

        Raises:
            CatalogError: the store cannot be written, or the disk is full; nothing half-written stays.
        """
        digest = _digest_of(source)
        final = self.path(digest)
        if final.is_file() and final.stat().st_size == source.stat().st_size and _digest_of(final) == digest:
            return digest
        with self._arriving(final) as temporary:
            if not (moved and _renamed(source, temporary)):
                with open(temporary, "wb") as out, open(source, "rb") as data:
                    shutil.copyfileobj(data, out, _CHUNK)
        return digest

    def take(self, digest: str, write: Callable[[Path], None]) -> bool:
        """Let `write` bring a blob from elsewhere and keep it only if its bytes are those of its name; say whether."""
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
        """Give an empty temporary file to fill; it is synced, sealed and renamed, or removed where that fails."""
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
        """Say whether a blob is there and its bytes are those it is named by."""
        path = self.path(digest)
        return path.is_file() and _digest_of(path) == digest

    def intact(self, digest: str) -> bool:
        """Say the same as `verify`, reading only a blob that was written to, or copied, after it was stored."""
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
        """Yield the name and the size in bytes of every blob.

        Raises:
            OSError: a folder cannot be read, whose blobs would look lost.
        """
        folders = sorted(self.root.iterdir()) if self.root.is_dir() else []
        for folder in (path for path in folders if len(path.name) == 2 and path.is_dir()):
            for path in sorted(folder.iterdir()):
                if not path.name.startswith("."):
                    with contextlib.suppress(FileNotFoundError):
                        yield path.name, path.stat().st_size

    def leftovers(self) -> Iterator[Path]:
        """Yield the temporary files that a killed process left behind."""
        yield from sorted(self.root.glob("??/.put-*"))

    def remove(self, digest: str) -> int:
        """Remove a blob and return how many bytes that freed; who has it open or mapped keeps it."""
        path = self.path(digest)
        try:
            size = path.stat().st_size
            path.unlink()
        except FileNotFoundError:
            return 0
        return size


def _renamed(source: Path, path: Path) -> bool:
    """Say whether a file could be renamed: it cannot from another file system, nor where it belongs to another user."""
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
