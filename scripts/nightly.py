"""Build every recipe for every target, compare with the last publication, publish if nothing is worse, write a report.

python scripts/nightly.py [RECIPE...] [-t TARGET]... -C CATALOG --published PLACE [--sign KEY] [--out FOLDER]
                          [--trials N] [--budget TIME] [--noise 0.1] [--publish-anyway]

A failed job is a row with its log, and the others continue. Exit 0: all built, no regression, published. Exit 1: a job
failed or there is a regression; on a regression nothing is published. The report is `report.md` and `report.json` in
FOLDER, beside one log for each job.
"""

from __future__ import annotations

import argparse
import json
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmbuild.catalog.exchange.diff import FAILING
from llmbuild.runtime import host

Row = dict[str, Any]
MAIN = [sys.executable, "-m", "llmbuild"]
NOT_THIS_HOST = "cannot run on this host"
NO_FRONT = "to publish: build one first"
NOTHING_YET = "nothing is published there"


def call(arguments: Sequence[str | Path], log: Path) -> tuple[int, str, str]:
    """Run a command of llmbuild; return its exit code, its data and its talk, and keep both in a log."""
    line = [*MAIN, *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    log.write_text(
        f"$ llmbuild {' '.join(map(str, arguments))}\n{done.stderr}\n{done.stdout}\nexit {done.returncode}\n"
    )
    return done.returncode, done.stdout, done.stderr


def job(recipe: Path, target: str, arguments: argparse.Namespace) -> Row:
    """Build one recipe for one target, or only compile it where this host cannot run it."""
    begin, log = time.monotonic(), arguments.out / f"{recipe.stem}-{Path(target).stem}.log"
    more = [f"--{name}={value}" for name in ("trials", "budget") if (value := getattr(arguments, name))]
    given = [recipe, "-t", target, "-C", arguments.catalog, "--json", *more]
    did, (code, data, talk) = "build", call(["build", *given], log)
    if code and NOT_THIS_HOST in talk:
        did, (code, data, talk) = "compile", call(["compile", *given], log)
    return {
        "recipe": recipe.stem,
        "target": target,
        "did": did,
        "exit": code,
        "variants": len(json.loads(data)) if code == 0 and data.strip() else 0,
        "seconds": round(time.monotonic() - begin, 1),
        "told": talk.strip().splitlines()[-1][:200] if code and talk.strip() else "",
        "log": log.name,
    }


def failures(catalog: Path, since: str) -> list[Row]:
    """Return what failed since a time: stage, reason, the command that shows it again."""
    if not (catalog / "catalog.sqlite").is_file():
        return []
    query = "SELECT model, stage, reason, command, log FROM failures WHERE created_at >= ? ORDER BY failure"
    with closing(sqlite3.connect(catalog / "catalog.sqlite")) as connection:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute(query, (since,))]


def compared(arguments: argparse.Namespace) -> tuple[list[Row], str]:
    """Return what changed since the last publication, and why nothing could be compared."""
    given = ["diff", arguments.published, arguments.catalog, "--json", f"--noise={arguments.noise}"]
    code, data, talk = call(given, arguments.out / "diff.log")
    if code == 0:
        return json.loads(data), ""
    if NOTHING_YET in talk or "no catalog at" in talk:
        return [], "nothing was published before"
    return [], f"not compared: {talk.strip()}"


def published(arguments: argparse.Namespace) -> Row:
    """Publish the fronts."""
    signed = ["--sign", arguments.sign] if arguments.sign else []
    code, data, talk = call(
        ["publish", arguments.published, "-C", arguments.catalog, "--json", *signed], arguments.out / "publish.log"
    )
    if code and NO_FRONT in talk:  # targets that were only compiled have none
        return {"exit": 0, "told": "nothing measured, so nothing to publish"}
    return {"exit": code, "told": talk.strip(), **(json.loads(data)[0] if code == 0 else {})}


def night(arguments: argparse.Namespace) -> Row:
    """Do everything and return the report."""
    since = datetime.now(UTC).isoformat(timespec="milliseconds")
    jobs = [job(recipe, target, arguments) for recipe in arguments.recipes for target in arguments.targets]
    changes, unsure = compared(arguments)
    worse = [change for change in changes if change["kind"] in FAILING]
    blocked = bool(worse or unsure.startswith("not compared")) and not arguments.publish_anyway
    sent = {"exit": 0, "told": "not published: worse than what is there"} if blocked else published(arguments)
    return {
        "at": since,
        "machine": host.machine().describe(),
        "published": arguments.published,
        "jobs": jobs,
        "changes": changes,
        "compared": unsure or "yes",
        "failures": failures(arguments.catalog, since),
        "publication": sent,
        "well": not worse and not blocked and not any(row["exit"] for row in [*jobs, sent]),
    }


def markdown(report: Row) -> str:
    """Return the report for people."""
    told = "well" if report["well"] else "NOT well"
    lines = [f"# {report['at']}: {told}", "", report["machine"], "", "## Jobs", "", *_table(report["jobs"])]
    lines += ["", f"## Changes since {report['published']}", ""]
    lines += _table(report["changes"]) or [report["compared"] if report["compared"] != "yes" else "None."]
    lines += ["", "## Failures", "", *(_table([{**f, "log": ""} for f in report["failures"]]) or ["None."])]
    for failure in report["failures"]:
        lines += ["", f"### {failure['model']}: {failure['stage']}", "", "```", failure["log"].strip(), "```"]
    return "\n".join([*lines, "", "## Publication", "", str(report["publication"]["told"]), ""])


def _table(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    names = [name for name in rows[0] if name != "log" or rows[0][name]]
    lines = [[str(row[name]).replace("|", "\\|").replace("\n", " ") for name in names] for row in rows]
    return ["| " + " | ".join(line) + " |" for line in (names, ["---"] * len(names), *lines)]


def main() -> None:
    """Parse, do it, write the report, exit with what it came to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", type=Path, metavar="RECIPE")
    parser.add_argument("-t", "--target", dest="targets", action="append", metavar="TARGET")
    parser.add_argument("-C", "--catalog", type=Path, default=Path("catalog"))
    parser.add_argument("--published", required=True, metavar="PLACE")
    parser.add_argument("--sign", type=Path)
    parser.add_argument("--out", type=Path, default=Path("nightly"))
    parser.add_argument("--trials", type=int)
    parser.add_argument("--budget")
    parser.add_argument("--noise", type=float, default=0.1)
    parser.add_argument("--publish-anyway", action="store_true", help="publish although something is worse")
    arguments = parser.parse_args()
    arguments.recipes = arguments.recipes or sorted(Path("recipes").glob("*.yaml"))
    arguments.targets = arguments.targets or ["host"]
    arguments.out.mkdir(parents=True, exist_ok=True)
    report = night(arguments)
    (arguments.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (arguments.out / "report.md").write_text(markdown(report))
    print(markdown(report))
    sys.exit(not report["well"])


if __name__ == "__main__":
    main()
