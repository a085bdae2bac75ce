"""`llmbuild orchestrate` as it is used: real servers of a tiny model on two cores, killed in the middle of requests."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from llmbuild.fleet.actuators.journal import Entry, Journal, began_of, runs
from tests.conftest import Project, llmbuild

CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
pytestmark = pytest.mark.skipif(len(CORES) < 2, reason="two nodes need two cores and Linux")
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


@dataclass
class Orchestrator:
    """A running command."""

    process: subprocess.Popen[str]
    journal: Journal
    url: str = ""
    lines: list[str] = field(default_factory=list)

    def entries(self, count: int = 2) -> list[Entry]:
        """Return what runs, once as many replicas are written down."""
        waited(lambda: len([one for one in self.journal.read() if runs(one)]) == count)
        return list(self.journal.read())

    def running(self, replicas: int) -> None:
        """Wait until so many replicas take requests."""
        with httpx.Client(base_url=self.url, timeout=5, trust_env=False) as client:
            waited(lambda: client.get("/v1/models").json()["data"][0]["replicas"] == replicas)

    def said(self, text: str) -> bool:
        """Return whether a line of its log has a text."""
        return any(text in line for line in self.lines)


def waited(true: Callable[[], bool], most_s: float = 20.0) -> None:
    until = time.monotonic() + most_s
    while not true():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    path = tmp_path / "two.yaml"
    path.write_text(FLEET.format(*CORES))
    return path


@contextlib.contextmanager
def orchestrated(fleet: Path, catalog: Path) -> Iterator[Orchestrator]:
    """Run a fleet on a free port until the block ends; whatever fails in it, no process is left."""
    state = fleet.parent / "state"
    words = [sys.executable, "-m", "llmbuild", "orchestrate", fleet, "-C", catalog, "--state", state, "--port", "0"]
    with subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        found = Orchestrator(process, Journal(state))
        reader = threading.Thread(target=lambda: found.lines.extend(process.stderr or ()))
        reader.start()
        try:
            found.url = process.stdout.readline().strip()
            assert found.url.startswith("http://127.0.0.1:"), found.lines
            found.running(2)
            yield found
        except BaseException:
            process.kill()
            for pid in found.journal.marked().values():
                os.kill(pid, signal.SIGKILL)
            raise
        finally:
            if process.poll() is None:
                process.terminate()
            process.wait(60)
            reader.join(60)


class Client(threading.Thread):
    """Asks again and again, and keeps how each request ended."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url, self.ends, self.over = url, list[str](), threading.Event()
        self.start()

    def run(self) -> None:
        with httpx.Client(base_url=self.url, timeout=30, trust_env=False) as client:
            while not self.over.is_set():
                self.ends.append(asked(client))


def asked(client: httpx.Client) -> str:
    """Return how a request ended: `done`, an error's code, or what it broke with."""
    body = {"model": "tiny", "prompt": "def push", "max_tokens": 20, "stream": True, "ignore_eos": True}
    try:
        answer = client.post("/v1/completions", json=body)
    except httpx.HTTPError as error:
        return repr(error)
    *events, last = answer.text.strip().split("\n\n")
    if answer.status_code != 200:
        return str(answer.json()["error"]["code"])
    if last == "data: [DONE]":
        ends = [json.loads(one[6:])["choices"][0]["finish_reason"] for one in events]
        return "done" if ends.count("length") == 1 and ends[-1] == "length" else f"ends: {ends}"
    return str(json.loads(last.removeprefix("data: "))["error"]["code"])


def cores_of(pid: int) -> set[int]:
    """Return the cores that the threads of a process may run on."""
    threads = [int(folder.name) for folder in Path(f"/proc/{pid}/task").iterdir()]
    return {core for thread in threads for core in os.sched_getaffinity(thread)}


def test_a_killed_replica_loses_no_request_in_silence_and_is_started_again(fleet: Path, built: Project) -> None:
    with orchestrated(fleet, built.catalog) as found:
        clients = [Client(found.url) for _ in range(6)]
        before = found.entries()
        waited(lambda: sum(len(one.ends) for one in clients) > 20)
        os.kill(before[0].pid, signal.SIGSTOP)  # requests come to it, and none of them is begun
        time.sleep(0.5)
        os.kill(before[0].pid, signal.SIGKILL)
        waited(lambda: before[0].name not in {one.name for one in found.journal.read()})
        found.entries()
        found.running(2)
        for one in clients:
            one.over.set()
        for one in clients:
            one.join(30)
        ends = [end for one in clients for end in one.ends]
        assert {*ends} <= {"done", "replica_lost"}, ends
        assert ends.count("replica_lost") <= 6
        assert found.said("retry id=")
        assert found.said(f"died     {before[0].name}: killed by signal 9")
        after = found.entries()
        assert {one.pid for one in after} - {one.pid for one in before}
        assert {one.node: cores_of(one.pid) for one in after} == {"core-0": {CORES[0]}, "core-1": {CORES[1]}}
        found.process.send_signal(signal.SIGINT)
        assert found.process.wait(30) == 0
    assert found.said("every answer was finished")
    assert [began_of(one.pid) for one in after] == [None, None]
    assert (found.journal.read(), found.journal.marked()) == ((), {})


def test_what_a_killed_orchestrator_leaves_is_adopted_and_ended_by_the_next(fleet: Path, built: Project) -> None:
    with orchestrated(fleet, built.catalog) as first:
        before = first.entries()
        first.process.kill()
        first.process.wait(10)
    assert all(runs(one) for one in before)
    done = llmbuild("orchestrate", fleet, "-n", "-C", built.catalog, "--state", fleet.parent / "state")
    assert (done.returncode, "nothing to do: what runs is what is wanted" in done.stdout) == (3, True), done.stderr
    assert all(runs(one) for one in before)
    with orchestrated(fleet, built.catalog) as second:
        assert {one.pid for one in second.entries()} == {one.pid for one in before}
        with httpx.Client(base_url=second.url, timeout=30, trust_env=False) as client:
            assert asked(client) == "done"
        other = llmbuild("orchestrate", fleet, "-C", built.catalog, "--state", fleet.parent / "state", "--port", "0")
        assert (other.returncode, "another orchestrator runs this fleet" in other.stderr) == (2, True)
    assert second.process.returncode == 0
    assert [began_of(one.pid) for one in before] == [None, None]
