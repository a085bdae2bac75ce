from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from time import monotonic, sleep
from types import SimpleNamespace
from typing import cast

import iree.runtime as rt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmbuild.build.remeasure import known_of, subject_of
from llmbuild.errors import InputError
from llmbuild.process.child import Limits
from llmbuild.profiler import statistics
from llmbuild.profiler.heldout import read_text
from llmbuild.profiler.live import Live
from llmbuild.profiler.noise import Shares, Snapshot, Watch, clock_khz, description, throttles, verdict
from llmbuild.profiler.protocol import Protocol
from llmbuild.profiler.protocol import Quality as Reference
from llmbuild.profiler.rounds import Rounds
from llmbuild.runtime import reader
from llmbuild.runtime.host import cores
from llmbuild.runtime.session import Session, Settings
from llmbuild.search.pairs import LOOKS
from llmbuild.spec.program import abi_from
from llmbuild.spec.recipe import Quality
from llmbuild.spec.workload import Workload
from tests.conftest import Project

positive = st.floats(1e-6, 1e3)


@given(st.lists(positive, min_size=1, max_size=30))
def test_a_median_lies_in_its_interval_and_the_interval_in_the_samples(samples: list[float]) -> None:
    r = statistics.median_of(samples)
    assert min(samples) <= r.low <= r.median <= r.high <= max(samples)
    assert r.samples == tuple(samples)


@given(st.lists(positive, min_size=1, max_size=20), st.floats(0.1, 10))
def test_a_paired_ratio_finds_a_constant_factor_exactly_whatever_the_drift(drift: list[float], factor: float) -> None:
    r = statistics.paired_ratio([x * factor for x in drift], drift)
    assert [r.low, r.median, r.high] == pytest.approx([factor] * 3)


def test_equal_samples_give_equal_intervals() -> None:
    assert statistics.median_of([1.0, 2.0, 4.0]) == statistics.median_of([1.0, 2.0, 4.0])


def test_no_samples_and_unpaired_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="no samples"):
        statistics.median_of([])
    with pytest.raises(ValueError, match="equal, positive length"):
        statistics.paired_ratio([1.0], [1.0, 2.0])


@given(st.lists(positive, min_size=1, max_size=600), st.floats(0.5, 0.999))
def test_a_percentile_is_absent_unless_its_samples_can_support_it(samples: list[float], share: float) -> None:
    found = statistics.percentile_of(samples, share)
    assert (found is None) == (len(samples) < statistics.least_samples(share))
    if found is not None:
        assert min(samples) <= found.low <= found.median <= found.high <= max(samples)


def test_the_99th_percentile_needs_as_many_samples_as_the_binomial_test_without_a_miss() -> None:
    assert [statistics.least_samples(p) for p in (0.9, 0.95, 0.99)] == [44, 90, 459]


def test_the_99th_percentile_of_a_thousand() -> None:
    found = statistics.percentile_of([float(i) for i in range(1, 1001)], 0.99)
    assert found is not None
    assert (found.median, found.low, found.high) == (990.0, 984.0, 997.0)


def test_a_baseline_that_moves_is_called_drift_and_one_that_does_not_is_not() -> None:
    assert statistics.drift([1.0, 1.01, 0.99, 1.0, 1.02, 1.2, 1.21, 1.19, 1.2, 1.22]) == pytest.approx(1.2)
    assert statistics.drift([1.0, 1.2, 0.9, 1.1, 1.0, 1.0, 1.1, 1.0, 0.9, 1.2]) is None
    assert statistics.drift([1.0, 1.0, 2.0, 2.0]) is None  # too few to say


@given(st.lists(positive, min_size=10, max_size=40))
def test_drift_backwards_is_the_inverse(samples: list[float]) -> None:
    forth, back = statistics.drift(samples), statistics.drift(samples[::-1])
    assert (forth is None) == (back is None)
    if forth is not None and back is not None:
        assert forth * back == pytest.approx(1.0)


def test_what_disturbed_the_rounds_is_told() -> None:
    assert description([Shares(0.0, 0.01), Shares(0.01, 0.02)]) == ""
    assert (
        description([Shares(0.1, 0.0), Shares(0.0, 0.5)])
        == "5% of CPU time was stolen, other processes took 25% of the CPUs"
    )
    hot = [Shares(0.0, 0.0, throttled=True), Shares(0.0, 0.0)]
    assert description(hot) == "the CPU was slowed down for its heat in 1 of 2 rounds"
    assert description([Shares(0.0, 0.0)], [3_000_000, 2_000_000]) == "the CPU clock moved between 2.00 and 3.00 GHz"
    assert description([Shares(0.0, 0.0)], [3_000_000, 2_900_000, 0]) == ""


def test_a_watch_counts_the_time_of_others_and_not_that_of_the_measured() -> None:
    spin = "import time\ninput()\nwhile time.process_time() < 0.6: pass\nprint(flush=True)\ninput()"
    with subprocess.Popen(
        [sys.executable, "-c", spin], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdin is not None and other.stdout is not None
        blind, knowing, begin = Watch([]), Watch([other.pid]), monotonic()
        print(file=other.stdin, flush=True)
        other.stdout.readline()
        apart = blind.shares().others - knowing.shares().others
        cpu_s = apart * (os.cpu_count() or 1) * (monotonic() - begin)
        other.communicate("\n")
    assert 0.4 < cpu_s < 0.8, "0.6 s, less what it took to start, however long they lasted"


def test_heat_and_clocks_are_read_where_the_system_tells_them(tmp_path: Path) -> None:
    for number, clock in enumerate((2_000_000, 3_000_000)):
        cpu = tmp_path / f"cpu{number}"
        (cpu / "thermal_throttle").mkdir(parents=True)
        (cpu / "cpufreq").mkdir()
        (cpu / "thermal_throttle" / "core_throttle_count").write_text("2\n")
        (cpu / "cpufreq" / "scaling_cur_freq").write_text(f"{clock}\n")
    assert (throttles(tmp_path), clock_khz(tmp_path)) == (4, 2_500_000)
    watch = Watch([], tmp_path)
    (tmp_path / "cpu1" / "thermal_throttle" / "core_throttle_count").write_text("3\n")
    assert watch.shares().throttled
    assert (throttles(tmp_path / "none"), clock_khz(tmp_path / "none")) == (0, 0)


def test_disturbed_rounds_are_left_out_only_where_enough_calm_ones_remain() -> None:
    rounds = Rounds(Workload("w", 1, 1, 2), Random(0), Protocol())
    live = cast(Live, object())
    rounds.taken[live] = {"tpot_s": [1.0, 9.0, 2.0, 3.0]}
    rounds.shares = [Shares(0.0, 0.0), Shares(0.5, 0.0), Shares(0.0, 0.0), Shares(0.0, 0.0), Shares(0.9, 0.0)]
    assert rounds.samples(live, 3) == {"tpot_s": [1.0, 2.0, 3.0]}
    assert rounds.samples(live, 4) == {"tpot_s": [1.0, 9.0, 2.0, 3.0]}


def test_a_race_asks_seven_times_at_most_and_each_time_after_twice_as_many_rounds() -> None:
    looks = Protocol().looks()
    assert (looks, len(looks)) == ([12, 24, 48, 96, 192, 384, 768], LOOKS)


def test_stolen_time_is_called_noise() -> None:
    assert "stolen" in verdict(Snapshot(0, 0), Snapshot(10, 100), 64)
    assert verdict(Snapshot(0, 0), Snapshot(1, 100), 64) == ""


def test_a_held_out_module_that_is_not_there_is_told() -> None:
    with pytest.raises(InputError, match="no module 'nonesuch'"):
        read_text(Quality(stdlib=("nonesuch",)))
    assert "def heappush" in read_text(Quality(stdlib=("heapq",)))


def test_texts_of_files_follow_one_another(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("one")
    (tmp_path / "b").write_text("two")
    assert read_text(Quality(files=(str(tmp_path / "b"), str(tmp_path / "a")))) == "two\none"
    with pytest.raises(InputError, match=r"quality text .*none: cannot be read"):
        read_text(Quality(files=(str(tmp_path / "a"), str(tmp_path / "none"))))


def test_a_device_with_memory_of_its_own_is_read_by_copies_and_says_the_same(
    built: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = next(r for r in reader.variants(built.catalog, everything=True) if r["default"])
    settings = Settings("local-sync", 1)
    files = [reader.blob_path(built.catalog, row[name]) for name in ("artifact", "parameters")]
    shared = greedy(Session(*files, abi_from(row["abi"]), settings))
    monkeypatch.setattr("llmbuild.runtime.session.shares_memory", lambda driver: False)
    assert greedy(Session(*files, abi_from(row["abi"]), settings)) == shared


def test_each_session_has_as_many_workers_as_it_asks_for(built: Project) -> None:
    """IREE keeps the workers of the first device of a process for all others, unless each has a driver of its own."""
    row = next(r for r in reader.variants(built.catalog, everything=True) if r["default"])
    files = [reader.blob_path(built.catalog, row[name]) for name in ("artifact", "parameters")]
    for count in (1, min(2, cores()), 1):
        before = workers()
        session = Session(*files, abi_from(row["abi"]), Settings("local-task", count))
        assert len(workers() - before) == count
        session.close()


def test_code_outlives_the_workers_that_may_still_hold_it(built: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Freeing it takes the interpreter's lock: closing would hang where a worker did so while its end is waited for."""
    row = next(r for r in reader.variants(built.catalog, everything=True) if r["default"])
    files = [reader.blob_path(built.catalog, row[name]) for name in ("artifact", "parameters")]
    before, left = workers(), list[set[str]]()
    wrap, freed = rt.VmModule.wrap_buffer, lambda: left.append(workers() - before)
    told = SimpleNamespace(wrap_buffer=lambda instance, pages, close_buffer: wrap(instance, pages, freed, close_buffer))
    monkeypatch.setattr(rt, "VmModule", told)
    session = Session(*files, abi_from(row["abi"]), Settings("local-task", 2))
    session.prefill([1, 2, 3])
    assert left == []
    session.close()
    assert left == [set()]


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_long_answer_arrives_whole_however_late_it_is_read(built: Project, unbuffered: str) -> None:
    """A device that IREE closed lets blocking writes end short, and unbuffered Python drops the rest of a print."""
    length = 200_000  # several times what a pipe holds
    code = "import sys\nfrom llmbuild.process.child import say\nfrom llmbuild.runtime import load\n" + (
        f"model = load(sys.argv[1])\nlist(model.tokens([1, 2], 4))\nmodel.session.close()\nsay('x' * {length})"
    )
    command = [sys.executable, "-c", code, str(built.catalog)]
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env) as child:
        sleep(2.5)
        assert child.stdout is not None
        assert len(child.stdout.read()) == length + 1


READING = """\
import os, sys
from llmbuild.runtime import load
def written(catalog):
    model = load(catalog)
    made = list(model.tokens([1, 2], 4))
    model.session.close()
    return made
expected = written(sys.argv[1])
if os.getuid() == 0:  # who may write everywhere; what an installation hides from others was imported above
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
assert not os.access(sys.argv[2], os.W_OK)
assert written(sys.argv[2]) == expected
"""


def test_a_catalog_that_its_user_may_only_read_is_loaded(built: Project) -> None:
    with TemporaryDirectory() as name:  # not pytest's folder, which is closed to other users
        copy = shutil.copytree(built.catalog, Path(name) / "catalog")
        subprocess.run(["chmod", "-R", "a+rX,a-w", name], check=True)
        done = subprocess.run([sys.executable, "-c", READING, built.catalog, copy], capture_output=True, text=True)
        subprocess.run(["chmod", "-R", "u+w", name], check=True)
    assert done.returncode == 0, done.stderr


def workers() -> set[str]:
    """Return the threads of IREE's executors in this process, less those that have just ended."""
    sleep(0.05)
    tasks = Path("/proc/self/task").iterdir()
    return {task.name for task in tasks if (task / "comm").read_text().startswith("iree-worker")}


def greedy(session: Session) -> tuple[list[int], bytes]:
    tokens = [session.prefill([1, 2, 3])]
    for position in range(3, 9):
        tokens.append(session.decode(tokens[-1], position))
    return tokens, session.logits().tobytes()


def test_a_load_that_compiles_first_is_told_apart(built: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    row = next(r for r in reader.variants(built.catalog, everything=True) if r["default"])
    monkeypatch.setattr("llmbuild.profiler.live.shares_memory", lambda driver: False)
    live = Live(subject_of(built.catalog, known_of(built.catalog, row)), Limits(seconds=60))
    try:
        live.prepare(Workload("short", 8, 8, 32), Reference(None, "none"), 0.0)
    finally:
        live.child.close()
    assert re.fullmatch(r"[0-9.e-]+ s where the driver compiles it first; .*", live.notes["load"])
    assert live.notes["operators"].startswith("absent: ")
    assert len(live.readings["load_s"].samples) == 3
