"""Where a GGUF file is: a path, or `package:NAME/FILE` for a file in an installed Python package."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from llmbuild.errors import InputError
from llmbuild.spec.recipe import PACKAGE

SUFFIX, MAGIC = ".gguf", b"GGUF"
_NAMED = 5
"""How many files are named where the right one is missing."""


def is_gguf(path: Path) -> bool:
    """Return whether a file begins as a GGUF file does; False for what cannot be read."""
    try:
        if not path.is_file():
            return False
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except (OSError, ValueError):
        return False


def is_place(location: str) -> bool:
    """Return whether a location is that of a GGUF file: by its form, or because such a file lies there."""
    try:
        path = Path(location).expanduser()
        named = location.startswith(PACKAGE) or location.lower().endswith(SUFFIX)
        return not path.is_dir() if named else is_gguf(path)
    except (OSError, ValueError, RuntimeError):
        return False


def find(location: str) -> Path:
    """Return the path of a GGUF file; a package is found without being imported.

    Raises:
        InputError: no such file, or no such package.
    """
    if location.startswith(PACKAGE):
        return _in_package(location)
    path = Path(location).expanduser()
    if path.is_dir():
        raise InputError(f"{location}: a folder, not a GGUF file{_files([path])}")
    if not path.exists() and not path.is_symlink():
        raise InputError(f"{location}: no such GGUF file")
    return path


def _in_package(location: str) -> Path:
    name, _, file = location.removeprefix(PACKAGE).partition("/")
    try:
        spec = find_spec(name) if name.isidentifier() else None
    except ValueError:  # of a module that is being run
        spec = None
    if spec is None:
        raise InputError(f"{location}: no package {name} is installed: pip install {name.replace('_', '-')}")
    folders = [Path(place) for place in spec.submodule_search_locations or ()]
    for folder in folders:
        if (folder / file).is_file():
            return folder / file
    raise InputError(f"{location}: the installed package {name} has no file {file}{_files(folders)}")


def _files(folders: list[Path]) -> str:
    there = sorted(str(path.relative_to(folder)) for folder in folders for path in folder.glob(f"*{SUFFIX}"))
    return f"; it has {', '.join(there[:_NAMED])}" if there else ""
