from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmbuild.errors import InputError
from llmbuild.profiler import noise
from llmbuild.profiler.meters import energy, estimate, nvml, rapl
from llmbuild.profiler.meters.meter import (
    KEEP_S,
    RANK_STEPS,
    SCREEN_STEPS,
    Absent,
    Counter,
    Energy,
    Meter,
    Window,
    window_s,
    with_measured_step,
)
from llmbuild.runtime import reader
from tests.conftest import Project, llmbuild
from tests.support.meters import FakeNvml, NVMLError_LibraryNotFound, NVMLError_NoPermission, World, Zones

KINDS = ("nvml_counter", "nvml_polled", "nvml_polled (mean)", "rapl", "rapl that starts over", "model")
STEP_OF_POLLS_S = 0.005


def make(kind: str, world: World, root: Path) -> Meter:
    if kind == "nvml_counter":
        found = nvml.find_counter(FakeNvml(world), world.clock)
    elif kind.startswith("nvml_polled"):
        found = nvml.find_polled(FakeNvml(world, instant=kind == "nvml_polled"), world.clock, threaded=False)
    elif kind.startswith("rapl"):
        over = {"range_uj": 1_200_000_000, "start_uj": 1_199_000_000} if "starts over" in kind else {}
        Zones(world, root, packages=2, **over)
        found = rapl.find(root, world.clock, in_vm=False)
    else:
        found = estimate.LinearModel(50.0, 150.0, 2, lambda: world.joules / 100, world.clock)
    assert not isinstance(found, Absent), found
    return found


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def metered(meter: Meter, world: World, seconds: float) -> Energy:
    window = meter.window()
    world.run(seconds, window.keep)
    found = window.close()
    assert isinstance(found, Energy), found
    return found


# --- the contract of every meter ---------------------------------------------------------------------------------


def test_a_constant_load_is_metered_within_two_updates(kind: str, tmp_path: Path) -> None:
    world = World()
    found = metered(make(kind, world, tmp_path), world, 6.0)
    assert found.joules == pytest.approx(600.0, abs=100 * 2 * 0.1)
    assert found.seconds == pytest.approx(6.0, abs=0.01)


def test_twice_the_load_is_twice_the_joules_above_idle(kind: str, tmp_path: Path) -> None:
    world = World(lambda now: 100.0 if now < 10 else 200.0)
    meter = make(kind, world, tmp_path)
    low, high = metered(meter, world, 10.0), metered(meter, world, 10.0)
    idle = 50.0 if kind == "model" else 0.0  # a model has its own idle power
    assert (high.watts - idle) / (low.watts - idle) == pytest.approx(2.0, rel=0.03)


def test_two_windows_in_a_row_add_up_to_one_over_both(kind: str, tmp_path: Path) -> None:
    world = World(lambda now: 100.0 + 50.0 * math.sin(now))
    meter = make(kind, world, tmp_path)
    whole = meter.window()
    parts = []
    for _ in range(2):
        part = meter.window()

        def keep(part: Window = part) -> None:
            part.keep()
            whole.keep()

        world.run(4.0, keep)
        parts.append(part.close())
    both = whole.close()
    assert isinstance(both, Energy)
    assert sum(p.joules for p in parts if isinstance(p, Energy)) == pytest.approx(both.joules, rel=0.01)


def test_a_meter_says_of_what_it_is(kind: str, tmp_path: Path) -> None:
    meter = make(kind, World(), tmp_path)
    assert meter.source == {"rapl that starts over": "rapl", "nvml_polled (mean)": "nvml_polled"}.get(kind, kind)
    assert meter.boundary == ("gpu" if kind.startswith("nvml") else "package")
    assert 0 < meter.step_s <= 1
    assert window_s(meter, SCREEN_STEPS) <= window_s(meter, RANK_STEPS)


def test_a_window_that_meters_nothing_is_no_window_of_zero_joules_but_its_own_seconds(
    kind: str, tmp_path: Path
) -> None:
    found = make(kind, World(), tmp_path).window().close()
    if isinstance(found, Energy):
        assert (found.joules, found.seconds) == (0.0, 0.0)
    else:
        assert "only 2 power readings" in found.reason


# --- NVML --------------------------------------------------------------------------------------------------------


def test_the_counters_step_is_found_by_looking() -> None:
    world = World()
    counter = nvml.find_counter(FakeNvml(world, step_s=0.05), world.clock)
    assert isinstance(counter, Counter)
    assert with_measured_step(counter, lambda s: world.run(s, step=0.001)).step_s == pytest.approx(0.05, abs=0.002)


def test_a_window_shorter_than_a_step_is_off_by_one_step_at_most() -> None:
    world = World()
    counter = nvml.find_counter(FakeNvml(world), world.clock)
    assert isinstance(counter, Counter)
    for _ in range(20):
        assert abs(metered(counter, world, 0.035).joules - 3.5) <= 100 * 0.1


def test_a_lost_device_is_told_and_is_not_zero_joules() -> None:
    world = World()
    fake = FakeNvml(world, lost_at_s=2.0)
    meters = (nvml.find_counter(fake, world.clock), nvml.find_polled(fake, world.clock, threaded=False))
    windows = [meter.window() for meter in meters if not isinstance(meter, Absent)]
    world.run(3.0, windows[1].keep)
    lost = [window.close() for window in windows]
    assert [isinstance(x, Absent) and x.reason.endswith("GPU is lost") for x in lost] == [True, True]


def test_a_counter_that_was_reset_within_a_window_is_lost() -> None:
    world = World()
    meter = nvml.find_counter(FakeNvml(world, reset_at_s=1.0), world.clock)
    assert isinstance(meter, Counter)
    window = meter.window()
    world.run(2.0)
    assert window.close() == Absent("nvml_counter", "the counter was reset within the window")


@pytest.mark.parametrize(
    ("fake", "told"),
    [
        ({"raises": {"nvmlInit": NVMLError_LibraryNotFound()}}, "NVML Shared Library Not Found"),
        ({"gpus": 0}, "NVML sees no GPU"),
        ({"mig": 1}, "MIG is on"),
        ({"raises": {"nvmlDeviceGetTotalEnergyConsumption": NVMLError_NoPermission()}}, "Insufficient Permissions"),
    ],
)
def test_a_board_that_cannot_be_metered_says_why(fake: dict, told: str) -> None:
    found = nvml.find_counter(FakeNvml(World(), **fake), World().clock)
    assert isinstance(found, Absent) and told in found.reason


def test_a_board_with_mig_off_is_metered() -> None:
    assert isinstance(nvml.find_counter(FakeNvml(World(), mig=0)), Counter)


def test_a_process_on_a_mig_instance_has_no_meter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-41b3")
    found = nvml.find_counter(FakeNvml(World()))
    assert isinstance(found, Absent) and "MIG instance" in found.reason


def test_power_without_permission_says_so() -> None:
    denied = {"nvmlDeviceGetPowerUsage": NVMLError_NoPermission(), "nvmlDeviceGetFieldValues": NVMLError_NoPermission()}
    found = nvml.find_polled(FakeNvml(World(), raises=denied))
    assert isinstance(found, Absent) and "Insufficient Permissions" in found.reason


def test_power_that_is_a_mean_of_a_second_needs_ten_times_the_window() -> None:
    instant, mean = (nvml.find_polled(FakeNvml(World(), instant=told)) for told in (True, False))
    assert not isinstance(instant, Absent) and not isinstance(mean, Absent)
    assert (instant.step_s, mean.step_s) == (0.1, 1.0)


def test_polling_in_a_thread_reads_real_time() -> None:
    meter = nvml.find_polled(FakeNvml(World()))
    assert not isinstance(meter, Absent)
    window = meter.window()
    end = meter.clock() + 0.4
    while meter.clock() < end:
        window.keep()
    found = window.close()
    assert isinstance(found, Energy)
    assert found.watts == pytest.approx(100.0)


def test_a_throttled_board_is_told_with_its_clocks() -> None:
    counter = nvml.find_counter(FakeNvml(World(), reasons=4 | 64))
    assert isinstance(counter, Counter)
    assert counter.conditions() == {
        "sm_clock_mhz": 1980.0,
        "temperature_c": 41.0,
        "memory_clock_mhz": 2619.0,
        "memory_used_bytes": float(3 << 30),
        "power_w": 100.0,
        "power_limit_w": 700.0,
        "throttled": "software power cap, hardware thermal slowdown",
    }


def test_a_board_that_heats_up_is_told_as_it_is_at_the_end_of_each_window() -> None:
    world = World()
    heat = FakeNvml(world)
    heat.sm_clock_mhz, heat.temperature_c = lambda now: 1980 if now < 2.5 else 1410, lambda now: 40 + round(now)
    counter = nvml.find_counter(heat, world.clock)
    assert isinstance(counter, Counter)
    told = []
    for _ in range(2):
        metered(counter, world, 2.0)
        told.append((counter.conditions()["sm_clock_mhz"], counter.conditions()["temperature_c"]))
    assert told == [(1980.0, 42.0), (1410.0, 44.0)]


def test_what_a_board_does_not_tell_is_left_out_of_its_conditions() -> None:
    silent = {"nvmlDeviceGetClockInfo": NVMLError_NoPermission(), "nvmlDeviceGetMemoryInfo": NVMLError_NoPermission()}
    counter = nvml.find_counter(FakeNvml(World(), raises=silent))
    assert isinstance(counter, Counter)
    assert set(counter.conditions()) == {"temperature_c", "power_w", "power_limit_w"}


def test_counter_and_polled_power_agree_on_a_load_that_both_see() -> None:
    world = World(lambda now: 300.0 if now % 0.5 < 0.25 else 100.0)
    fake = FakeNvml(world)
    counter, polled = nvml.find_counter(fake, world.clock), nvml.find_polled(fake, world.clock, threaded=False)
    assert not isinstance(counter, Absent) and not isinstance(polled, Absent)
    found = energy.compare(counter, polled, lambda keep: world.run(10.0, keep))
    assert not isinstance(found, Absent)
    assert found.ratio == pytest.approx(1.0, abs=0.02)


def test_polled_power_that_misses_the_bursts_is_found_out_by_the_counter() -> None:
    world = World(lambda now: 400.0 if now % 0.1 < 0.05 else 100.0)
    fake = FakeNvml(world)
    counter, polled = nvml.find_counter(fake, world.clock), nvml.find_polled(fake, world.clock, threaded=False)
    assert not isinstance(counter, Absent) and not isinstance(polled, Absent)

    def sampled_in_step_with_the_load(keep: Callable[[], None]) -> None:
        for _ in range(100):
            world.run(0.1)
            keep()

    found = energy.compare(counter, polled, sampled_in_step_with_the_load)
    assert not isinstance(found, Absent)
    assert abs(found.ratio - 1) > 0.3


# --- RAPL --------------------------------------------------------------------------------------------------------


@given(st.integers(1_000, 10_000), st.lists(st.integers(0, 999), min_size=1, max_size=30), st.integers(0, 9_999))
def test_a_counter_that_starts_over_adds_up_whatever_its_range(span: int, steps: list[int], start: int) -> None:
    world, units = World(), [start % span]

    def read() -> tuple[int, ...]:
        return (units[0] % span,)

    window = Counter("rapl", "package", 0.001, 1.0, (span,), read, world.clock).window()
    for step in steps:  # less than one range between two reads, as KEEP_S sees to
        units[0] += step
        world.now += KEEP_S
        window.keep()
    found = window.close()
    assert isinstance(found, Energy)
    assert found.joules == sum(steps)


def zone(root: Path, folder: str, name: str, joules: float = 260.0) -> None:
    made = root / folder
    made.mkdir(parents=True)
    for file, text in (("name", name), ("energy_uj", f"{joules * 1e6:.0f}"), ("max_energy_range_uj", "1000000000000")):
        (made / file).write_text(f"{text}\n")


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("intel-rapl:0:0", "core"),
        ("intel-rapl:0:1", "uncore"),
        ("intel-rapl:0:2", "dram"),
        ("intel-rapl:2", "psys"),
        ("intel-rapl:3", "board"),
        ("intel-rapl-mmio:0", "package-0"),
        ("intel-rapl-mmio:0:0", "dram"),
    ],
)
def test_packages_alone_are_counted_and_once(tmp_path: Path, folder: str, name: str) -> None:
    world = World()
    zone(tmp_path, folder, name)
    Zones(world, tmp_path, packages=2)
    world.moved.append(lambda: (tmp_path / folder / "energy_uj").write_text(f"{2e6 * world.joules:.0f}\n") and None)
    meter = rapl.find(tmp_path, world.clock, in_vm=False)
    assert isinstance(meter, Counter)
    assert metered(meter, world, 1.0).joules == pytest.approx(100.0)
    assert meter.conditions()["zones"] == "package-0 package-1"


@pytest.mark.parametrize(("folder", "told"), [("intel-rapl:0:2", "a zone of its own"), ("intel-rapl:2", "no zone")])
def test_a_package_says_that_memory_is_not_inside(tmp_path: Path, folder: str, told: str) -> None:
    Zones(World(), tmp_path)
    zone(tmp_path, folder, "dram" if folder.count(":") == 2 else "psys")
    meter = rapl.find(tmp_path, in_vm=False)
    assert isinstance(meter, Counter)
    memory = str(meter.conditions()["memory"])
    assert memory.startswith("without DRAM") and told in memory


@pytest.mark.parametrize("name", ["psys", "board", "dram"])
def test_a_top_level_zone_of_another_name_is_no_package(tmp_path: Path, name: str) -> None:
    zone(tmp_path, "intel-rapl:0", name)
    found = rapl.find(tmp_path, in_vm=False)
    assert isinstance(found, Absent) and f"has only {name}" in found.reason


def test_dies_of_a_package_are_counted_each(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0-die-0")
    zone(tmp_path, "intel-rapl:1", "package-0-die-1")
    meter = rapl.find(tmp_path, in_vm=False)
    assert isinstance(meter, Counter) and len(meter.ranges) == 2


def test_a_range_that_is_not_told_is_no_meter(tmp_path: Path) -> None:
    Zones(World(), tmp_path)
    (tmp_path / "intel-rapl:0" / "max_energy_range_uj").unlink()
    found = rapl.find(tmp_path, in_vm=False)
    assert isinstance(found, Absent) and "range is unknown" in found.reason


def test_without_a_counter_energy_is_absent_with_its_reason(tmp_path: Path) -> None:
    found = rapl.find(tmp_path)
    assert isinstance(found, Absent) and "no RAPL package" in found.reason


def test_a_counter_that_must_not_be_read_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Zones(World(), tmp_path)
    monkeypatch.setattr("os.access", lambda *_: False)  # root may read everything
    found = rapl.find(tmp_path, in_vm=False)
    assert isinstance(found, Absent) and "run as root or change its mode" in found.reason


def test_a_counter_that_vanishes_is_lost(tmp_path: Path) -> None:
    zones = Zones(World(), tmp_path)
    meter = rapl.find(tmp_path, in_vm=False)
    assert isinstance(meter, Counter)
    window = meter.window()
    zones.counters[0].unlink()
    lost = window.close()
    assert isinstance(lost, Absent) and "cannot be read any more" in lost.reason


def test_a_counter_in_a_virtual_machine_is_called_attributed(tmp_path: Path) -> None:
    Zones(World(), tmp_path)
    meter = rapl.find(tmp_path, in_vm=True)
    assert isinstance(meter, Counter) and meter.source == "rapl_vm"


# --- the estimate, and who gets which meter ----------------------------------------------------------------------


@pytest.mark.parametrize("text", ["20", "65:20", "20:20", "a:b", "-1:5"])
def test_a_power_model_that_cannot_be_read_is_told(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(estimate.VARIABLE, text)
    with pytest.raises(InputError, match="IDLE_WATTS:FULL_LOAD_WATTS"):
        estimate.find()


def test_an_estimate_counts_the_cpus_whose_time_it_counts_whatever_this_process_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu  0 0 0 0 0 0 0 0\n" + "".join(f"cpu{n} 0 0 0 0 0 0 0 0\n" for n in range(8)) + "intr 1\n")
    assert noise.cpus(stat) == 8
    monkeypatch.setenv(estimate.VARIABLE, "20:65")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    assert estimate.find().cpus == noise.cpus()


@given(st.floats(0, 64), st.floats(0.1, 10))
def test_an_estimate_is_between_idle_and_full_load(busy: float, seconds: float) -> None:
    world, taken = World(), [0.0]
    window = estimate.LinearModel(20.0, 65.0, 8, lambda: taken[0], world.clock).window()
    world.now, taken[0] = seconds, busy
    found = window.close()
    assert isinstance(found, Energy)
    assert 20.0 - 1e-9 <= found.watts <= 65.0 + 1e-9


def test_an_estimate_is_made_only_when_asked_for_and_says_that_it_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rapl, "find", lambda: Absent("rapl", "no energy counter"))
    monkeypatch.delenv(estimate.VARIABLE, raising=False)
    assert energy.find("local-task") == energy.Found(None, (Absent("rapl", "no energy counter"),))
    monkeypatch.setenv(estimate.VARIABLE, "20:65")
    found = energy.find("local-task")
    assert found.meter is not None and found.meter.source == "model"
    assert "not measured" in str(found.meter.conditions()["model"])
    assert found.reason == "no energy counter"


def test_a_gpu_is_metered_by_its_board_and_never_by_the_cpus_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "find_counter", lambda: Absent("nvml_counter", "too old"))
    monkeypatch.setattr(nvml, "find_polled", lambda: nvml.Polled(0.1, lambda: 1.0, World().clock, False, dict))
    monkeypatch.setenv(estimate.VARIABLE, "20:65")
    found = energy.find("cuda")
    assert found.meter is not None and (found.meter.source, found.reason) == ("nvml_polled", "too old")


def test_a_target_is_metered_by_its_own_meters_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "find_counter", lambda: Absent("nvml_counter", "too old"))
    monkeypatch.setattr(nvml, "find_polled", lambda: Absent("nvml_polled", "no permission"))
    assert energy.find("cuda", meters=("nvml_polled",)).reason == "no permission"
    assert energy.find("hip", meters=()).reason == "no meter reads what this runs on"


# --- on the command line -----------------------------------------------------------------------------------------


def test_an_estimate_is_shown_as_one_and_meets_no_bound(built: Project, tmp_path: Path) -> None:
    if energy.find("local-task").meter is not None:
        pytest.skip("this machine has a meter, so nothing is estimated")
    catalog = tmp_path / "catalog"
    shutil.copytree(built.catalog, catalog)
    rows = reader.variants(catalog, "tiny")
    chosen = next(row["variant"] for row in rows if not row["default"])
    done = llmbuild("profile", chosen[:12], "-C", catalog, "--json", **{estimate.VARIABLE: "20:65"})
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)
    assert (row["energy_source"], row["energy"]["boundary"]) == ("model", "package")
    assert row["notes"]["energy"] == "estimate (linear model, idle 20 W, full load 65 W, ±50 %), not measured"
    assert 0 < row["energy_j_per_token"] <= 65 * row["e2e_s"]
    refused = llmbuild("pick", "-C", catalog, "--slo", "energy_j_per_token<=1e6")
    assert refused.returncode == 3
    assert "only estimated" in refused.stderr + refused.stdout


def test_a_power_model_that_cannot_be_read_ends_a_profile_with_bad_input(built: Project) -> None:
    rows = reader.variants(built.catalog, "tiny")
    done = llmbuild("profile", rows[0]["variant"][:12], "-C", built.catalog, **{estimate.VARIABLE: "much"})
    assert (done.returncode, "IDLE_WATTS:FULL_LOAD_WATTS" in done.stderr) == (2, True)


def test_doctor_tells_the_meters_and_why_others_are_not_there(tmp_path: Path) -> None:
    done = llmbuild("doctor", "-C", tmp_path / "none", "--json")
    found = {row["check"]: row for row in json.loads(done.stdout)}
    for check, source in (("energy of the CPU", "rapl"), ("energy of the GPU", "nvml_counter")):
        row = found[check]
        assert row["found"].startswith(source) or f"{source}: " in row["todo"]
