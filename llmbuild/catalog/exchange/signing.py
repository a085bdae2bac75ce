"""Make Ed25519 keys and sign with them; the loader verifies (`llmbuild.runtime.trust`)."""

from __future__ import annotations

import base64
import os
from pathlib import Path

from llmbuild.errors import InputError
from llmbuild.runtime.trust import SIGNED


def make_keys(name: Path) -> tuple[Path, Path]:
    """Write `NAME.key`, readable only by its owner, and `NAME.pub`, and return both.

    Raises:
        InputError: one of them exists already, or they cannot be written.
    """
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    if name.name in ("", ".."):
        raise InputError(f"{name}: a folder, not a name: NAME.key and NAME.pub are written, such as {name / 'release'}")
    secret, public = name.with_name(name.name + ".key"), name.with_name(name.name + ".pub")
    if secret.exists() or public.exists():
        raise InputError(f"{secret} or {public} is there already: name another")
    key = Ed25519PrivateKey.generate()
    try:
        with os.fdopen(os.open(secret, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()))
        public.write_bytes(key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo))
    except OSError as error:
        raise InputError(f"{secret}: cannot be written: {error.strerror or error}") from None
    return secret, public


def sign(manifest: bytes, key: Path) -> str:
    """Return the signature of a manifest, base64.

    Raises:
        InputError: not an Ed25519 private key in PEM.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        loaded = load_pem_private_key(key.read_bytes(), password=None)
    except OSError as error:
        raise InputError(f"--sign {key}: {error.strerror or error}") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise InputError(f"--sign {key}: not a private key in PEM without a password") from None
    if not isinstance(loaded, Ed25519PrivateKey):
        raise InputError(f"--sign {key}: not an Ed25519 key: `llmbuild keys NAME` makes a pair")
    return base64.b64encode(loaded.sign(SIGNED + manifest)).decode()
