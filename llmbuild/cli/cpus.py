"""Facts of hosts by the name of their CPU, for a pick for another host."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from llmbuild.errors import InputError
from llmbuild.runtime import host
from llmbuild.runtime.choose import HostFacts

ARCHITECTURES = ("x86_64", "aarch64")


def facts_of(cpu: str) -> HostFacts:
    """Return the facts of a host with this CPU, one of archspec's names such as `haswell` or `neoverse_n1`.

    Its memory and its readings are unknown; its runtime is assumed to be the one installed here.

    Raises:
        InputError: an unknown CPU, or one of an architecture without targets.
    """
    found = _known().get(cpu)
    if found is None or found.family.name not in ARCHITECTURES:
        raise InputError(f"unknown CPU {cpu!r}; there are {', '.join(cpus())}")
    return HostFacts(found.family.name, host.llvm_features(sorted(found.features)), host.runtime_version(), None, "")


def cpus() -> list[str]:
    """Return the CPUs with known facts."""
    return sorted(name for name, found in _known().items() if found.family.name in ARCHITECTURES and found.features)


def _known() -> dict[str, Any]:
    try:
        targets = import_module("archspec.cpu").TARGETS
    except ImportError:
        raise InputError("archspec is not installed: pip install archspec") from None
    return dict(targets)
