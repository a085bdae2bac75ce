"""Time the fast starts, in interleaved rounds: the loader's import, `--help`, and a build with nothing to do.

python scripts/bench/startup.py [--json] [--rounds N] [--recipe R -C CATALOG]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
from pathlib import Path
from time import perf_counter

from llmbuild.report.rows import table
from llmbuild.runtime import host

PYTHON = [sys.executable, "-c"]


def commands(recipe: Path | None, catalog: Path) -> dict[str, list[str]]:
    """Return what is timed, by name."""
    found = {
        "import iree.runtime, numpy": [*PYTHON, "import iree.runtime, numpy"],
        "import llmbuild.runtime": [*PYTHON, "import llmbuild.runtime"],
        "llmbuild --help": [sys.executable, "-m", "llmbuild", "--help"],
    }
    if recipe is not None:
        found["null build"] = [sys.executable, "-m", "llmbuild", "build", str(recipe), "-C", str(catalog)]
    return found


def seconds(command: list[str]) -> float:
    """Return the wall seconds of one run, which must succeed."""
    begin = perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return perf_counter() - begin


def main() -> None:
    """Print one row for each command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--recipe", type=Path)
    parser.add_argument("-C", "--catalog", type=Path, default=Path("catalog"))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    timed = commands(arguments.recipe, arguments.catalog)
    samples: dict[str, list[float]] = {name: [] for name in timed}
    for round_ in range(arguments.rounds + 1):  # the first fills the file cache
        for name in random.Random(round_).sample(list(timed), len(timed)):
            took = seconds(timed[name])
            if round_:
                samples[name].append(took)
    base = samples["import iree.runtime, numpy"]
    rows = [
        {
            "what": name,
            "median_s": round(statistics.median(taken), 4),
            "min_s": round(min(taken), 4),
            "max_s": round(max(taken), 4),
            "ratio_to_import_iree": round(statistics.median(a / b for a, b in zip(taken, base, strict=True)), 3),
        }
        for name, taken in samples.items()
    ]
    if arguments.json:
        print(json.dumps({"machine": host.machine().describe(), "rounds": arguments.rounds, "rows": rows}))
        return
    print(f"{host.machine().describe()}, {arguments.rounds} interleaved rounds")
    print(table(list(rows[0]), [[str(v) for v in row.values()] for row in rows]))


if __name__ == "__main__":
    main()
