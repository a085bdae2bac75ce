from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from llmbuild.catalog.schema import FILE
from tests.conftest import Project

ROOT = Path(__file__).parents[2]


def night(folder: Path, *arguments: str | Path) -> tuple[int, dict, str]:
    line = [sys.executable, ROOT / "scripts" / "nightly.py", *arguments, "--out", folder / "out", "--noise", "0.2"]
    done = subprocess.run([*map(str, line)], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, json.loads((folder / "out" / "report.json").read_text()), done.stdout


@pytest.fixture
def nights(built: Project, tmp_path: Path) -> list[str | Path]:
    subprocess.run(["cp", "-r", built.catalog, tmp_path / "c"], check=True)
    return [built.recipe, "-C", tmp_path / "c", "--published", tmp_path / "pub"]


def test_the_first_night_publishes_and_the_next_finds_no_difference(nights: list[str | Path], tmp_path: Path) -> None:
    first, second = night(tmp_path, *nights), night(tmp_path, *nights)
    assert (first[0], first[1]["compared"], second[0], second[1]["changes"]) == (
        0,
        "nothing was published before",
        0,
        [],
    )
    assert (tmp_path / "pub" / "latest.json").is_file()
    assert "| tiny | host | build | 0 | 3" in second[2].replace("| 2 |", "| 3 |")


def test_a_regression_ends_with_1_and_is_not_published(nights: list[str | Path], tmp_path: Path) -> None:
    night(tmp_path, *nights)
    before = (tmp_path / "pub" / "latest.json").read_bytes()
    with sqlite3.connect(tmp_path / "c" / FILE) as connection:
        for name, body in connection.execute("SELECT key, intervals FROM measurement").fetchall():
            wide = {**json.loads(body), "tpot_s": [1.0, 1.1]}
            connection.execute("UPDATE measurement SET tpot_s=1.05, intervals=? WHERE key=?", (json.dumps(wide), name))
    connection.close()
    code, report, shown = night(tmp_path, *nights)
    assert code == 1
    assert {c["what"] for c in report["changes"] if c["kind"] == "regression"} >= {"tpot_s"}
    assert ((tmp_path / "pub" / "latest.json").read_bytes(), "not published" in shown) == (before, True)


def test_a_job_that_fails_is_a_row_with_its_log_and_the_others_go_on(nights: list[str | Path], tmp_path: Path) -> None:
    code, report, _ = night(tmp_path, tmp_path / "none.yaml", *nights)
    jobs = {row["recipe"]: row for row in report["jobs"]}
    assert (code, jobs["none"]["exit"], jobs["tiny"]["exit"]) == (1, 2, 0)
    assert "no such file" in jobs["none"]["told"]
    assert "no such file" in (tmp_path / "out" / jobs["none"]["log"]).read_text()
    assert report["publication"]["exit"] == 0


def test_the_workflow_is_yaml_and_runs_the_script() -> None:
    flow = YAML(typ="safe").load((ROOT / ".github" / "workflows" / "nightly.yml").read_text())
    job, tests = flow["jobs"]["night"], flow["jobs"]["exhaustive"]
    assert tests["steps"][-1]["run"] == "bash .ci/run --exhaustive"
    runs = [step.get("run", "") for step in job["steps"]]
    assert any("scripts/nightly" in run for run in runs)
    assert job["strategy"]["fail-fast"] is False
