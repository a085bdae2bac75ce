"""Install the wheel of this tree into a fresh environment, and print the disk space of its distributions.

    python scripts/bench/install.py [--extra NAME] [--keep FOLDER] [--json]

`pip install llmbuild` installs the loader and its commands; `--extra build` adds the build path.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import venv
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[2]
LIST = """\
import json, os
from importlib.metadata import distributions
def size(found):
    paths = {os.path.realpath(found.locate_file(file)) for file in found.files or ()}
    return sum(os.stat(path).st_size for path in paths if os.path.isfile(path))
print(json.dumps({found.name: size(found) for found in distributions()}))
"""


def wheel(folder: Path) -> Path:
    """Build the wheel of this tree into a folder."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*command, str(ROOT)], check=True)
    (found,) = folder.glob("llmbuild-*.whl")
    return found


def install(folder: Path, extra: str = "") -> Path:
    """Return the Python of a fresh environment that the wheel alone is installed in, with what it depends on."""
    built = wheel(folder)
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    what = f"llmbuild[{extra}] @ {built.as_uri()}" if extra else str(built)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", what], check=True)
    return python


def sizes(python: Path) -> dict[str, int]:
    """Return the bytes of each distribution of an environment, the largest first."""
    done = subprocess.run([python, "-c", LIST], check=True, capture_output=True, text=True)
    found: dict[str, int] = json.loads(done.stdout)
    ours = {name: size for name, size in found.items() if name not in ("pip", "setuptools")}
    return dict(sorted(ours.items(), key=lambda one: -one[1]))


def main() -> int:
    """Print the sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extra", default="", help="of the installation: build, all, ...")
    parser.add_argument("--keep", type=Path, help="make the environment in this folder, and leave it there")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    asked = parser.parse_args()
    with TemporaryDirectory() as name:
        found = sizes(install(asked.keep or Path(name), asked.extra))
    if asked.json:
        print(json.dumps(found))
        return 0
    for one, size in found.items():
        print(f"{size / 1e6:9.1f} MB  {one}")
    print(f"{sum(found.values()) / 1e6:9.1f} MB  in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
