"""Remember what the compiler took a target for: asking takes a quarter of a second, and the answer rarely changes."""

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
"""Counts up when what is made of the compiler's answer changes."""


@dataclass(frozen=True)
class Answers:
    """Where answers are kept: a folder of a catalog. They may go at any time; without `keep` they are only read."""

    folder: Path
    keep: bool = True


def resolve(target: Target, answers: Answers | None = None) -> Target:
    """Return what `iree.resolve` does; known targets of this very compiler on this very CPU are not asked for again.

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
    with contextlib.suppress(OSError):  # a folder that cannot be written costs a quarter of a second, no more
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(answer, file)
        Path(file.name).replace(path)


def _key(target: Target) -> str:
    """Return the digest of all that the answer depends on: the compiler by version and file, the CPU, the target."""
    binary = iree.binary()
    stat = binary.stat()
    machine = host.machine()
    compiler = [iree.compiler_version(), str(binary), stat.st_size, stat.st_mtime_ns]
    return digest.of([FORM, compiler, machine.chip, machine.arch, sorted(host.features()), target.identity()])
