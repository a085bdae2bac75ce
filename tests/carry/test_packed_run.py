"""What the run of a packed folder decides without a device: who gets how much time, and what its tables say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llmbuild.carry import pack, packed, peers
from llmbuild.carry.packed import RACERS, Run
from llmbuild.carry.peers import Peer, Versus, versus
from llmbuild.carry.table import Across, Line, Tables, as_json, text
from llmbuild.catalog.store import BlobStore
from llmbuild.errors import InputError
from llmbuild.profiler.board_operators import read_kernels, read_profile
from llmbuild.profiler.meters import nvml
from llmbuild.profiler.meters.energy import Found
from llmbuild.profiler.protocol import Protocol
from llmbuild.profiler.statistics import median_of
from llmbuild.profiler.worker import Worker
from llmbuild.runtime import host
from llmbuild.spec.measurement import Measurement, Operator, Reading
from llmbuild.spec.workload import Workload
from tests.support.meters import FakeNvml, World

LOAD = Workload("chat", 128, 64, 1664, 8)


# --- time ----------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(packed, "monotonic", clock)
    return clock


def folder_of(folder: Path, *jobs: tuple[str, str], driver: str = "cuda") -> Path:
    subject = {"variant": "v", "driver": driver}
    bodies = [{"model": m, "target": t, "shape": {}, "subjects": [{"subject": subject}]} for m, t in jobs]
    (folder / "job.json").write_text(json.dumps({"version": 1, "jobs": bodies}))
    return folder


MATRIX = [(model, target) for model in ("small", "large") for target in ("h200", "sm80", "sm89")]


def shares(run: Run, clock: Clock, monkeypatch: pytest.MonkeyPatch, taken: float) -> list[tuple[str, str, float]]:
    """Return who was run for how many seconds, when each uses the part `taken` of what it is given."""
    seen = []

    def job(body: dict[str, Any], end: float) -> list[Line]:
        seen.append((body["model"], body["target"], end - clock.now))
        clock.now += taken * (end - clock.now)
        return []

    monkeypatch.setattr(run, "_job", job)
    run.all()
    return seen


def test_time_is_shared_by_model_and_the_first_target_has_twice_as_much(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(folder_of(tmp_path, *MATRIX), 500.0, lambda _: None)
    seen = shares(run, clock, monkeypatch, 1.0)
    assert [(model, target) for model, target, _ in seen] == MATRIX
    # of 250 s, 100 s are left for the targets in the same rounds and for PyTorch; who does not need them passes them on
    expected = [75.0, 37.5, 37.5, *(350 * 0.6 * part for part in (0.5, 0.25, 0.25))]
    assert [s for _, _, s in seen] == pytest.approx(expected)


def test_time_that_is_not_used_goes_to_who_comes_later(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(folder_of(tmp_path, *MATRIX), 500.0, lambda _: None)
    seen = shares(run, clock, monkeypatch, 0.0)
    assert [s for _, _, s in seen] == pytest.approx([75.0, 75.0, 150.0, 150.0, 150.0, 300.0])


def test_one_target_on_a_cpu_has_all_the_time(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(folder_of(tmp_path, ("small", "host"), driver="local-task"), 100.0, lambda _: None)
    assert [s for _, _, s in shares(run, clock, monkeypatch, 1.0)] == [100.0]


def test_models_are_chosen_by_name(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path, *MATRIX)
    run = Run(folder, 500.0, lambda _: None, ["large"])
    assert [(model, target) for model, target, _ in shares(run, clock, monkeypatch, 1.0)] == MATRIX[3:]
    with pytest.raises(InputError, match="the folder holds no medium; it holds small, large"):
        Run(folder, 500.0, lambda _: None, ["medium"])


@pytest.mark.parametrize("race_s", [0.0, 20.0, 60.0, 200.0])
def test_a_race_and_its_energy_windows_end_within_their_time(race_s: float) -> None:
    plain = vars(Protocol())
    got = packed._within({"protocol": plain}, race_s, RACERS, 100.0)["protocol"]
    windows = RACERS * packed.WINDOWS_S  # each has one whatever happens
    assert got["race_seconds"] <= max(race_s - windows, race_s / 3)
    assert got["race_seconds"] + windows + got["race_energy_seconds"] <= max(race_s, race_s / 3 + windows)
    assert got["energy_windows"] == plain["energy_windows"]
    assert packed._within({"protocol": plain}, race_s, RACERS, 5.0)["protocol"]["energy_windows"] == 1


# --- PyTorch ---------------------------------------------------------------------------------------------------------

SCRIPT = """
import json, sys
assert sys.argv[4:] == ["--batch", "8", "--turns"], sys.argv
for mode in ("eager", "compiled"):
    print(json.dumps({{"runtime": mode, "batch": 8, **({reason} if mode == "compiled" else {{}})}}), flush=True)
print(json.dumps({{"ready": 2}}), flush=True)
for turn, line in enumerate(sys.stdin):
    number, seconds = line.split()
    if turn >= {turns}:
        sys.exit("CUDA out of memory")
    tpot = 0.004 if number == "0" else 0.001
    print(json.dumps({{"ttft_s": 0.02, "tpot_s": tpot, "answers": 3, "tokens": 3 * 64 * 8}}), flush=True)
"""


class Ours:
    """A variant that answers in two milliseconds a token."""

    def visit(self, workload: Workload, seconds: float) -> tuple[dict[str, float], tuple[float, ...]]:
        return {"tpot_s": 0.002, "ttft_s": 0.01}, ()


def raced(folder: Path, reason: str = "{}", turns: int = 1000, end: float = math.inf) -> list[Versus]:
    (folder / "peer.py").write_text(SCRIPT.format(reason=reason, turns=turns))
    peer = Peer(folder / "peer.py", folder / "shape.json", LOAD)
    try:
        ours: Any = Ours()
        return versus(peer, ours, Versus("m", LOAD, "PyTorch", "v", "f16"), min(end, peers.monotonic() + 60))
    finally:
        peer.close()


def test_pytorch_answers_in_turns_with_us_and_each_mode_is_held_against_us(tmp_path: Path) -> None:
    eager, compiled = raced(tmp_path)
    assert (eager.runtime, compiled.runtime) == ("eager", "compiled")
    assert eager.ratios is not None and compiled.ratios is not None
    assert (eager.ratios["tpot_s"].median, compiled.ratios["tpot_s"].median) == pytest.approx((0.5, 2.0))
    assert len(eager.ratios["ttft_s"].samples) == peers.MOST_ROUNDS
    rows = text(Tables(host.machine(), [], versus=[eager, compiled])).splitlines()
    assert rows[2] == "in turns with PyTorch (below 1: llmbuild is faster):"
    assert "0.5 [0.5, 0.5] wins" in rows[4] and "2 [2, 2] loses" in rows[5]


def test_a_mode_that_cannot_is_told_and_the_other_is_timed(tmp_path: Path) -> None:
    eager, compiled = raced(tmp_path, reason='{"reason": "no Triton"}')
    assert (bool(eager.ratios), compiled.ratios, compiled.reason) == (True, None, "no Triton")


def test_pytorch_that_dies_has_no_readings_but_its_last_words(tmp_path: Path) -> None:
    found = raced(tmp_path, turns=3)
    assert [(v.ratios, v.reason) for v in found] == [(None, "CUDA out of memory")] * 2


def test_pytorch_that_is_not_ready_in_time_is_told(tmp_path: Path) -> None:
    (found,) = raced(tmp_path, end=0.0)
    assert (found.ratios, found.reason) == (None, "the time was up")


def test_joules_of_pytorch_are_of_the_board_over_whole_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(lambda _: 400.0)
    counter = nvml.find_counter(FakeNvml(world), world.clock)
    monkeypatch.setattr(peers.energy, "find", lambda driver, measure_step: Found(counter, ()))
    turn = Peer.turn

    def while_time_passes(self: Peer, number: int, seconds: float, end: float) -> dict[str, Any]:
        world.run(seconds)
        return turn(self, number, seconds, end)

    monkeypatch.setattr(Peer, "turn", while_time_passes)
    eager, _ = raced(tmp_path)
    assert eager.readings is not None
    assert eager.window_s == pytest.approx(3.0, abs=0.1)
    assert eager.readings["energy_j_per_token"].median == pytest.approx(400 * 3 / (3 * 64 * 8), rel=0.05)


# --- tables ----------------------------------------------------------------------------------------------------------


def measured(variant: str, tpot_s: float, joules: float, **more: Any) -> Measurement:
    readings = {
        "tpot_s": median_of([tpot_s, tpot_s * 1.02]),
        "ttft_s": median_of([0.01]),
        "energy_j_per_token": Reading(joules, joules * 0.98, joules * 1.03, ()),
        "bandwidth_fraction": median_of([0.61]),
    }
    facts = {"windows": 3, "window_s": 3.04, "step_s": 0.1013, "idle_w": 71.3}
    body: dict[str, Any] = {"ratios": {}, "notes": {}, "energy_source": "nvml_counter", "energy": facts, **more}
    return Measurement("k" + variant, variant, "a", LOAD, "machine", readings, **body)


def test_the_table_says_joules_with_their_window_step_idle_power_and_front() -> None:
    fast, lean = measured("fast", 0.002, 0.5), measured("lean", 0.003, 0.2)
    lines = [Line("m", "h200", v, v, "", m, "pareto") for v, m in (("fast", fast), ("lean", lean))]
    lost = Line("m", "h200", "int8", "lost", "left out: the time was up")
    rows = text(Tables(host.machine(), [lost, *lines])).splitlines()
    assert rows[1].split()[:4] == ["model", "target", "batch", "tpot_ms"]
    assert [row.split()[-1] for row in rows[2:4]] == ["fast", "lean"]
    assert rows[4].endswith("int8: left out: the time was up")
    energy = [row.split("  ") for row in rows[6:]]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in energy]
    assert cells[0][2:8] == ["J/token", "tpot_ms", "windows", "window_s", "step_s", "idle_W"]
    assert cells[1][2:] == [
        *("0.2 [0.196, 0.206]", "3.03 [3, 3.06]", "3", "3.04", "0.1013", "71.3", "nvml_counter", "pareto", "lean"),
    ]


def test_targets_in_the_same_rounds_and_where_a_step_spends_its_time() -> None:
    operators = (Operator("matmul", 16, 6e-4), Operator("softmax", 8, 2e-4))
    best = measured("fast", 0.002, 0.5, operators=operators)
    raced = [
        Across("m", target, target, best.readings, Reading(r, r - 0.01, r + 0.01, ()), best.energy)
        for target, r in (("h200", 1.0), ("sm80", 1.2))
    ]
    found = Tables(host.machine(), [Line("m", "h200", "f16", "fast", "", best)], raced)
    rows = text(found).splitlines()
    begin = rows.index("targets in the same rounds:")
    assert [row.split()[1] for row in rows[begin + 1 : begin + 4]] == ["target", "h200", "sm80"]
    assert rows[begin + 3].endswith("1.2 [1.19, 1.21]")
    assert rows[begin + 4] == "a decode step of m on h200, f16:"
    assert [row.split() for row in rows[begin + 6 :]] == [
        ["600", "75%", "16", "matmul"],
        ["200", "25%", "8", "softmax"],
    ]
    document = json.loads(as_json(found))
    assert document["rows"][0]["measurement"]["energy"]["idle_w"] == 71.3
    assert [a["ratio"]["median"] for a in document["across"]] == [1.0, 1.2]


# --- operators -------------------------------------------------------------------------------------------------------


def test_timestamps_of_several_steps_become_operators_of_one() -> None:
    def group(name: str, count: int, ns: int) -> str:
        return json.dumps({"type": "dispatch_group", "key": name, "valid": count, "total_ns": ns})

    lines = [
        json.dumps({"type": "dispatch_summary", "total_dispatches": 72}),
        group("decode$async_dispatch_0_lookup", 4, 4000),
        group("decode$async_dispatch_7_matmul_1x64", 64, 640_000),
        group("prefill$async_dispatch_9_matmul_1x64", 4, 40_000),
    ]
    assert read_profile(lines) == (
        Operator("matmul_1x64", 17, pytest.approx(170e-6)),
        Operator("lookup", 1, pytest.approx(1e-6)),
    )


def test_kernels_that_pytorchs_profiler_saw_become_operators_of_one_step() -> None:
    kernels = [
        {"name": "decode$async_dispatch_3_softmax_8", "count": 20, "seconds": 1e-4},
        {"name": "decode$async_dispatch_4_matmul", "count": 160, "seconds": 2e-3},
    ]
    assert read_kernels(kernels, 10) == (Operator("matmul", 16, 2e-4), Operator("softmax_8", 2, 1e-5))


# --- check data ------------------------------------------------------------------------------------------------------


def test_logits_of_a_large_vocabulary_are_carried_in_part_and_still_find_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = np.random.default_rng(0)
    logits = drawn.normal(size=(3, 2, 5000)).astype(np.float32)
    prompt, forced = np.zeros((2, 4), np.int64), np.zeros((2, 2), np.int64)
    np.savez(tmp_path / "check.npz", prompt=prompt, forced=forced, logits=logits, noise=np.float32(1e-6))
    catalog: Any = SimpleNamespace(blobs=BlobStore(tmp_path))
    assert pack._sampled(tmp_path / "check.npz", catalog) == tmp_path / "check.npz"
    monkeypatch.setattr(pack, "CHECK_BYTES", 1000)
    sampled = pack._sampled(tmp_path / "check.npz", catalog)
    assert sampled.stat().st_size < (tmp_path / "check.npz").stat().st_size / 3
    worker: Any = SimpleNamespace(session=SimpleNamespace(abi=SimpleNamespace(batch=2, score=False, page=0)))
    wrong = logits * np.float32(1.01)
    for actual in (logits, wrong):
        worker._forced = lambda *_, found=actual: found
        whole, part = (Worker.check(worker, {"data": str(path)}) for path in (tmp_path / "check.npz", sampled))
        assert part["top1"] == whole["top1"] == 1.0
        assert part["error"] == pytest.approx(whole["error"], rel=0.05)
    assert part["error"] == pytest.approx(0.01, rel=0.05)
