"""Pack a recipe's variants for other machines into one folder, to be run there and merged back.

    python scripts/gpu_check.py [RECIPE]... -t TARGET... -o FOLDER [-C CATALOG] [--trials N] [--python 3.11]...
    (on the other machine)  python3 FOLDER/run.py [--budget SECONDS] [--only MODEL]... [--json]
    (back here)             llmbuild merge FOLDER -C CATALOG

The folder holds artifacts, parameters, check data, the profiler's code, and wheels of IREE's runtime, numpy and NVML:
the other machine needs a Python and its GPU's driver, no network and no compiler. `run.py` keeps to its budget and
reports omissions: models run in the given order, and the time is divided by model, then by target. It reads counters
and changes no clock, power limit or MIG setting.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from llmbuild.build.jobs import jobs_of
from llmbuild.build.request import BuildRequest, pins_of
from llmbuild.carry.pack import closing, pack, wheels
from llmbuild.catalog.writer import Catalog
from llmbuild.errors import LlmbuildError
from llmbuild.report.progress import Progress


def main() -> int:
    """Pack; exit 2 where something asked for cannot be had."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="*", default=[Path("recipes/pystdlib.yaml")], type=Path)
    parser.add_argument("-t", "--target", action="append", required=True, help="name or file; may be given again")
    parser.add_argument("-o", "--output", required=True, type=Path, help="a new folder")
    parser.add_argument("-C", "--catalog", default="catalog", type=Path)
    parser.add_argument("--trials", type=int, default=6, help="variants of each target")
    parser.add_argument("--random-init", action="store_true")
    parser.add_argument("--set", dest="pinned", action="append", default=[], metavar="KNOB=VALUE")
    parser.add_argument(
        "--python", action="append", default=[], metavar="VERSION", help="whose wheels; this one's if left out"
    )
    parser.add_argument("--platform", default="manylinux_2_28_x86_64", help="pip's name of where it runs")
    parser.add_argument("--no-wheels", action="store_true", help="the other machine has iree-base-runtime and numpy")
    asked = parser.parse_args()
    try:
        return _pack(asked)
    except LlmbuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _pack(asked: argparse.Namespace) -> int:
    request = BuildRequest(
        recipes=tuple(asked.recipe),
        targets=tuple(asked.target),
        catalog=asked.catalog,
        pins=pins_of(asked.pinned),
        random_init=asked.random_init,
    )
    jobs = [job() for job in jobs_of(request)]
    catalog = Catalog(asked.catalog)
    try:
        done = pack(jobs, catalog, asked.output, asked.trials, Progress())
    finally:
        catalog.close()
    for name in ("torch_peer.py", "torch_kernels.py"):
        shutil.copyfile(Path(__file__).with_name(name), asked.output / name)
    if not asked.no_wheels:
        here = f"{sys.version_info.major}.{sys.version_info.minor}"
        wheels(asked.output, asked.python or [here], asked.platform)
    print(closing(done, asked.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
