"""For each target: does it compile here, does it run here, and why not."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from llmbuild.compiler import iree
from llmbuild.compiler.resolved import Answers, resolve
from llmbuild.errors import LlmbuildError
from llmbuild.runtime import devices, host
from llmbuild.spec.target import Target

YES = "yes"


def rows(targets: Sequence[Target], answers: Answers | None, probed: bool) -> list[dict[str, Any]]:
    """Return a row for each target; with `probed`, code is generated for a matrix-vector product, too."""
    with ThreadPoolExecutor(host.cores()) as pool:
        return list(pool.map(lambda target: _row(target, answers, probed), targets))


def _row(target: Target, answers: Answers | None, probed: bool) -> dict[str, Any]:
    resolved, compiles = target, YES
    try:
        resolved = resolve(target, answers)
        failure = iree.probe(resolved, {}) if probed else None
        if failure:
            compiles = f"no: {failure.reason}"
    except LlmbuildError as error:
        compiles = f"no: {str(error).splitlines()[0].removeprefix(f'target {target.name}: ')}"
    return {
        "target": target.name,
        "backend": target.backend,
        "cpu": resolved.cpu,
        "compiles": compiles,
        "runs": runs_here(resolved),
        "device": target.device,
        "meters": " ".join(target.meters) or "none",
        "description": target.description,
    }


def runs_here(target: Target) -> str:
    """Return `yes`, or `no:` and why this host does not run what is compiled for a resolved target."""
    if not target.is_cpu:
        there = devices.find(target.device.partition("://")[0])
        return f"not checked: {', '.join(there.found)}" if there.found else f"no: {there.reason}"
    if target.arch != host.architecture():
        return f"no: this host is {host.architecture()}"
    missing = sorted(set(target.requires) - host.features())
    return f"no: this host lacks {' '.join(missing)}" if missing else YES
