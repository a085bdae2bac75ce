"""Versions of everything that decides an artifact's bytes, read without importing it."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import llmbuild
from llmbuild import digest
from llmbuild.spec.variant import Toolchain

_IMPORTER_PACKAGES = ("torch", "transformers", "safetensors", "numpy", "iree-base-compiler")
_IMPORTER_SOURCES = ("frontend", "transform", "kernels", "spec/formats.py", "spec/program.py")


def package_version(name: str) -> str:
    """Return the version of an installed package, `absent` without one."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


@cache
def current() -> Toolchain:
    """Return this installation's toolchain.

    The importer is named by its packages and by its own source, so that a change of a kernel or a transform makes
    imports stale even without a new version number.
    """
    packages = " ".join(f"{name}-{package_version(name)}" for name in _IMPORTER_PACKAGES)
    return Toolchain(
        llmbuild=llmbuild.__version__,
        importer=f"{packages} source-{digest.short(_source_digest())}",
        compiler=package_version("iree-base-compiler"),
        runtime=package_version("iree-base-runtime"),
    )


def _source_digest() -> str:
    root = Path(llmbuild.__file__).parent
    files: list[Path] = []
    for name in _IMPORTER_SOURCES:
        path = root / name
        files += sorted(path.glob("*.py")) if path.is_dir() else [path]
    return digest.of({str(f.relative_to(root)): digest.of_file(f) for f in files})
