"""Remember what the compiler took a target for: asking takes a quarter of a second, and the answer rarely changes."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path

from llmbuild import digest
from llmbuild.compiler import iree
from llmbuild.runtime import host
from llmbuild.spec.target import Target

FIELDS = ("cpu", "features", "requires")


def folder() -> Path:
    """Return where answers are kept: `$XDG_CACHE_HOME/llmbuild`, else `~/.cache/llmbuild`; it may go at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmbuild"


def resolve(target: Target) -> Target:
    """Return what `iree.resolve` does; known targets of this very compiler on this very CPU are not asked for again.

    Raises:
        InputError: the compiler does not know this CPU or these features.
    """
    path = folder() / f"target-{_key(target)}.json"
    try:
        known = json.loads(path.read_text())
        features, requires = (tuple(map(str, known[name])) for name in FIELDS[1:])
        return replace(target, cpu=str(known["cpu"]), features=features, requires=requires)
    except (OSError, ValueError, KeyError, TypeError):
        found = iree.resolve(target)
    with contextlib.suppress(OSError):  # a home that cannot be written costs a quarter of a second, no more
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump({name: getattr(found, name) for name in FIELDS}, file)
        Path(file.name).replace(path)
    return found


def _key(target: Target) -> str:
    """Return the digest of all that the answer depends on: the compiler by version and file, the CPU, the target."""
    binary = iree.binary()
    stat = binary.stat()
    machine = host.machine()
    compiler = [iree.compiler_version(), str(binary), stat.st_size, stat.st_mtime_ns]
    return digest.of([compiler, machine.chip, machine.arch, machine.features, target.identity()])
