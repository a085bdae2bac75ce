"""Short versions of `scripts/bench/endurance.py`, `fuzz.py` and `fuzz_cli.py`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))

import endurance
import fuzz


def test_killed_at_random_moments_nothing_is_lost_and_the_next_run_completes(tmp_path: Path) -> None:
    found = endurance.kill(tmp_path, None, 6, seed=3)
    assert (found["problems"], found["lost"], set(found["endings"].values())) == ([], 0, {0})
    assert sum(found["kills"].values()) == 6


def test_many_processes_write_one_catalog_and_nobody_is_told_of_a_lock(tmp_path: Path) -> None:
    found = endurance.many(tmp_path, 4, 1.5)
    assert found["models_written"] >= 4
    assert (found["lost_updates"], found["errors"], found["problems"]) == (0, [], [])


def test_mutated_recipes_targets_locks_pointers_and_catalogs_are_one_message_each(tmp_path: Path) -> None:
    found = fuzz.run(tmp_path, 200, seed=0)
    assert found["faults"] == []
    assert found["refused"] + found["taken"] == 200
    assert found["refused"] > 50


def test_odd_command_lines_in_odd_places_are_one_message_each() -> None:
    script = str(Path(fuzz.__file__).with_name("fuzz_cli.py"))
    command = [sys.executable, script, "--cases", "80", "--seed", "3", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    found = json.loads(done.stdout)
    assert found["faults"] == []
    assert sum(found["ended"].values()) == 80
    assert set(found["ended"]) >= {"0", "2"}
