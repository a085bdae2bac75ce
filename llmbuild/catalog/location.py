"""Parse locations: a folder, or a URL, checked against its grammar before any upload.

References to registries follow the OCI distribution specification; buckets follow the rules of S3 and Google Cloud
Storage.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv6Address
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from llmbuild.errors import InputError

_URL = re.compile(r"(?:[a-z][a-z0-9+.-]*::)*[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_NAME = re.compile(rf"{_PART}(?:/{_PART})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_HOST = re.compile(rf"({_LABEL}(?:\.{_LABEL})*|\[[0-9A-Fa-f:.]+\])(?::([0-9]{{1,5}}))?")
_BUCKETS = {
    "s3": re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]|arn:[^/]+"),
    "gs": re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]"),
}
_SAME = {"s3a": "s3", "gcs": "gs"}
OCI = "oci://"
LATEST = "latest"
LONGEST = 255
"""Maximum characters of a registry's host and name together that every client accepts."""


@dataclass(frozen=True)
class Reference:
    """`HOST/NAME:TAG` or `HOST/NAME@DIGEST` in a registry; if both are given, the digest is used."""

    host: str
    name: str
    tag: str
    digest: str = ""

    def __str__(self) -> str:
        return f"{self.host}/{self.name}" + (f"@{self.digest}" if self.digest else f":{self.tag}")


def is_url(text: str) -> bool:
    """Return whether a text is a URL; otherwise it is the path of a folder."""
    return _URL.match(text) is not None


def reference(location: str) -> Reference:
    """Return the reference of an `oci://` URL.

    Raises:
        InputError: not a reference by the grammar of the OCI distribution specification.
    """

    def refused(why: str) -> InputError:
        return InputError(
            f"{location}: {why}: write oci://HOST/NAME or oci://HOST/NAME:TAG; oci://HOST/NAME@sha256:DIGEST is pulled"
        )

    host, slash, rest = location[len(OCI) :].partition("/")
    match = _HOST.fullmatch(host)
    if not slash or not match or not _is_address(match[1]):
        raise refused(f"{host!r} is no registry's host" if host else "no registry is named")
    if match[2] and not 0 < int(match[2]) < 1 << 16:
        raise refused(f"{match[2]} is no port")
    rest, at, digest = rest.partition("@")
    name, colon, tag = rest.partition(":")
    if not _NAME.fullmatch(name):
        hint = "names are lower case" if _NAME.fullmatch(name.lower()) else "parts are a-z and 0-9, with . _ - between"
        raise refused(f"{name!r} is no name in a registry ({hint})")
    if colon and not _TAG.fullmatch(tag):
        raise refused(f"{tag!r} is no tag (letters, digits, . _ -, at most 128)")
    if at and not _DIGEST.fullmatch(digest):
        raise refused(f"{digest!r} is no digest (sha256: and 64 hex digits)")
    if len(host) + len(name) > LONGEST:
        raise refused(f"host and name are longer than {LONGEST} characters")
    return Reference(host, name, tag or LATEST, digest)


def _is_address(host: str) -> bool:
    try:
        return not host.startswith("[") or IPv6Address(host[1:-1]) is not None
    except ValueError:
        return False


def folder(location: str) -> Path:
    """Return the folder of a path or a `file:` URL.

    Raises:
        InputError: a URL of another host, or with a query: `?` and `#` are written %3F and %23 in one.
    """
    if "\x00" in location:
        raise InputError(f"{location!r}: no path holds a NUL")
    if not is_url(location):
        return Path(location)
    parts = urlsplit(location)
    if parts.netloc not in ("", "localhost") or parts.query or parts.fragment or "?" in location or "#" in location:
        raise InputError(f"{location}: write file:///ABSOLUTE/PATH with %3F for ? and %23 for #, or the path alone")
    return Path(url2pathname(parts.path))


def bucket(location: str) -> str:
    """Return an fsspec URL after a check of the known parts of its grammar.

    Raises:
        InputError: no bucket, an invalid bucket name, or characters that no URL contains.
    """
    scheme, _, rest = location.partition("://")
    name, *parts = rest.rstrip("/").split("/")
    if not rest.isprintable() or any(ord(one) < 33 for one in rest):
        raise InputError(f"{location!r}: a URL holds no spaces and no control characters")
    grammar = _BUCKETS.get(_SAME.get(scheme.lower(), scheme.lower()))
    if grammar is not None and not grammar.fullmatch(name):
        raise InputError(f"{location}: {name!r} is no bucket's name: it is lower case letters, digits, - and .")
    if grammar is not None and any(part in ("", ".", "..") for part in parts):
        raise InputError(f"{location}: an empty part of a path, `.` and `..` are no names in a bucket")
    return location.rstrip("/")


def resolved(location: str) -> str:
    """Return a location that is valid from any folder: an absolute path, or a reference with its tag."""
    if location.startswith(OCI):
        return f"{OCI}{reference(location)}"
    if is_url(location) and not location.lower().startswith("file://"):
        return bucket(location)
    return str(folder(location).absolute())
