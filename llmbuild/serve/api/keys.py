"""API keys: a file of them, one a line, and the check of a request's key."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from pathlib import Path

from llmbuild.errors import InputError, as_our_errors
from llmbuild.serve.api.errors import ApiError

SHORTEST = 16
OPEN = ("/health", "/ready")
"""Paths that need no key."""
_SHOWN = 8


@dataclass(frozen=True)
class Keys:
    """The digests of the keys that are taken; without one, every request is."""

    digests: tuple[bytes, ...] = ()

    @staticmethod
    @as_our_errors(InputError)
    def read(path: Path) -> Keys:
        """Read a file with a key on each line; empty lines and those that begin with # are left out.

        Raises:
            InputError: it cannot be read, has no key, or one that is too short to be secret.
        """
        try:
            lines = path.read_text().splitlines()
        except UnicodeDecodeError:
            raise InputError(f"{path}: not a text: write one key on each line") from None
        found = []
        for number, line in enumerate(lines, 1):
            key = line.strip()
            if not key or key.startswith("#"):
                continue
            if len(key) < SHORTEST or not key.isascii() or not key.isprintable() or " " in key:
                told = f"a key has {SHORTEST} or more printable ASCII characters without a space"
                raise InputError(f"{path}: line {number}: {told}")
            found.append(_digest(key))
        if not found:
            raise InputError(f"{path}: no key in it: write one on each line")
        return Keys(tuple(found))

    @property
    def digest(self) -> str:
        """What says whether two servers take the same keys, and nothing of the keys; empty without keys."""
        return hashlib.sha256(b"".join(sorted(self.digests))).hexdigest() if self.digests else ""

    def name(self, authorization: str | None) -> str:
        """Return the first digits of the digest of a request's key, by which a log may name it; empty without keys.

        Raises:
            ApiError: the request has no key that is taken.
        """
        if not self.digests:
            return ""
        kind, _, key = (authorization or "").partition(" ")
        given = _digest(key.strip())
        same = [hmac.compare_digest(given, one) for one in self.digests]  # all, whichever it is
        if kind.lower() == "bearer" and any(same):
            return given.hex()[:_SHOWN]
        told = (
            "the key is not one of this server's" if authorization else "a key is needed: `Authorization: Bearer KEY`"
        )
        raise ApiError(401, told, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()
