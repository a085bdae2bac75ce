"""The comparison of the simulator with reality, over what servers would have told that are as simulated."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from llmbuild.digest import plain
from llmbuild.errors import InputError
from llmbuild.fleet.simulate.replay import replay
from llmbuild.fleet.simulate.trace import Arrival, Trace
from llmbuild.serve.schedule.fcfs import Fcfs
from tests.support.curves import curve

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))

import fleet_reality
from comparison import nodes

KNOWN = curve()
TRACE = Trace("made", tuple(Arrival(i * 0.5, 100 + 37 * i % 400, 10 + i % 5) for i in range(2000)), 1000.0)
ASKED = fleet_reality.options(["--prompt", "60", "--output", "8"])


def run_of(piece: Trace, slower: float = 1.0) -> dict[str, Any]:
    """Return what would be saved of a server whose answers take as long as in the simulator, times a factor."""
    jobs = replay(fleet_reality.point_of(KNOWN, 8), fleet_reality.asked_of(piece.arrivals), Fcfs())
    heard = [
        {
            "sent_s": job.ask.at_s,
            "late_s": 0.001,
            "end": "answered",
            "ttft_s": job.ttft_s * slower,
            "last_s": (job.last_s - job.ask.at_s) * slower,
            "tokens": job.ask.output,
            "chunks": job.ask.output,
        }
        for job in jobs
    ]
    return {
        "place": {"core": 0, "catalog": "", "model": "m", "variant": "v" * 64, "sequences": 8},
        "curve": plain(KNOWN),
        "trace": piece.name,
        "load": 0.5,
        "rate": piece.rate,
        "sends": [list(one) for one in piece.arrivals],
        "heard": heard,
        "seconds": piece.seconds,
        "client_cpu_s": 1.0,
        "server_cpu_s": 2.0,
        "stolen_share": 0.0,
        "steps": {"step_sum": 1.0, "step_count": 10.0, "host_sum": 0.1, "host_count": 10.0},
    }


def piece(rate: float = 2.0) -> Trace:
    return fleet_reality.piece(fleet_reality.scaled(TRACE, 1024, ASKED), rate, 30.0)


def test_a_server_as_simulated_has_no_error_and_a_slower_one_has_its_own() -> None:
    found = fleet_reality.compared(json.loads(json.dumps(run_of(piece()))))
    assert found["error"]["ttft_s"] + found["error"]["tpot_s"] == pytest.approx([0.0] * 6, abs=1e-9)
    assert found["error"]["output_tokens_per_s"] == pytest.approx(0.0, abs=1e-9)
    slow = fleet_reality.compared(run_of(piece(), slower=1.25))
    assert slow["error"]["ttft_s"] + slow["error"]["tpot_s"] == pytest.approx([-0.2] * 6)
    assert fleet_reality.within([found]) == "7 of 7 figures are within 10%; the largest error is 0%"
    assert len(fleet_reality.line(found)) == len(fleet_reality.HEADER)


def test_a_piece_has_the_wanted_rate_and_lengths_and_says_its_factors() -> None:
    found = piece(4.0)
    assert (len(found.arrivals), found.seconds) == (120, 30.0)
    assert found.arrivals[-1].at_s < 30.0
    assert sum(one.prompt for one in found.arrivals) / 120 == pytest.approx(60, rel=0.1)
    assert [word.split(" x")[0] for word in found.told] == [
        "prompts",
        "0.0% of the requests cut to 1024 tokens",
        "times",
    ]


def test_the_capacity_is_the_largest_rate_at_which_requests_are_in_time() -> None:
    point = fleet_reality.point_of(KNOWN, 8)
    trace = fleet_reality.scaled(TRACE, 1024, ASKED)
    limits = fleet_reality.limits_of(point, trace, ASKED)
    rate, kept = fleet_reality.capacity(point, trace, 30.0, limits)

    def late(rate: float) -> float:
        jobs = replay(point, fleet_reality.asked_of(fleet_reality.piece(trace, rate, 30.0).arrivals), Fcfs())
        return sum(job.ttft_s > limits.ttft_s or job.tpot_s > limits.tpot_s for job in jobs) / len(jobs)

    assert kept == limits
    assert late(rate) <= 1 - fleet_reality.IN_TIME < late(rate * 1.5)


def test_a_trace_gives_no_more_requests_than_it_has() -> None:
    found = fleet_reality.piece(TRACE, 100.0, 30.0)
    assert (len(found.arrivals), found.rate) == (1999, pytest.approx(100.0))


def test_a_node_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"write MODEL"):
        fleet_reality.place_of(":8", 0, tmp_path, tmp_path / "copy")


def test_percentiles_are_those_of_the_simulator() -> None:
    values = [float(i) for i in range(1, 101)]
    assert nodes.percentiles(values) == [50.0, 95.0, 99.0]
    assert nodes.percentiles([3.0]) == [3.0] * 3
