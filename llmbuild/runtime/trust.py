"""Authenticity of a publication: digests always, an Ed25519 signature where keys are given.

A published folder holds `latest.json`, the only file that names the current publication: the digest of a manifest,
and the signature over it. The manifest names every other byte. All of it is checked before a database or an artifact
is opened.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmbuild import digest
from llmbuild.errors import InputError, LoadRefused
from llmbuild.system.extras import advice
from llmbuild.system.strict_json import JsonObject, loads

POINTER = "latest.json"
SIGNED = b"llmbuild publication\n"
"""Prefix of a manifest's bytes under a signature, so that the signature is valid for nothing else."""
ENVIRONMENT = "LLMBUILD_TRUST"

_MANIFEST_BYTES = 256 << 20


@dataclass(frozen=True)
class Policy:
    """Which keys are trusted, as PEM bytes by file name, and whether an unsigned catalog may be opened."""

    keys: tuple[tuple[str, bytes], ...] = ()
    unsigned: bool = True


def policy(trust: str | Path | Sequence[str | Path] | None = None, allow_unsigned: bool = False) -> Policy:
    """Return the policy of these files and folders of public keys, or of `$LLMBUILD_TRUST` where none are given.

    With keys, an unsigned catalog is refused unless `allow_unsigned`; without keys, only digests are checked.

    Raises:
        InputError: a file or folder is missing, or holds no key.
    """
    asked = [trust] if isinstance(trust, (str, Path)) else list(trust or ())
    if not asked and ENVIRONMENT in os.environ:
        asked = list(os.environ[ENVIRONMENT].split(os.pathsep))
        if "" in asked:  # most programs take it for the current folder, where anyone may have put a key
            raise InputError(
                f"${ENVIRONMENT} is {os.environ[ENVIRONMENT]!r}: a part of it is empty: name every file and folder, "
                f"or unset it; `.` is the current folder"
            )
    if "" in asked:
        raise InputError("a trusted key's name is empty: name a file or folder; `.` is the current folder")
    keys = tuple(key for name in asked for key in _keys(Path(name)))
    return Policy(keys, unsigned=allow_unsigned or not keys)


MAX_KEY_BYTES = 1 << 16
"""A larger file is not a key and is not read."""


def _keys(path: Path) -> list[tuple[str, bytes]]:
    files = sorted(each for each in path.glob("*.pub") if each.is_file()) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path}: no trusted key there: public keys are files that end in .pub")
    return [(file.name, _key(file)) for file in files]


def _key(file: Path) -> bytes:
    """Return the bytes of a key; a pipe or a device is not read, since it may have no end."""
    try:
        if file.exists() and not file.is_file():
            raise InputError(f"trusted key {file}: not a regular file")
        if file.stat().st_size > MAX_KEY_BYTES:
            raise InputError(f"trusted key {file}: larger than {MAX_KEY_BYTES} bytes, which no key is")
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"trusted key {file}: {error.strerror or error}") from None


def pointer_of(text: str | bytes, where: str) -> JsonObject:
    """Parse a `latest.json`.

    Raises:
        LoadRefused: not an llmbuild pointer.
    """
    try:
        found = loads(text)
        if len(bytes.fromhex(found["manifest"])) != 32:
            raise ValueError
    except (ValueError, TypeError, KeyError):
        raise LoadRefused(f"{where}: {POINTER} is damaged or not llmbuild's: publish again") from None
    return dict(found)


def checked(pointer: JsonObject, manifest: bytes, rule: Policy, where: str) -> JsonObject:
    """Return a manifest after a check of its digest, and of its signature where required.

    Raises:
        LoadRefused: its bytes do not match the pointer, it has no trusted signature, or it is not a manifest.
    """
    if digest.of_bytes(manifest) != pointer["manifest"]:
        raise LoadRefused(f"{where}: the manifest was changed after it was published: pull or publish it again")
    signer(pointer, manifest, rule, where)
    try:
        body: JsonObject = loads(manifest)
        names = [*body["blobs"], body["catalog"]["digest"]]
        sound = all(isinstance(e["bytes"], int) and isinstance(e["kind"], str) for e in body["blobs"].values())
        if body["kind"] != "llmbuild.publication" or not sound or any(len(bytes.fromhex(n)) != 32 for n in names):
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError):
        raise LoadRefused(f"{where}: the manifest is not one of llmbuild's: publish again") from None
    return body


def signer(pointer: JsonObject, manifest: bytes, rule: Policy, where: str) -> str:
    """Return the file name of the trusted key that signed a manifest; empty where no signature is required.

    Raises:
        LoadRefused: unsigned, or not signed by a trusted key.
    """
    signature = pointer.get("signature")
    if not rule.keys:
        return ""
    if not signature:
        if rule.unsigned:
            return ""
        raise LoadRefused(
            f"{where}: is not signed, and a signature is asked for: `llmbuild publish --sign KEY` signs it; "
            "--allow-unsigned takes it as it is"
        )
    for name, pem in rule.keys:
        if _verifies(pem, name, signature, manifest):
            return name
    trusted = ", ".join(name for name, _ in rule.keys)
    raise LoadRefused(
        f"{where}: the signature is by none of the trusted keys ({trusted}), or was made for other bytes: "
        "get the publisher's public key, or pull it again from the publisher"
    )


def _verifies(pem: bytes, name: str, signature: object, manifest: bytes) -> bool:
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    except ImportError as error:
        raise InputError(f"trusted key {name}: signatures need cryptography: {advice(error, 'publish')}") from None
    try:
        key = load_pem_public_key(pem)
    except ValueError:
        raise InputError(f"trusted key {name}: not a public key in PEM") from None
    if not isinstance(key, Ed25519PublicKey):
        raise InputError(f"trusted key {name}: not an Ed25519 key: `llmbuild keys NAME` makes a pair")
    try:
        key.verify(base64.b64decode(str(signature), validate=True), SIGNED + manifest)
    except (InvalidSignature, ValueError):
        return False
    return True


def require(folder: Path, rule: Policy) -> None:
    """Check the publication of a local catalog before its database is opened.

    Raises:
        LoadRefused: a signature is required and nothing is published there, or the publication is not intact.
    """
    published = (folder / POINTER).is_file()
    if not published and not rule.unsigned:
        raise LoadRefused(
            f"{folder}: is not a published catalog, so it is unsigned: `llmbuild publish {folder} DEST --sign KEY`"
        )
    if published:
        current(folder, rule)


def current(folder: Path, rule: Policy) -> Path:
    """Return the database of a published folder, its manifest, signature and digest checked.

    Raises:
        LoadRefused: a file is missing, modified, or not signed as required.
    """
    pointer = pointer_of((folder / POINTER).read_bytes(), str(folder))
    path = _blob(folder, pointer["manifest"])
    body = checked(pointer, _read(path, folder), rule, str(folder))
    database = _blob(folder, body["catalog"]["digest"])
    _read_digest(database, body["catalog"]["digest"], folder)
    return database


def partial(folder: Path) -> str | None:
    """Return the source of a partially pulled folder; None for a complete publication or a catalog that is built in."""
    path = folder / POINTER
    if not path.is_file():
        return None
    pointer = pointer_of(path.read_bytes(), str(folder))
    return str(pointer.get("source", "SOURCE")) if pointer.get("partial") else None


def published(folder: Path) -> tuple[JsonObject, JsonObject]:
    """Return the current pointer and manifest of a published folder, the manifest's digest checked.

    Raises:
        LoadRefused: one of them is missing, modified, or not llmbuild's.
    """
    pointer = pointer_of(_read(folder / POINTER, folder), str(folder))
    manifest = _read(_blob(folder, pointer["manifest"]), folder)
    return pointer, checked(pointer, manifest, Policy(), str(folder))


def database(folder: Path) -> Path:
    """Return the current database of a published folder; only the pointer is checked."""
    pointer = pointer_of((folder / POINTER).read_bytes(), str(folder))
    try:
        body = loads(_read(_blob(folder, pointer["manifest"]), folder))
        return _blob(folder, body["catalog"]["digest"])
    except (ValueError, TypeError, KeyError):
        raise LoadRefused(f"{folder}: the manifest is not one of llmbuild's: publish again") from None


def _blob(folder: Path, name: str) -> Path:
    return folder / "blobs" / "sha256" / name[:2] / name


def _read(path: Path, folder: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(_MANIFEST_BYTES)
    except OSError:
        raise LoadRefused(f"{folder}: {path} is missing: pull or publish it again") from None


def _read_digest(path: Path, name: str, folder: Path) -> None:
    if not path.is_file() or digest.of_file(path) != name:
        raise LoadRefused(f"{folder}: the database was changed or is missing: pull or publish it again")
