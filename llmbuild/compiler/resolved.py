"""Cache of targets as the compiler resolves them: a query takes a quarter of a second and rarely changes."""

from __future__ import annotations

import contextlib
import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from llmbuild import digest
from llmbuild.compiler import iree
from llmbuild.runtime import host
from llmbuild.spec.target import Target
from llmbuild.system.strict_json import loads

FIELDS = ("cpu", "features", "requires", "subgroup")
FORM = 2
"""Version of the results' interpretation."""


@dataclass(frozen=True)
class Answers:
    """The cache of results: a folder of a catalog. It may be deleted at any time; without `keep` it is only read."""

    folder: Path
    keep: bool = True


def resolve(target: Target, answers: Answers | None = None) -> Target:
    """Return the result of `iree.resolve`; cached for targets with this compiler on this CPU.

    Raises:
        InputError: the compiler does not know this CPU or these features.
    """
    if answers is None:
        return iree.resolve(target)
    path = answers.folder / f"{_key(target)}.json"
    try:
        known = loads(path.read_text())
        features, requires = (tuple(map(str, known[name])) for name in FIELDS[1:3])
        cpu, subgroup = str(known["cpu"]), int(known["subgroup"])
        return replace(target, cpu=cpu, features=features, requires=requires, subgroup=subgroup)
    except (OSError, ValueError, KeyError, TypeError):
        found = iree.resolve(target)
    if answers.keep:
        _write(path, {name: getattr(found, name) for name in FIELDS})
    return found


def _write(path: Path, answer: dict[str, object]) -> None:
    with contextlib.suppress(OSError):  # a read-only folder only costs a quarter of a second
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(answer, file)
        Path(file.name).replace(path)


def _key(target: Target) -> str:
    """Return the digest of the result's inputs: the compiler by version and file, the CPU, the target."""
    binary = iree.binary()
    stat = binary.stat()
    machine = host.machine()
    compiler = [iree.compiler_version(), str(binary), stat.st_size, stat.st_mtime_ns]
    return digest.of([FORM, compiler, machine.chip, machine.arch, sorted(host.features()), target.identity()])
