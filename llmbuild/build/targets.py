"""Targets by name or file: those that ship, those in the current folder, and the host itself."""

from __future__ import annotations

from pathlib import Path

import llmbuild
from llmbuild.compiler.resolved import Answers, resolve
from llmbuild.errors import InputError
from llmbuild.runtime import host
from llmbuild.runtime.choose import HostFacts
from llmbuild.spec.files.reader import read_target
from llmbuild.spec.target import BACKENDS, HOST, LLVM_CPU, Target


def target_folders() -> list[Path]:
    """Return the folders of target files: the current one, the one beside the package, the one inside it."""
    package = Path(llmbuild.__file__).parent
    return [Path("targets"), package.parent / "targets", package / "targets"]


def find_target(name: str) -> Target:
    """Return a target by name or file; `host` is built in.

    Raises:
        InputError: no such target.
    """
    if name == HOST:
        kind = BACKENDS[LLVM_CPU]
        arch, told = host.architecture(), "this machine"
        return Target(HOST, LLVM_CPU, arch, HOST, description=told, device=kind.device, meters=kind.meters)
    if name.endswith((".yaml", ".yml")):
        return read_target(Path(name))
    for folder in target_folders():
        if (folder / f"{name}.yaml").is_file():
            return read_target(folder / f"{name}.yaml")
    known = ", ".join(target_names())
    raise InputError(f"unknown target {name!r}; there are {known}, or name a file")


def target_names() -> list[str]:
    """Return the names of all targets: `host`, and those of files."""
    return [HOST, *(target.name for target in file_targets())]


def file_targets() -> list[Target]:
    """Return the targets of files; of two files with one name, the first found."""
    found: dict[str, Path] = {}
    for folder in target_folders():
        for path in sorted(folder.glob("*.yaml")) if folder.is_dir() else []:
            found.setdefault(path.stem, path)
    return [read_target(path) for path in found.values()]


def highest_target(facts: HostFacts, answers: Answers | None = None) -> Target:
    """Return the target that requires the most of the host's features.

    Raises:
        InputError: no target is for such a host.
    """
    ours = [t for t in file_targets() if t.backend == LLVM_CPU and t.arch == facts.arch]
    resolved = [resolve(target, answers) for target in ours]
    fitting = [t for t in resolved if facts.features.issuperset(t.requires)]
    if not fitting:
        raise InputError(f"no target is for a {facts.arch} host with these features: name one with -t")
    return max(fitting, key=lambda t: len(t.requires))
