"""The pick that the database finds is the one that looking at every row finds."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmbuild.errors import InputError, NoVariant
from llmbuild.runtime import reader
from llmbuild.runtime.choose import choose
from llmbuild.runtime.model import host_facts, pick, same_place
from llmbuild.spec.machine import Machine
from llmbuild.spec.slo import parse_slo
from tests.support.synthetic import Made, fill, multiply

ROWS = 10
HERE = replace(host_facts(), memory_bytes=1 << 40)
ELSEWHERE = Machine("other", "x86_64", 1, 1, "Linux", "", "3.13.0", ())
value = st.one_of(st.none(), st.sampled_from([0.001, 0.002, 0.003]))


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of two machines, whose cells each example sets anew."""
    folder = tmp_path_factory.mktemp("shelf")
    made = [Made(f"v{number}", artifact=f"{number}".encode()) for number in range(ROWS)]
    fill(folder, made)
    fill(folder, made, machine=ELSEWHERE)
    return folder


row = st.tuples(
    st.sampled_from(["pareto", "undecided", "dominated", "infeasible"]),
    value,
    value,
    st.one_of(st.none(), st.sampled_from([0, 1000, 2000, 1 << 60])),
    st.booleans(),
    st.sampled_from([(None, None), (0.0, 1.0), (0.01, 0.94), (0.011, 0.99), (0.001, 0.9)]),
)


@given(
    st.lists(row, min_size=2 * ROWS, max_size=2 * ROWS),
    st.sampled_from(
        [
            [],
            ["tpot_s<=0.002"],
            ["ttft_s<0.003"],
            ["tpot_s>=0.002", "ttft_s<=0.002"],
            ["peak_memory_bytes<=1500"],
            ["quality_kl<=0.02"],
        ]
    ),
    st.sampled_from(["tpot_s", "ttft_s", "output_tokens_per_s", "artifact_bytes", "peak_memory_bytes"]),
    st.booleans(),
    st.sampled_from([(None, None), ("host", None), (None, "short"), ("host", "short"), ("host", "other")]),
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_database_and_every_row_agree(
    shelf: Path, cells: list[tuple], bounds: list[str], objective: str, only_elsewhere: bool, narrowed: tuple
) -> None:
    with sqlite3.connect(shelf / reader.FILE) as connection:
        standings = connection.execute("SELECT id, measurement FROM standing ORDER BY id").fetchall()
        for (number, key), (status, tpot, ttft, memory, old, quality) in zip(standings, cells, strict=True):
            if only_elsewhere and number <= ROWS:
                status = "infeasible"
            connection.execute("UPDATE standing SET status = ? WHERE id = ?", (status, number))
            connection.execute(
                "UPDATE measurement SET tpot_s = ?, ttft_s = ?, peak_memory_bytes = ?, quality_kl = ?, "
                "quality_top1 = ? WHERE key = ?",
                (tpot, ttft, memory, *quality, key),
            )
            connection.execute(
                "UPDATE artifact SET runtime = ? WHERE digest = (SELECT artifact FROM measurement WHERE key = ?)",
                ("1.0.0" if old else HERE.runtime, key),
            )
    connection.close()
    expected = choose(reader.variants(shelf, "m", *narrowed, everything=True), HERE, parse_slo(bounds, objective))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("llmbuild.runtime.model.host_facts", lambda: HERE)
            found = pick(shelf, "m", bounds, objective, *narrowed)
    except NoVariant as error:
        found = error.pick
    except InputError:
        assert narrowed == ("host", "other")
        return
    assert (found.chosen is None) == (expected.chosen is None)
    assert found.chosen is None or same_place(found.chosen, expected.chosen)
    assert {(c.row["variant"], c.row["machine_digest"]): c.reason for c in found.candidates} == {
        (c.row["variant"], c.row["machine_digest"]): c.reason for c in expected.candidates
    }
    assert [r["variant"] for r in found.fallbacks] == [r["variant"] for r in expected.fallbacks]


def test_every_verdict_is_there_when_it_is_asked_for(tmp_path: Path) -> None:
    fill(tmp_path, [Made("default", "dominated", 0.2, default=True)])
    multiply(tmp_path, 300, 0.5)
    made = pick(tmp_path, "m", ["ttft_s<=0.5"])
    lines = made.explain().splitlines()
    assert len(made.candidates) == 300
    assert (len(lines), lines[1].startswith("chosen   ")) == (301, True)
    assert all(c.reason or c.row is made.chosen for c in made.candidates)


def commit_elsewhere(folder: Path, statement: str) -> None:
    """Change a catalog from another process."""
    code = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute(sys.argv[2]); c.commit(); c.close()"
    subprocess.run([sys.executable, "-c", code, folder / reader.FILE, statement], check=True)


def test_a_pick_sees_what_another_process_committed_just_before(tmp_path: Path) -> None:
    fill(tmp_path, [Made("a", tpot_s=0.02), Made("b", tpot_s=0.03, artifact=b"b")])
    multiply(tmp_path, 40, 1.0)
    for number in range(20):
        best = f"SELECT measurement FROM standing ORDER BY variant LIMIT 1 OFFSET {number}"
        commit_elsewhere(tmp_path, f"UPDATE measurement SET tpot_s = {1e-4 / (1 + number)} WHERE key = ({best})")
        chosen = pick(tmp_path, "m").chosen
        assert chosen is not None
        assert chosen["tpot_s"] == 1e-4 / (1 + number)


def test_a_pick_sees_a_catalog_that_took_the_place_of_another(tmp_path: Path) -> None:
    for name, seconds in (("old", 0.01), ("new", 0.5)):
        fill(tmp_path / name, [Made(name, tpot_s=seconds)])
    (tmp_path / "catalog").symlink_to(tmp_path / "old")
    before = pick(tmp_path / "catalog", "m").chosen
    (tmp_path / "catalog").unlink()
    (tmp_path / "new").rename(tmp_path / "catalog")
    after = pick(tmp_path / "catalog", "m").chosen
    assert before is not None
    assert after is not None
    assert (before["tpot_s"], after["tpot_s"]) == (0.01, 0.5)


def test_a_forked_child_picks_for_itself(tmp_path: Path) -> None:
    fill(tmp_path, [Made("a", tpot_s=0.02)])
    code = (
        "import os, sys; from llmbuild.runtime.model import pick\n"
        "mine = pick(sys.argv[1], 'm').chosen['variant']; child = os.fork()\n"
        "if child == 0:\n    os._exit(0 if pick(sys.argv[1], 'm').chosen['variant'] == mine else 1)\n"
        "status = os.waitpid(child, 0)[1]; assert pick(sys.argv[1], 'm').chosen['variant'] == mine; sys.exit(status)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 0
