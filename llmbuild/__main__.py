"""`python -m llmbuild`: the command line without its script."""

import os
import sys

if not sys.flags.safe_path and sys.path[:1] == [os.getcwd()]:  # noqa: PTH109 - pathlib is not loaded yet
    del sys.path[0]  # as the script does: modules in the caller's folder are not imported

from llmbuild.cli.main import main

if __name__ == "__main__":
    main()
