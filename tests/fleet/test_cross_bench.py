"""The comparison with a public simulator: its input, its output, and our times of fixed steps."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from llmbuild.fleet.simulate.trace import Arrival, Trace, read_trace

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))

import fleet_cross

WORDS = ["--simulator", "none", "--trace", "none", "--prefill-ms", "50", "--decode-ms", "20"]
ASKED = fleet_cross.options(WORDS)
TRACE = Trace("two", (Arrival(0.0, 300, 3), Arrival(0.01, 600, 2)), 10.0)


def test_steps_take_what_is_fixed_whatever_is_in_them() -> None:
    found = fleet_cross.ours(TRACE, ASKED)
    # 0.05: the first prompt; 0.12: 511 of the second one and a decode; 0.19: its rest and a decode; 0.21: a decode
    assert found["ttft_s"] == pytest.approx([0.05, 0.19 - 0.01])
    assert found["tpot_s"] == pytest.approx([(0.19 - 0.05) / 2, 0.02])


def test_no_two_prompts_of_the_other_simulator_s_trace_begin_alike(tmp_path: Path) -> None:
    text = fleet_cross.lines_of(TRACE)
    assert [json.loads(line)["hash_ids"] for line in text.splitlines()] == [[0], [1, 2]]
    (tmp_path / "trace").write_text(text)
    assert read_trace(tmp_path / "trace").arrivals == TRACE.arrivals


def test_the_other_simulator_s_lines_are_read_and_compared() -> None:
    row = {"terminal_status": "completed", "ttft_ms": 120.0, "first_token_ms": 120.0, "last_token_ms": 640.0}
    text = "\n".join(json.dumps({**row, "output_length": n}) for n in (17, 1))
    found = fleet_cross.times_of(text)
    assert found == {"ttft_s": [0.12, 0.12], "tpot_s": [0.0325]}
    assert {one["error"] for one in fleet_cross.rows_of(found, found)} == {0.0}
