"""Kill imports with SIGKILL at random moments, and see that the catalog stays whole and the next run goes on.

    python scripts/bench/kill_imports.py [--recipe RECIPE] [--kills 20] [--points 2] [--json]

Each time, `llmbuild build RECIPE --until import` starts with an empty catalog, and is killed at a moment drawn evenly
from the time that an uninterrupted run takes. What is looked at:

- `survivors`: no process of its tree outlives it;
- `verify`: `llmbuild verify` finds nothing wrong, and no blob that a row names is damaged or missing;
- `kept`: how many of the imports that were in the catalog at the kill are the same rows after the next run, and how
  many layers that run says were there;
- `result`: the next run ends well, and each program has the digest of the uninterrupted run's;
- `left after`: temporary files and folders, in the catalog and beside it, after the next run and `llmbuild gc`; but
  for what an uninterrupted run leaves, such as the caches of libraries.

Processes have a temporary folder of their own, so that what they leave is found. Ends with 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic, sleep

from comparison.conversion import ROOT
from comparison.script import end, say
from comparison.watched import gone, needs_linux, tree

from llmbuild.catalog import locks
from llmbuild.catalog.place import FILE
from llmbuild.errors import InputError
from llmbuild.report.rows import table
from llmbuild.runtime import host

RESUMED = re.compile(r"interrupted: (\d+) of (\d+) layers were there")
"""What a run tells of an import that it goes on with."""

ANSWERS = "targets"
"""The folder of what the compiler says of targets, which a build keeps in a catalog that is there."""

BLOB = re.compile(r"[0-9a-f]{64}")
"""Name of a file that is whole."""

ENDED_S = 10.0
"""Seconds that the children of a killed process may take to end."""


@dataclass(frozen=True)
class Place:
    """One catalog, and the temporary folder of the processes that work on it."""

    folder: Path

    @property
    def catalog(self) -> Path:
        """The catalog."""
        return self.folder / "catalog"

    @property
    def temporary(self) -> Path:
        """Where processes put what they do not keep."""
        return self.folder / "temporary"

    def command(self, *words: str) -> list[str]:
        """Return a command of llmbuild on the catalog."""
        return [sys.executable, "-m", "llmbuild", *words, "-C", str(self.catalog)]

    def environment(self) -> dict[str, str]:
        """Return the environment of its processes."""
        self.temporary.mkdir(parents=True, exist_ok=True)
        return {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(self.temporary)}

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command of llmbuild to its end."""
        command = self.command(*words)
        return subprocess.run(command, env=self.environment(), capture_output=True, text=True, check=False)

    def imports(self) -> dict[str, str]:
        """Return when each import of the catalog was recorded, by its key; none without a catalog."""
        if not (self.catalog / FILE).is_file():
            return {}
        with closing(sqlite3.connect(self.catalog / FILE)) as connection:
            if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'import'").fetchone():
                return {}
            return dict(connection.execute('SELECT key, created_at FROM "import"'))

    def leftovers(self) -> list[str]:
        """Return what is neither a blob nor a lock nor a part of the database, by its path."""
        inside = [path for path in self.catalog.rglob("*") if path.is_file() and not self._has_its_place(path)]
        beside = list(self.temporary.iterdir()) if self.temporary.is_dir() else []
        return sorted(str(path.relative_to(self.folder)) for path in [*inside, *beside])

    def _has_its_place(self, path: Path) -> bool:
        first = path.relative_to(self.catalog).parts[0]
        return first in (locks.FOLDER, ANSWERS) or first.startswith(FILE) or bool(BLOB.fullmatch(path.name))


@dataclass(frozen=True)
class Kill:
    """What came of one kill; every text is empty where all is well."""

    at_s: float
    ended: bool
    """Whether the run had ended before it could be killed."""
    survivors: str
    verify: str
    leftovers_at_kill: int
    imports_at_kill: int
    imports_kept: int
    tensors_resumed: str
    result: str
    left_after: str

    @property
    def well(self) -> bool:
        """Whether nothing is wrong."""
        lost = self.imports_kept != self.imports_at_kill
        return not (self.survivors or self.verify or self.result or self.left_after or lost)


def build_words(asked: argparse.Namespace) -> list[str]:
    """Return the command that imports."""
    return ["build", str(asked.recipe.absolute()), "--until", "import", "--trials", str(asked.points), "--json"]


def programs(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """Return the digest of each program by its choices.

    Raises:
        InputError: an import failed.
    """
    rows = json.loads(done.stdout or "[]")
    failed = [row["failure"] for row in rows if row["failure"]]
    if done.returncode or failed or not rows:
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "")
        raise InputError(f"the import ended with {done.returncode}: {failed[0] if failed else last}")
    return {row["choices"]: row["program"] for row in rows}


def verified(place: Place) -> str:
    """Return what is wrong with a catalog; empty for a whole one, and where there is none yet."""
    if not (place.catalog / FILE).is_file():
        return ""
    done = place.run("verify", "--json")
    if done.returncode == 0:
        return ""
    try:
        wrong = [f"{row['problem']} {row['what']}" for row in json.loads(done.stdout) if row["wrong"]]
    except (ValueError, KeyError):
        wrong = []
    return "; ".join(wrong[:3]) or f"ended with {done.returncode}: {done.stderr.strip()[-200:]}"


@dataclass(frozen=True)
class Whole:
    """An uninterrupted run: its programs by their choices, its seconds, and what it leaves."""

    programs: dict[str, str]
    seconds: float
    leaves: tuple[str, ...]


def whole(asked: argparse.Namespace, folder: Path) -> Whole:
    """Run twice without a kill: the first fills caches, and the second must make the same.

    Raises:
        InputError: it does not.
    """
    made = []
    for name in ("first", "second"):
        place = Place(folder / name)
        begin = monotonic()
        found = programs(place.run(*build_words(asked)))
        seconds = monotonic() - begin
        place.run("gc")
        made.append(Whole(found, seconds, tuple(place.leftovers())))
    if made[0].programs != made[1].programs:
        raise InputError(f"{asked.recipe}: two uninterrupted imports make different programs")
    return made[1]


def kill(asked: argparse.Namespace, folder: Path, at_s: float, expected: Whole) -> Kill:
    """Kill one import after some seconds, and finish it."""
    place = Place(folder)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            place.command(*build_words(asked)), env=place.environment(), stdout=log, stderr=log, start_new_session=True
        )
    until = monotonic() + at_s
    try:
        while monotonic() < until and process.poll() is None:
            sleep(min(0.005, at_s))
    except KeyboardInterrupt:
        process.send_signal(signal.SIGKILL)
        raise
    ended, living = process.poll() is not None, list(tree(process.pid))
    if not ended:
        process.send_signal(signal.SIGKILL)
    process.wait()
    survivors = "" if gone(living, ENDED_S) else f"processes live on {ENDED_S:.0f} s after the kill"
    wrong, left, before = verified(place), len(place.leftovers()), place.imports()
    done = place.run(*build_words(asked))
    after = place.imports()
    wrong = wrong or verified(place)
    try:
        result = "" if programs(done) == expected.programs else "another result than without a kill"
    except InputError as error:
        result = str(error)
    place.run("gc")
    stays = [name for name in place.leftovers() if name not in expected.leaves]
    resumed = RESUMED.findall(done.stderr + done.stdout)
    return Kill(
        at_s,
        ended,
        survivors,
        wrong,
        left,
        len(before),
        sum(after.get(key) == when for key, when in before.items()),
        " ".join(f"{there}/{total}" for there, total in resumed),
        result,
        " ".join(stays[:3]),
    )


def text(kills: Sequence[Kill]) -> str:
    """Return the table."""
    header = ["killed at", "survivors", "verify", "left then", "kept", "tensors resumed", "result", "left after"]
    lines = [
        [
            f"{each.at_s:.2f} s" + (" (ended)" if each.ended else ""),
            each.survivors or "none",
            each.verify or "whole",
            str(each.leftovers_at_kill),
            f"{each.imports_kept}/{each.imports_at_kill}",
            each.tensors_resumed or "-",
            each.result or "same",
            each.left_after or "nothing",
        ]
        for each in kills
    ]
    return table(header, lines, left=(1, 2, 6, 7))


def options(words: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "smollm2-135m.yaml")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--points", type=int, default=2, help="imports of a run: the compiler's defaults, and others")
    parser.add_argument("--work", type=Path, help="folder for the catalogs; default: a temporary one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    found = parser.parse_args(words)
    if found.kills < 1 or found.points < 1:
        parser.error("--kills and --points are at least 1")
    return found


def main() -> int:
    """Print one row for each kill."""
    asked, kills = options(), list[Kill]()
    if why := needs_linux():
        raise InputError(why)
    draw = random.Random(asked.seed)
    with TemporaryDirectory(prefix="llmbuild-bench-", dir=asked.work) as name:
        expected = whole(asked, Path(name))
        say(f"an uninterrupted run makes {len(expected.programs)} imports in {expected.seconds:.1f} s")
        for number in range(asked.kills):
            with TemporaryDirectory(prefix=f"kill-{number}-", dir=name) as folder:
                kills.append(kill(asked, Path(folder), draw.uniform(0, expected.seconds), expected))
            say(f"[{number + 1}/{asked.kills}] at {kills[-1].at_s:.2f} s: {'well' if kills[-1].well else 'wrong'}")
    bad = sum(not each.well for each in kills)
    if asked.json:
        rows = [{**asdict(each), "well": each.well} for each in kills]
        told = {"recipe": asked.recipe.stem, "uninterrupted": asdict(expected), "wrong": bad}
        print(json.dumps({"machine": host.machine().describe(), **told, "rows": rows}))
    else:
        made = f"{len(expected.programs)} imports in {expected.seconds:.1f} s"
        print(f"{host.machine().describe()}; {asked.recipe.stem}, {made}")
        print(text(kills))
        print(f"{bad} of {len(kills)} kills left something wrong")
    return 1 if bad else 0


if __name__ == "__main__":
    end(main)
