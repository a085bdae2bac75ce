"""Hosts that are not here: what a catalog would give them, by the name of their CPU."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from llmbuild.errors import InputError
from llmbuild.runtime import host
from llmbuild.runtime.choose import HostFacts

ARCHITECTURES = ("x86_64", "aarch64")


def facts_of(cpu: str) -> HostFacts:
    """Return what decides a pick on a host with this CPU, one of archspec's names such as `haswell` or `neoverse_n1`.

    Its memory and its readings are not known, its runtime is taken to be the one that is installed here.

    Raises:
        InputError: no such CPU, or none of an architecture that there are targets for.
    """
    found = _known().get(cpu)
    if found is None or found.family.name not in ARCHITECTURES:
        raise InputError(f"unknown CPU {cpu!r}; there are {', '.join(cpus())}")
    return HostFacts(found.family.name, host.llvm_features(sorted(found.features)), host.runtime_version(), None, "")


def cpus() -> list[str]:
    """Return the CPUs that there are facts of."""
    return sorted(name for name, found in _known().items() if found.family.name in ARCHITECTURES and found.features)


def _known() -> dict[str, Any]:
    try:
        targets = import_module("archspec.cpu").TARGETS
    except ImportError:
        raise InputError("archspec is not installed: pip install archspec") from None
    return dict(targets)
