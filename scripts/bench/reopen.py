"""Open a variant, generate, and close it, repeatedly in several processes, and check that each close returns.

python scripts/bench/reopen.py -C CATALOG [-m MODEL] [--variant VARIANT] [--processes 4] [--times 2000] [--json]

Use more processes than cores, so that workers and their caller are preempted everywhere. A process with one opening of
more than a minute has hung: it reports the place and ends. Seconds are those of one process's openings, the first of
which also loads what the runtime needs once.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from llmbuild.errors import LlmbuildError
from llmbuild.process.child import say
from llmbuild.report.rows import table
from llmbuild.runtime import host, load

HUNG_S = 60.0
TOKENS = 4


def reopen(catalog: Path, model: str | None, variant: str | None, times: int) -> dict[str, list[float]]:
    """Return the seconds of each opening and closing."""
    taken: dict[str, list[float]] = {"open_s": [], "close_s": []}
    for _ in range(times):
        faulthandler.dump_traceback_later(HUNG_S, exit=True)
        opened = load(catalog, model, variant=variant)
        begin = perf_counter()
        session = opened.session
        taken["open_s"].append(perf_counter() - begin)
        list(opened.tokens([1], TOKENS))
        begin = perf_counter()
        session.close()
        taken["close_s"].append(perf_counter() - begin)
    faulthandler.cancel_dump_traceback_later()
    return taken


def together(asked: argparse.Namespace) -> dict[str, Any]:
    """Let processes do so side by side; return how many openings were made, and what those said that did not end."""
    line = [sys.executable, *sys.argv, "--alone"]
    children = [
        subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(asked.processes)
    ]
    told = [child.communicate() for child in children]
    done = [json.loads(out) for (out, _), child in zip(told, children, strict=True) if child.returncode == 0]
    return {
        "processes": asked.processes,
        "openings": sum(len(one["open_s"]) for one in done),
        "problems": [err.strip()[-500:] for (_, err), child in zip(told, children, strict=True) if child.returncode],
        "first_open_s": median(one["open_s"][0] for one in done) if done else None,
        "later_open_s": median(s for one in done for s in one["open_s"][1:] or one["open_s"]) if done else None,
        "close_s": median(s for one in done for s in one["close_s"]) if done else None,
    }


def main() -> None:
    """Print what came of it; exit 1 where a process did not end well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-C", "--catalog", type=Path, default=Path("catalog"))
    parser.add_argument("-m", "--model")
    parser.add_argument("--variant", help="a part of its digest; else the best in time per token")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--times", type=int, default=2000)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    try:
        load(asked.catalog, asked.model, variant=asked.variant)
    except LlmbuildError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    if asked.alone:
        say(json.dumps(reopen(asked.catalog, asked.model, asked.variant, asked.times)))
        return
    found = together(asked)
    if asked.json:
        print(json.dumps({"machine": host.machine().describe(), **found}))
    else:
        print(host.machine().describe())
        print(table(["what", "came to"], [[key, _plain(value)] for key, value in found.items()], left=(0, 1)))
    sys.exit(bool(found["problems"]))


def _plain(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
