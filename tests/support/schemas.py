"""Kubernetes' own JSON schemas of its objects, by version, as a package carries them."""

from __future__ import annotations

from functools import cache
from typing import Any

from jsonschema import Draft202012Validator
from kubernetes_validate.utils import schema_contents
from referencing import Registry, Resource

OLDEST, NEWEST = "1.30", "1.37"
"""The first version that has a sleep before a container's end, and the newest that the package has."""


@cache
def _definitions(version: str) -> Resource[Any]:
    return Resource.from_contents(schema_contents(f"{_folder(version)}/_definitions.json", version))


@cache
def _validator(kind: str, api_version: str, version: str) -> Draft202012Validator:
    group, _, number = api_version.rpartition("/")
    part = "meta" if kind == "DeleteOptions" else group.split(".")[0]
    name = f"{kind.lower()}-{part}-{number}".replace("--", "-")
    schema = schema_contents(f"{_folder(version)}/{name}.json", version)
    registry: Registry[Any] = _definitions(version) @ (Resource.from_contents(schema) @ Registry())
    return Draft202012Validator(schema, registry=registry)


def _folder(version: str) -> str:
    return f"kubernetes-json-schema/v{version}.0-local-strict"


def faults(one: dict[str, Any], version: str = NEWEST) -> list[str]:
    """Return what a version of Kubernetes finds wrong with an object: unknown keys too."""
    found = _validator(one["kind"], one["apiVersion"], version).iter_errors(one)
    return [f"{error.json_path}: {error.message}" for error in found]
