"""A folder in which every module that could be imported, and every program that is run, leaves word when it is run."""

from __future__ import annotations

import sys
from importlib.metadata import packages_distributions
from pathlib import Path

PROGRAMS = ("iree-compile", "iree-opt", "iree-benchmark-module", "iree-run-module", "python", "python3", "ssh", "pip")
WORD = "open({log!r}, 'a').write(__name__ + '\\n')\nraise SystemExit('a file of the caller was run')\n"


def fill(folder: Path, log: Path) -> Path:
    """Make the folder; `log` gets a line from each of its files that is run."""
    folder.mkdir()
    names = {*sys.stdlib_module_names, *packages_distributions(), "pynvml", "sitecustomize", "usercustomize"}
    for name in sorted(names - {"llmbuild"}):
        (folder / f"{name}.py").write_text(WORD.format(log=str(log)))
    (folder / "llmbuild").mkdir()
    for name in ("__init__", "__main__", "cli"):
        (folder / "llmbuild" / f"{name}.py").write_text(WORD.format(log=str(log)))
    for name in PROGRAMS:
        (folder / name).write_text(f"#!/bin/sh\necho {name} >> '{log}'\nexit 9\n")
        (folder / name).chmod(0o755)
    return folder
