"""Runs an llmbuild module, or a script, in a child process that is isolated from its environment.

    python -P -E start.py [--path FOLDER]... MODULE|SCRIPT.py [ARGUMENT]...

`-P` and `-E` keep the working directory and environment variables out of the module search path. The package is the
one that contains this file; libraries may be beside it or in the given folders. Imports nothing of llmbuild: a
machine that was sent only the profiler runs it too.
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
    """Run the module or script of the arguments, as Python itself would."""
    folders: list[str] = []
    while arguments[:1] == ["--path"]:
        folders.append(arguments[1])
        arguments = arguments[2:]
    sys.path[:0] = folders
    if str(PACKAGE.parent) not in sys.path:
        sys.path.append(str(PACKAGE.parent))
    _register()
    launch(arguments)


def launch(words: list[str]) -> None:
    """Run a module or script, the first of the words, with the others as its arguments."""
    name, sys.argv = words[0], words
    if name.endswith(".py"):
        runpy.run_path(name, run_name="__main__")
    else:
        runpy.run_module(name, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
