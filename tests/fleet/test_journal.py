"""State that outlives its writer: live replicas are adopted, others ended, and a process is more than its number."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from llmbuild.errors import InputError
from llmbuild.fleet.actuators.interface import KeysFile, SetClock, SetPartition, SetPower, Slot, Start, Stop, Switch
from llmbuild.fleet.actuators.journal import MARK, Entry, Journal, began_of, boot_of, runs
from llmbuild.fleet.actuators.local import Dry, Local, checked
from llmbuild.fleet.orchestrate import Setup, dry
from llmbuild.serve.api.keys import Keys
from llmbuild.spec.fleet import Fleet
from tests.support.fleets import fleet, node, point, profile, service

CORES = sorted(os.sched_getaffinity(0))
KIND = replace(node("core", 2), cores=((CORES[0],), (CORES[-1],)), machine=True, device="host/1")
MADE = fleet(service(), nodes=(KIND,))
PROFILES = (profile("host/1"),)
SLEEP = "import time; time.sleep(60)"


@pytest.fixture
def sleepers(tmp_path: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that are ended with the test."""
    found: list[subprocess.Popen[bytes]] = []
    yield found
    for one in found:
        one.kill()
        one.wait()


def sleeper(journal: Journal, name: str, into: list[subprocess.Popen[bytes]]) -> Entry:
    """Start a process that is marked as a replica, and return what would be written of it."""
    env = {**os.environ, MARK: journal.mark(name)}
    into.append(subprocess.Popen([sys.executable, "-c", SLEEP], env=env, start_new_session=True))
    pid = into[-1].pid
    os.sched_setaffinity(pid, {CORES[0]})
    began = began_of(pid)
    assert began is not None
    return Entry(name, "s", "v", 16, 0, "core-0", 0, pid, began, boot_of())


def ended(child: subprocess.Popen[bytes]) -> int:
    return child.wait(5)


def test_what_was_written_is_read_and_only_whole_files_are_there(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    assert journal.read() == ()
    entries = (Entry("a", "s", "v", 4, 0, "core-0", 0, 12, 34, "b"),)
    journal.write(entries)
    assert Journal(tmp_path).read() == entries
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_a_file_that_is_not_ours_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("[]")
    with pytest.raises(InputError, match="remove it"):
        Journal(tmp_path).read()
    (tmp_path / "state.json").write_text('{"version": 9, "replicas": []}')
    with pytest.raises(InputError, match="of version 9"):
        Journal(tmp_path).read()


def test_one_orchestrator_has_a_fleet_at_a_time(tmp_path: Path) -> None:
    with Journal(tmp_path).held(), pytest.raises(InputError, match="another orchestrator"), Journal(tmp_path).held():
        pass
    with Journal(tmp_path).held():
        pass


def test_a_replica_that_still_runs_is_adopted(tmp_path: Path, sleepers: list[subprocess.Popen[bytes]]) -> None:
    journal = Journal(tmp_path)
    journal.write([sleeper(journal, "a", sleepers)])
    backend = Local(MADE, tmp_path, journal, drain_s=0.1)
    assert backend.adopt(PROFILES) == [("a", f"adopted: pid {sleepers[0].pid} on core-0/0")]
    (live,) = backend.live()
    assert (live.name, live.state, live.key) == ("a", "starting", (0, point(MADE, PROFILES[0])))
    assert backend.start(Start(0, live.point, live.slot, "")).outcome == "unsupported"
    backend.close(time.sleep)
    assert ended(sleepers[0]) == -15
    assert journal.read() == ()


@pytest.mark.parametrize("change", [{"service": "other"}, {"variant": "w"}, {"node": "core-7"}, {"keys": "x"}])
def test_a_replica_that_the_fleet_has_no_place_for_is_ended(
    tmp_path: Path, sleepers: list[subprocess.Popen[bytes]], change: dict[str, str]
) -> None:
    journal = Journal(tmp_path)
    journal.write([replace(sleeper(journal, "a", sleepers), **change)])  # type: ignore[arg-type]
    backend = Local(MADE, tmp_path, journal)
    ((_, told),) = backend.adopt(PROFILES)
    assert told.startswith("ended: pid")
    assert ended(sleepers[0]) == -15
    assert (list(backend.live()), journal.read()) == ([], ())


def test_a_replica_on_cores_that_its_slot_has_no_more_is_ended(
    tmp_path: Path, sleepers: list[subprocess.Popen[bytes]]
) -> None:
    journal = Journal(tmp_path)
    journal.write([sleeper(journal, "a", sleepers)])
    made = replace(MADE, nodes=(replace(KIND, cores=((CORES[0], 4000), (4001,))),))
    ((_, told),) = Local(made, tmp_path, journal).adopt(PROFILES)
    assert told.startswith("ended: pid")
    assert ended(sleepers[0]) == -15


def test_a_process_that_was_started_and_not_written_down_is_ended(
    tmp_path: Path, sleepers: list[subprocess.Popen[bytes]]
) -> None:
    journal = Journal(tmp_path)
    sleeper(journal, "a", sleepers)
    sleeper(Journal(tmp_path / "other"), "b", sleepers)
    ((name, told),) = Local(MADE, tmp_path, journal).adopt(PROFILES)
    assert (name, "not written down" in told) == ("a", True)
    assert ended(sleepers[0]) == -15
    assert sleepers[1].poll() is None


def test_a_number_that_is_another_process_by_now_is_left_alone(
    tmp_path: Path, sleepers: list[subprocess.Popen[bytes]]
) -> None:
    journal = Journal(tmp_path)
    entry = sleeper(Journal(tmp_path / "other"), "b", sleepers)
    other = replace(entry, name="a", began=entry.began - 1)
    assert (runs(entry), runs(other), runs(replace(entry, boot="another"))) == (True, False, False)
    journal.write([other])
    assert Local(MADE, tmp_path, journal).adopt(PROFILES) == [("a", "has ended")]
    assert sleepers[0].poll() is None


def test_a_dry_run_finds_replicas_and_ends_none(tmp_path: Path, sleepers: list[subprocess.Popen[bytes]]) -> None:
    journal = Journal(tmp_path)
    entries = (sleeper(journal, "a", sleepers), replace(sleeper(journal, "b", sleepers), service="other", slot=1))
    journal.write(entries)
    backend = Dry(MADE, tmp_path, journal)
    assert [told.partition(":")[0] for _, told in backend.adopt(PROFILES, dry=True)] == ["adopted", "ended"]
    assert [one.state for one in backend.live()] == ["ready"]
    assert backend.stop(Stop("a", "")).outcome == "applied"
    assert [one.poll() for one in sleepers] == [None, None]
    assert journal.read() == entries


def test_what_ends_by_itself_is_dead_once_with_its_last_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    backend = Local(MADE, tmp_path / "no-catalog", journal)
    assert backend.start(Start(0, point(MADE, PROFILES[0]), Slot("core", "core-0", 0), "")).outcome == "applied"
    assert [one.service for one in journal.read()] == ["s"]
    until, found = time.monotonic() + 20, list(backend.live())
    while found[0].state != "dead" and time.monotonic() < until:
        time.sleep(0.05)
        found = list(backend.live())
    assert found[0].told.startswith("exit code 2: error: no catalog at"), found[0].told
    assert (list(backend.live()), journal.read()) == ([], ())


def test_a_replica_asks_for_the_keys_of_its_fleet_and_is_of_no_other(
    tmp_path: Path, sleepers: list[subprocess.Popen[bytes]]
) -> None:
    keys, journal = tmp_path / "keys", Journal(tmp_path)
    keys.write_text("a-key-of-16-signs\nanother-key-of-16\n")
    same = tmp_path / "same"
    same.write_text("# in another order\nanother-key-of-16\na-key-of-16-signs\n")
    backend = Local(MADE, tmp_path, journal, keys=KeysFile(keys, Keys.read(keys).digest))
    words = backend._words(Start(0, point(MADE, PROFILES[0]), Slot("core", "core-0", 0), ""))
    assert words[-2:] == ["--api-keys", str(keys)]
    journal.write([replace(sleeper(journal, "a", sleepers), keys=Keys.read(same).digest)])
    ((_, told),) = backend.adopt(PROFILES)
    assert told.startswith("adopted")
    backend.close(time.sleep, now=True)


def test_what_a_process_cannot_do_is_unsupported_with_its_reason(tmp_path: Path) -> None:
    backend = Local(MADE, tmp_path, Journal(tmp_path))
    found = [
        backend.switch(Switch("a", point(MADE, PROFILES[0]), "")),
        backend.set_clock(SetClock("core-0", 1000, "")),
        backend.set_power(SetPower("core-0", 10.0, "")),
        backend.set_partition(SetPartition("core-0", ("1g",), "")),
        backend.stop(Stop("none", "")),
    ]
    assert all(one.outcome == "unsupported" and one.reason for one in found)


def test_a_dry_run_says_what_would_start_and_why(tmp_path: Path) -> None:
    made = replace(MADE, nodes=(replace(KIND, count=1, cores=((CORES[0],),)),))
    lines: list[str] = []
    (one,) = dry(Setup(made, PROFILES, tmp_path, tmp_path / "state", "static-peak"), lines.append)
    assert isinstance(one.action, Start)
    assert (one.action.slot.name, one.answer.outcome, one.action.why) == (
        "core-0/0",
        "applied",
        "0 of 1 of v on core, batch 16 run",
    )
    assert any("planned once for the largest rate" in line for line in lines)
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (node("gpu"), "are not this machine"),
        (replace(KIND, cores=()), "has no cores"),
        (replace(KIND, cores=((CORES[0],), (4000,))), "core 4000 is not among those"),
        (replace(KIND, device="00000000/1"), "are not this machine"),
    ],
)
def test_a_fleet_that_is_not_this_machine_is_refused(kind: object, told: str) -> None:
    made: Fleet = replace(MADE, nodes=(kind,))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=told):
        checked(made)
