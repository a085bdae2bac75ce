from __future__ import annotations

import json
import random
import sqlite3
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmbuild.catalog.schema import FILE
from llmbuild.errors import InputError
from llmbuild.spec.target import Target
from tests.conftest import Project

SCRIPTS = Path(__file__).parents[2] / "scripts" / "bench"
sys.path.insert(0, str(SCRIPTS))

import tiers  # noqa: E402
import trust  # noqa: E402

LOOKS = [12, 24, 48, 96, 192]
CALM = "9629af0c91a4"
"""The recorded variant that runs on one core."""


@pytest.fixture(scope="module")
def starts() -> list[trust.Start]:
    return [start for start in trust.load(trust.RECORDED)[1] if not start.busy]


def test_the_same_artifact_raced_twice_is_not_told_apart(starts: list[trust.Start]) -> None:
    chance, apart = random.Random(0), 0
    for _ in range(100):
        drawn = trust.draw(chance.choice(starts), (CALM, f"{CALM}'"), LOOKS[-1], chance, swap=True)
        apart += trust.apart(trust.race(drawn[CALM], drawn[f"{CALM}'"], LOOKS))
    assert apart <= 1


def test_a_slowdown_of_a_twentieth_is_found_and_never_the_wrong_way_round(starts: list[trust.Start]) -> None:
    chance, found = random.Random(0), []
    for _ in range(60):
        drawn = trust.draw(chance.choice(starts), (CALM, f"{CALM}'"), 384, chance, swap=True)
        found.append(trust.race(drawn[CALM], trust.slowed(drawn[f"{CALM}'"]), [*LOOKS, 384]).orders["tpot_s"])
    assert (found.count("less") >= 57, found.count("greater")) == (True, 0)


def test_a_recording_under_load_is_flagged() -> None:
    busy = [start for start in trust.load(trust.RECORDED)[1] if start.busy]
    assert (
        ["other processes took" in trust.noise.description(start.shares) for start in busy] == [True] * len(busy) != []
    )


def test_a_recording_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no recording there"):
        trust.load(tmp_path / "none.gz")


@given(st.permutations(range(6)), st.permutations(range(6)))
def test_kendalls_tau_is_one_for_equals_minus_one_for_opposites_and_the_same_both_ways(a: list, b: list) -> None:
    assert (trust.kendall(a, a), trust.kendall(a, a[::-1])) == (1, -1)
    assert trust.kendall(a, b) == pytest.approx(trust.kendall(b, a))


def test_survivors_of_a_race_share_their_rounds(built: Project) -> None:
    with sqlite3.connect(built.catalog / FILE) as connection:
        rows = connection.execute(
            "SELECT m.session, m.samples, m.energy_source, m.energy, m.itl_p99_s, m.tpot_s "
            "FROM measurements m JOIN front f ON f.variant = m.variant"
        ).fetchall()
    sessions = {session for session, *_ in rows}
    assert rows  # how many survive is the machine's affair
    assert (len(sessions), None in sessions) == (1, False)
    assert all(len(json.loads(samples)["tpot_s"]) >= 5 for _, samples, *_ in rows)
    assert all((source is None) == (energy is None) for _, _, source, energy, *_ in rows)
    assert all(p99 is None or p99 > 0.5 * tpot for *_, p99, tpot in rows)


def test_a_tier_is_given_our_kernels_where_its_instruction_set_has_them() -> None:
    features = {"x86-64-v2": ("sse4.2",), "x86-64-v3": ("avx2", "fma", "f16c")}
    found = {}
    for name, has in features.items():
        target = Target(name, "llvm-cpu", "x86_64", name, requires=has)
        job = SimpleNamespace(
            target=target, space=SimpleNamespace(knobs=[SimpleNamespace(name="work_groups", domain=(2,))])
        )
        found[name] = tiers.choices(job, "int8").get("kernel", "compiler")
    assert found == {"x86-64-v2": "compiler", "x86-64-v3": "own"}


def test_the_table_of_tiers_gives_ratios_to_the_last_of_the_same_format_and_reasons() -> None:
    row = {"format": "int8", "kernels": "own", "variant": "v", "parameters": "a" * 64, "reason": "", "prefill_s": 0.002}
    rows = [
        {**row, "target": "v3", "decode_s": 0.002, "ratios": {"decode_s": [2.0, 1.9, 2.1]}},
        {**row, "target": "host", "decode_s": 0.001, "ratios": {"decode_s": [1.0, 1.0, 1.0]}},
        {**row, "target": "v2", "decode_s": None, "prefill_s": None, "ratios": {}, "reason": "compile: no"},
    ]
    told = {"machine": "m", "model": "x", "driver": "d", "prompt": 1, "decode": 1, "rounds": 1, "against": "host"}
    lines = tiers.text({**told, "noise": "", "rows": rows}).splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["v3", "host", "v2"]
    assert "2.00 [1.90, 2.10]" in lines[2]
    assert "[" not in lines[3]
    assert lines[5] == "v2 int8: compile: no"
