"""The pick that the database finds is the one that looking at every row finds."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmbuild.errors import NoVariant
from llmbuild.runtime import reader
from llmbuild.runtime.choose import choose
from llmbuild.runtime.model import host_facts, pick, same_place
from llmbuild.spec.machine import Machine
from llmbuild.spec.slo import parse_slo
from tests.support.synthetic import Made, fill, multiply

ROWS = 10
HERE = replace(host_facts(), memory_bytes=1 << 40)
ELSEWHERE = Machine("other", "x86_64", 1, 1, "Linux", "", "", "3.13.0", ())
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
)


@given(
    st.lists(row, min_size=2 * ROWS, max_size=2 * ROWS),
    st.sampled_from(
        [[], ["tpot_s<=0.002"], ["ttft_s<0.003"], ["tpot_s>=0.002", "ttft_s<=0.002"], ["peak_memory_bytes<=1500"]]
    ),
    st.sampled_from(["tpot_s", "ttft_s", "output_tokens_per_s", "artifact_bytes", "peak_memory_bytes"]),
    st.booleans(),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_database_and_every_row_agree(
    shelf: Path, cells: list[tuple], bounds: list[str], objective: str, only_elsewhere: bool
) -> None:
    with sqlite3.connect(shelf / reader.FILE) as connection:
        standings = connection.execute("SELECT id, measurement FROM standing ORDER BY id").fetchall()
        for (number, key), (status, tpot, ttft, memory, old) in zip(standings, cells, strict=True):
            if only_elsewhere and number <= ROWS:
                status = "infeasible"
            connection.execute("UPDATE standing SET status = ? WHERE id = ?", (status, number))
            connection.execute(
                "UPDATE measurement SET tpot_s = ?, ttft_s = ?, peak_memory_bytes = ? WHERE key = ?",
                (tpot, ttft, memory, key),
            )
            connection.execute(
                "UPDATE artifact SET runtime = ? WHERE digest = (SELECT artifact FROM measurement WHERE key = ?)",
                ("1.0.0" if old else HERE.runtime, key),
            )
    connection.close()
    expected = choose(reader.variants(shelf, "m", everything=True), HERE, parse_slo(bounds, objective))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("llmbuild.runtime.model.host_facts", lambda: HERE)
            found = pick(shelf, "m", bounds, objective)
    except NoVariant as error:
        found = error.pick
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
