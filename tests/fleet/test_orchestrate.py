"""`llmbuild orchestrate` as it is used: real servers of a tiny model on two cores, killed in the middle of requests."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import httpx
import pytest

from llmbuild.fleet.actuators.journal import began_of, runs
from tests.conftest import Project, llmbuild
from tests.support import marked
from tests.support.orchestrated import Client, all_ends, asked, kill_amid, orchestrated

CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
pytestmark = pytest.mark.skipif(len(CORES) < 2, reason="two nodes need two cores and Linux")
SCRIPT = Path(sys.executable).with_name("llmbuild")
FLEET = """\
name: two
nodes:
  - class: core
    machine: host
    count: 2
    cores: [[{0}], [{1}]]
    memory: 400MB
    watts: {{bare: 1, parked: 1, active: 7, basis: estimated, source: made up}}
services:
  - model: tiny
    rate: 1000000
    classes:
      - {{name: only, prompt: 8, output: 8, slo: [ttft_s<=5]}}
policy: static-peak
period: 1s
"""


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    path = tmp_path / "two.yaml"
    path.write_text(FLEET.format(*CORES))
    return path


def words(fleet: Path, catalog: Path) -> list[object]:
    state = fleet.parent / "state"
    return [SCRIPT, "orchestrate", fleet, "-C", catalog, "--state", state, "--port", "0"]


def cores_of(pid: int) -> set[int]:
    """Return the cores that the threads of a process may run on."""
    threads = [int(folder.name) for folder in Path(f"/proc/{pid}/task").iterdir()]
    return {core for thread in threads for core in os.sched_getaffinity(thread)}


def test_a_killed_server_loses_no_request_in_silence_and_the_next_orchestrator_takes_over(
    fleet: Path, built: Project
) -> None:
    log = fleet.parent / "log"
    here = marked.fill(fleet.parent / "here", log)  # replicas import nothing of it
    with orchestrated(words(fleet, built.catalog), fleet.parent / "state", cwd=here) as first:
        assert first.said("warning: tiny/only: no place for")
        before = first.entries()
        clients = [Client(first.url, "tiny") for _ in range(6)]
        kill_amid(first, before[0], clients)
        after = first.entries()
        first.serving(2)
        ends = all_ends(clients)
        assert {*ends} <= {"done", "replica_lost"}, ends
        assert ends.count("replica_lost") <= 6
        assert {one.node: cores_of(one.pid) for one in after} == {"core-0": {CORES[0]}, "core-1": {CORES[1]}}
        assert not log.exists()
        first.process.kill()
        first.process.wait(10)
    assert all(runs(one) for one in after)
    dry = llmbuild("orchestrate", fleet, "-n", "-C", built.catalog, "--state", fleet.parent / "state")
    assert (dry.returncode, "nothing to do: what runs is what is wanted" in dry.stdout) == (3, True), dry.stderr
    with orchestrated(words(fleet, built.catalog), fleet.parent / "state") as second:
        assert {one.pid for one in second.entries()} == {one.pid for one in after}
        with httpx.Client(base_url=second.url, timeout=30, trust_env=False) as client:
            assert asked(client, "tiny") == "done"
        other = llmbuild(*map(str, words(fleet, built.catalog)[1:]))
        assert (other.returncode, "another orchestrator runs this fleet" in other.stderr) == (2, True), other.stderr
        second.process.send_signal(signal.SIGINT)
        assert second.process.wait(30) == 0
    assert second.said("every answer was finished")
    assert [began_of(one.pid) for one in after] == [None, None]
    assert (second.journal.read(), second.journal.marked()) == ((), {})
