"""Runs a module of ours, or a script, in a child process that nothing but this installation has a say in.

    python -P -E start.py [--path FOLDER]... MODULE|SCRIPT.py [ARGUMENT]...

`-P` and `-E` keep the working directory and the variables of the environment from saying where modules come from. This
package is the one that this file lies in, wherever it was found, and libraries may lie beside it or in the folders
named. Imports nothing of ours: it is also what a machine runs that was only sent the profiler.
"""

from __future__ import annotations

import runpy
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent


def _register() -> None:
    spec = spec_from_file_location(PACKAGE.name, PACKAGE / "__init__.py", submodule_search_locations=[str(PACKAGE)])
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[PACKAGE.name] = module
    spec.loader.exec_module(module)


def main(arguments: list[str]) -> None:
    """Run what the arguments name, as Python itself would."""
    folders: list[str] = []
    while arguments[:1] == ["--path"]:
        folders.append(arguments[1])
        arguments = arguments[2:]
    sys.path[:0] = folders
    if str(PACKAGE.parent) not in sys.path:
        sys.path.append(str(PACKAGE.parent))
    _register()
    name, sys.argv = arguments[0], arguments
    if name.endswith(".py"):
        runpy.run_path(name, run_name="__main__")
    else:
        runpy.run_module(name, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
