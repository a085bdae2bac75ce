"""The keys of a fleet file that say how it runs on Kubernetes, each checked by the cluster's own rules for names."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from llmbuild.spec.cluster import BESIDE_BYTES, Cluster, Pods
from llmbuild.spec.files.strict import Strict

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|kB|MB|GB|TB)")
_UNITS = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_SUBDOMAIN = rf"{_LABEL}(\.{_LABEL})*"
_VALUE = re.compile(r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?")
_KEY = re.compile(rf"({_SUBDOMAIN}/)?[A-Za-z0-9]([A-Za-z0-9._-]{{0,61}}[A-Za-z0-9])?")


def _bytes(text: object) -> float:
    match = _SIZE.fullmatch(str(text).strip())
    if not match:
        raise ValueError(f"{text!r} is no size: write 640kB, 16GB")
    return float(match[1]) * _UNITS[match[2]]


def _key(text: str) -> str:
    if not _KEY.fullmatch(text):
        raise ValueError(f"{text!r} is no key of Kubernetes: write NAME or DOMAIN/NAME, such as nvidia.com/gpu")
    return text


def _value(text: str) -> str:
    if not _VALUE.fullmatch(text):
        raise ValueError(f"{text!r} is no value of a label: at most 63 of A-Z a-z 0-9 . _ - between letters or digits")
    return text


def _resource(name: str) -> str:
    if "/" not in _key(name):
        raise ValueError(f"{name!r} is no device of a node: write DOMAIN/NAME, such as nvidia.com/mig-2g.20gb")
    return name


Bytes = Annotated[float, BeforeValidator(_bytes)]
"""Sizes such as 640kB, 16GB."""
_Name = Annotated[str, Field(pattern=f"^{_LABEL}$")]
_Object = Annotated[str, Field(pattern=f"^{_SUBDOMAIN}$", max_length=253)]
_Key = Annotated[str, AfterValidator(_key)]
_Value = Annotated[str, AfterValidator(_value)]
_Resource = Annotated[str, AfterValidator(_resource)]


class ClusterKeys(Strict):
    """`kubernetes` of a fleet."""

    image: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@-]{0,1023}$")
    namespace: _Name = "default"
    claim: _Object
    user: Annotated[int, Field(ge=1, le=2**31 - 1, strict=True)] = 65532
    api_keys: _Object | None = None
    pull_secrets: tuple[_Object, ...] = ()
    service_account: _Object | None = None


class PodKeys(Strict):
    """`kubernetes` of a class of nodes."""

    cpus: Annotated[int, Field(ge=1, le=4096, strict=True)] | None = None
    memory: Bytes | None = None
    labels: dict[_Key, _Value] = Field(default_factory=dict)
    resources: dict[_Resource, Annotated[int, Field(ge=1, le=64, strict=True)]] = Field(default_factory=dict)
    tolerates: tuple[_Key, ...] = ()


def cluster_of(keys: ClusterKeys | None) -> Cluster | None:
    """Return what a fleet's keys say."""
    if keys is None:
        return None
    return Cluster(
        image=keys.image,
        namespace=keys.namespace,
        claim=keys.claim,
        user=keys.user,
        api_keys=keys.api_keys or "",
        pull_secrets=keys.pull_secrets,
        service_account=keys.service_account or "",
    )


def pods_of(keys: PodKeys | None, cores: int, slot_bytes: float) -> Pods | None:
    """Return what a class's keys say, for slots of some cores and bytes."""
    if keys is None:
        return None
    return Pods(
        cpus=cores,
        memory_bytes=slot_bytes + BESIDE_BYTES if keys.memory is None else keys.memory,
        labels=tuple(sorted(keys.labels.items())),
        resources=tuple(sorted(keys.resources.items())),
        tolerates=tuple(dict.fromkeys(keys.tolerates)),
    )
