"""A whole fleet over stub servers: a killed replica, a killed orchestrator, signals, and nothing that is left."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import httpx
import pytest

from llmbuild.fleet.actuators.journal import began_of, runs
from tests.support.orchestrated import Client, Orchestrator, all_ends, asked, kill_amid, orchestrated, waited

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the local backend needs Linux")


def words(folder: Path, policy: str = "static-peak") -> list[object]:
    return [sys.executable, "-m", "tests.support.stub_fleet", folder, policy]


def nothing_left(found: Orchestrator, pids: list[int]) -> bool:
    gone = [began_of(pid) for pid in pids] == [None] * len(pids)
    return gone and found.journal.read() == () and found.journal.marked() == {}


def test_requests_of_a_killed_replica_end_once_and_it_is_started_again(tmp_path: Path) -> None:
    with orchestrated(words(tmp_path), tmp_path / "state") as found:
        before = found.entries()
        clients = [Client(found.url, "s") for _ in range(6)]
        kill_amid(found, before[0], clients)
        after = found.entries()
        found.serving(2)
        for one in after:  # all of them: requests wait for what starts in their place
            os.kill(one.pid, signal.SIGKILL)
        waited(lambda: not {one.pid for one in after} & {one.pid for one in found.journal.read()})
        found.serving(2)
        ends = all_ends(clients)
        assert {*ends} <= {"done", "replica_lost"}, {*ends}
        assert ends.count("replica_lost") <= 6 + 12  # each stops one stream of a client at most
        assert found.said("retry id=") and found.said(f"died     {before[0].name}: killed by signal 9")
        assert len({one.pid for one in after} - {one.pid for one in before}) == 1
        found.process.send_signal(signal.SIGINT)
        assert found.process.wait(10) == 0
    assert nothing_left(found, [one.pid for one in (*before, *after)])


def test_a_signal_lets_answers_end_and_a_second_one_does_not(tmp_path: Path) -> None:
    for signals, code, end in ((1, 0, "done"), (2, 130, "")):
        folder = tmp_path / str(signals)
        folder.mkdir()
        with orchestrated(words(folder), folder / "state") as found:
            pids = [one.pid for one in found.entries()]
            client = Client(found.url, "s", tokens=100)
            waited(lambda client=client: client.begun > len(client.ends) > 0)  # type: ignore[misc]
            client.over.set()  # some 2 s before the answer that has begun ends
            for _ in range(signals):
                found.process.send_signal(signal.SIGTERM)
                time.sleep(0.05)
            assert found.process.wait(10) == code
            client.join(10)
            assert not end or client.ends[-1] == end
        assert nothing_left(found, pids)


def test_what_a_killed_orchestrator_leaves_is_adopted_by_the_next(tmp_path: Path) -> None:
    with orchestrated(words(tmp_path), tmp_path / "state") as first:
        before = first.entries()
        first.process.kill()
        first.process.wait(10)
    assert all(runs(one) for one in before)
    with orchestrated(words(tmp_path), tmp_path / "state") as second:
        assert {one.pid for one in second.entries()} == {one.pid for one in before}
        assert not second.said("start ")
        with httpx.Client(base_url=second.url, timeout=30, trust_env=False) as client:
            assert asked(client, "s") == "done"
        os.kill(before[0].pid, signal.SIGKILL)  # one that it did not start itself
        waited(lambda: before[0].pid not in {one.pid for one in second.entries()})
        second.serving(2)
    assert second.process.returncode == 0
    assert nothing_left(second, [one.pid for one in before])
