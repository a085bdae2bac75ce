"""Kill builds, publications and collections at random moments, and let many processes write one catalog.

python scripts/bench/endurance.py kill --recipe recipes/pystdlib.yaml [--moments 50] [--json]
python scripts/bench/endurance.py write [--processes 8] [--seconds 60] [--json]

`kill` checks after each kill -9: the database's integrity, every digest, that nothing finished was lost, and that what
was published can be pulled whole; at the end, that the next run of each command completes. Without --recipe, builds are
those of a process that records synthetic variants through the writer.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from synthetic import Made, fill

from llmbuild.catalog import verify
from llmbuild.catalog.schema import FILE
from llmbuild.catalog.writer import Catalog
from llmbuild.errors import CatalogError
from llmbuild.report.rows import table
from llmbuild.runtime import host

MAIN = [sys.executable, "-m", "llmbuild"]
SPAN_S = {"build": 12.0, "write": 0.8, "publish": 1.5, "gc": 1.2}
"""A kill comes at a moment drawn from this long after the start."""


def write(folder: Path, name: str, seconds: float, front: bool = True) -> int:
    """Record synthetic variants, one whole model after another, for some time; return how many models."""
    count, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        status = "pareto" if front else "dominated"
        one = f"{name}-{count}"  # named apart, so that no compile has the key of another
        made = [Made(f"default {one}", default=True), Made(f"more {one}", status, parameters=one.encode())]
        fill(folder, made, one)
        count += 1
    return count


def finished(folder: Path) -> set[tuple[Any, ...]]:
    """Return what is finished in a catalog: every trial, and every row that names what was made."""
    if not (folder / FILE).is_file():
        return set()
    connection = sqlite3.connect(folder / FILE)
    queries = ("SELECT 'trial', scope, point, variant FROM trial", "SELECT 'compile', key, artifact, '' FROM compile")
    try:
        return {row for query in queries for row in connection.execute(query)}
    except sqlite3.OperationalError:  # killed before the tables were there
        return set()
    finally:
        connection.close()


def wrongs(folder: Path) -> list[str]:
    """Return what is wrong with a catalog: integrity, references, digests."""
    if not (folder / FILE).is_file():
        return []
    catalog = Catalog(folder)
    try:
        return [f"{f.problem} {f.what}" for f in verify.verify(catalog) if f.wrong]
    finally:
        catalog.close()


def unpublished(place: Path, scratch: Path) -> list[str]:
    """Return why a publication that has a pointer cannot be pulled whole; empty where it can, or there is none yet."""
    if not (place / "latest.json").is_file():
        return []
    with TemporaryDirectory(dir=scratch) as name:
        done = subprocess.run(
            [*MAIN, "pull", str(place), "--all", "-C", f"{name}/got"], capture_output=True, text=True, check=False
        )
    return [] if done.returncode == 0 else [done.stderr.strip()]


def commands(folder: Path, recipe: Path | None) -> dict[str, list[str]]:
    """Return what is killed, by name."""
    catalog = str(folder / "catalog")
    writer = [sys.executable, __file__, "_write", catalog]
    build = {"build": [*MAIN, "build", str(recipe), "-C", catalog]} if recipe else {"write": writer}
    publish = [*MAIN, "publish", str(folder / "published"), "-C", catalog]
    return {**build, "publish": publish, "gc": [*MAIN, "gc", "-C", catalog]}


def kill(folder: Path, recipe: Path | None, moments: int, seed: int = 0) -> dict[str, Any]:
    """Kill each command at random moments and return what came of it."""
    draw, told, kills = random.Random(seed), [], Counter[str]()
    runs = commands(folder, recipe)
    begun = subprocess.run(next(iter(runs.values())) + ([] if recipe else ["1"]), capture_output=True, check=False)
    assert begun.returncode == 0, begun.stderr.decode()
    lost = 0
    for number in range(moments):
        name = draw.choice(list(runs))
        before = finished(folder / "catalog")
        more = ["-B"] if name == "build" and number % 2 else ["30", str(number)] if name == "write" else []
        child = subprocess.Popen([*runs[name], *more], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(draw.uniform(0.0, SPAN_S[name]))
        child.send_signal(signal.SIGKILL)
        kills[name if child.wait() == -signal.SIGKILL else f"{name}, had ended"] += 1
        if more[:1] != ["-B"]:
            lost += len(before - finished(folder / "catalog"))
        found = [*wrongs(folder / "catalog"), *unpublished(folder / "published", folder)]
        told += [f"after killing {name}: {problem}" for problem in found]
    endings = {}
    for name, line in runs.items():
        more = ["1", "end"] if name == "write" else []
        endings[name] = subprocess.run([*line, *more], capture_output=True, check=False).returncode
    told += [f"at the end: {problem}" for problem in wrongs(folder / "catalog")]
    return {"kills": dict(kills), "problems": told, "lost": lost, "endings": endings}


def many(folder: Path, processes: int, seconds: float) -> dict[str, Any]:
    """Let processes write one catalog at once; return how much was written, lost, and what anyone was told."""
    line = [sys.executable, __file__, "_write", str(folder / "catalog"), str(seconds)]
    children = [
        subprocess.Popen([*line, f"p{n}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for n in range(processes)
    ]
    told = [child.communicate() for child in children]
    written = {f"p{n}": int(out or 0) for n, (out, _) in enumerate(told)}
    connection = sqlite3.connect(folder / "catalog" / FILE)
    there = Counter(row[0].rsplit("-", 1)[0] for row in connection.execute("SELECT DISTINCT model FROM standing"))
    connection.close()
    return {
        "processes": processes,
        "seconds": seconds,
        "models_written": sum(written.values()),
        "lost_updates": sum(written.values()) - sum(there.values()),
        "errors": [err.strip()[-300:] for _, err in told if err.strip()],
        "problems": wrongs(folder / "catalog"),
    }


def main() -> None:
    """Run one of the two and print what came of it; exit 1 on any problem."""
    if sys.argv[1:2] == ["_write"]:
        folder, seconds, name = Path(sys.argv[2]), float(sys.argv[3]), (sys.argv[4:] or ["w"])[0]
        try:
            print(write(folder, name, seconds))
        except CatalogError as error:
            sys.exit(str(error))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kill", "write"])
    parser.add_argument("--recipe", type=Path)
    parser.add_argument("--moments", type=int, default=50)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with TemporaryDirectory() as name:
        if arguments.what == "kill":
            found = kill(Path(name), arguments.recipe, arguments.moments, arguments.seed)
            bad = bool(found["problems"] or found["lost"] or any(found["endings"].values()))
        else:
            found = many(Path(name), arguments.processes, arguments.seconds)
            bad = bool(found["errors"] or found["lost_updates"] or found["problems"])
    if arguments.json:
        print(json.dumps({"machine": host.machine().describe(), **found}))
    else:
        print(host.machine().describe())
        print(table(["what", "came to"], [[key, str(value)] for key, value in found.items()], left=(0, 1)))
    sys.exit(bad)


if __name__ == "__main__":
    main()
