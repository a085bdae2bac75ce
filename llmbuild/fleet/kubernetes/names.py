"""Names and labels of a fleet's objects: valid by the cluster's rules, and never those of another fleet."""

from __future__ import annotations

import re
from typing import Any

from llmbuild import digest

Object = dict[str, Any]
"""An object of Kubernetes as its API reads and writes it."""

MANAGED = "app.kubernetes.io/managed-by"
FLEET, SERVICE, REPLICA = "llmbuild/fleet", "llmbuild/service", "llmbuild/replica"
"""Labels; values that no label can have are shortened, and annotations have them whole."""
_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_DIGITS, _MOST = 8, 50


def object_name(*parts: str) -> str:
    """Return a name for an object: lower-case letters, digits and dashes, at most 63, and a letter first.

    Other parts have another name: the digits at its end are of all of them.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")
    slug = slug if slug[:1].isalpha() else f"f-{slug}"
    return f"{slug[:_MOST].strip('-')}-{digest.of(list(parts))[:_DIGITS]}"


def label_value(text: str) -> str:
    """Return a text where it may be a label's value, else its beginning and digits of the whole."""
    return text if _LABEL.fullmatch(text) else object_name(text)


def selector(fleet: str) -> str:
    """Return what selects the objects of a fleet, and no others."""
    return f"{MANAGED}=llmbuild,{FLEET}={label_value(fleet)}"
