"""For each target: whether it compiles here, whether it runs here, and why not."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from llmbuild.compiler import iree
from llmbuild.compiler.resolved import Answers, resolve
from llmbuild.errors import LlmbuildError
from llmbuild.runtime import devices, host
from llmbuild.runtime.choose import HostFacts
from llmbuild.spec.target import Target

YES = "yes"


def rows(targets: Sequence[Target], answers: Answers | None, probed: bool) -> list[dict[str, object]]:
    """Return a row for each target; with `probed`, code is also generated for a matrix-vector product."""
    with ThreadPoolExecutor(host.cores()) as pool:
        return list(pool.map(lambda target: _row(target, answers, probed), targets))


def _row(target: Target, answers: Answers | None, probed: bool) -> dict[str, object]:
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


def runs_here(target: Target, facts: HostFacts | None = None) -> str:
    """Return `yes`, or `no:` and why this host, or the one of `facts`, does not run a resolved target.

    For a GPU, the devices of a driver are listed, with missing features that no driver checks; whether they are the
    target's chip, and the devices of another host, are not checked.
    """
    if not target.is_cpu:
        if facts is not None:
            return "not checked: only the other host's driver knows"
        driver = target.device.partition("://")[0]
        lacks = devices.lacks(driver, target.requires)
        return f"no: {lacks}" if lacks else f"not checked: {', '.join(devices.find(driver).found)}"
    arch, features = (facts.arch, facts.features) if facts else (host.architecture(), host.features())
    if target.arch != arch:
        return f"no: this host is {arch}" if facts is None else f"no: it is {arch}"
    missing = sorted(set(target.requires) - features)
    return f"no: {'this host' if facts is None else 'it'} lacks {' '.join(missing)}" if missing else YES
