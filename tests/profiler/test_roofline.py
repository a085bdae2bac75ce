from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmbuild.build.targets import find_target
from llmbuild.compiler import iree
from llmbuild.kernels import limits
from llmbuild.process.child import Limits
from llmbuild.profiler import roofline
from llmbuild.runtime import host
from llmbuild.search.knobs.space import KNOBS
from llmbuild.spec.measurement import Reading
from llmbuild.spec.program import Abi, TensorType
from llmbuild.spec.variant import Failure
from llmbuild.spec.workload import Workload

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench" / "roofline.py"
POINT = {knob.name: knob.default for knob in KNOBS} | {"opt_level": "O2"}
SMALL = 1 << 22


def compile_here(source: Path, output: Path) -> Failure | None:
    return iree.compile_module(source, output, find_target("host"), POINT, Limits(seconds=120))


def exactly(value: float) -> Reading:
    return Reading(value, value, value, ())


def rates(workers: int, scale: float = 1.0, int8: float | None = 400.0) -> roofline.Rates:
    return roofline.Rates(
        workers, exactly(10 * scale), exactly(100 * scale), exactly(int8 * scale) if int8 is not None else None
    )


ABI = Abi(
    vocabulary=10,
    context=8,
    kv=(TensorType((8, 2, 4), "float16"), TensorType((8, 2, 4), "float16")),
    eos_tokens=(),
    parameters=1000,
)


@pytest.fixture(scope="module")
def measured() -> roofline.Roofline:
    found = roofline.measure(compile_here, seconds=0.3, size=SMALL)
    assert isinstance(found, roofline.Roofline), found
    return found


def test_limits_are_measured_with_one_worker_and_with_all(measured: roofline.Roofline) -> None:
    assert (measured.one.workers, measured.all.workers) == (1, host.cores())
    for found in (measured.one, measured.all):
        for reading in (found.read_bytes_per_s, found.f32_flop_per_s):
            assert 0 < reading.low <= reading.median <= reading.high < 1e15
            assert reading.high > 1e8
            assert len(reading.samples) >= 5
    assert measured.buffer_bytes == SMALL


def test_int8_is_measured_where_there_are_instructions_for_it_and_absent_with_a_reason_elsewhere(
    measured: roofline.Roofline,
) -> None:
    told = any(note.startswith("int8:") for note in measured.notes)
    assert (measured.one.int8_op_per_s is None) == told == (not limits.has_int8(host.features()))


def test_a_machine_without_vnni_gets_kernels_without_it() -> None:
    text = limits.module(frozenset({"avx2", "fma"}), [1], 1 << 10)
    assert "vpdpbusd" not in text and limits.function(limits.F32, 1) in text
    assert set(limits.operations(frozenset(), 1)) == {limits.F32}


def test_a_kernel_that_does_not_compile_is_a_failure() -> None:
    wrong = Failure("compile", "no such target", "iree-compile", "", lasting=True)
    assert roofline.measure(lambda *_: wrong, size=SMALL) is wrong


def test_an_artifact_that_does_not_open_is_a_failure() -> None:
    def empty(_: Path, output: Path) -> None:
        output.write_bytes(b"nothing")

    found = roofline.measure(empty, seconds=0.1, size=SMALL)
    assert isinstance(found, Failure) and found.stage == "profile"


def test_the_buffer_is_larger_than_the_caches_and_cut_evenly() -> None:
    for workers in (1, 2, 3, 96):
        size = roofline.buffer_bytes(workers)
        assert size >= roofline.LEAST_BYTES and size % (512 * workers) == 0


def test_work_counts_weights_the_filled_cache_and_the_head_once() -> None:
    done = roofline.work(ABI, 4000, Workload("w", prompt=3, output=2, context=8), head_parameters=100)
    assert done.parameter_bytes == 4000
    assert done.kv_bytes == 2 * (2 * 4 * 2) * 4  # two buffers, 16 bytes a position, 4 positions
    assert done.prefill_operations == 2 * (900 * 3 + 100)
    assert roofline.work(ABI, 4000, Workload("w", 3, 2, 8)).prefill_operations == 2 * 1000 * 3


def test_a_batch_reads_the_weights_once_and_everything_else_as_often_as_it_has_sequences() -> None:
    many = replace(ABI, batch=4, kv=tuple(TensorType((4 * 8, 2, 4), "float16") for _ in ABI.kv))
    one, four = (roofline.work(abi, 4000, Workload("w", 3, 2, 8, abi.batch), 100) for abi in (ABI, many))
    assert four == roofline.Work(one.parameter_bytes, 4 * one.kv_bytes, 4 * one.prefill_operations)


def test_fractions_are_work_over_time_over_limit() -> None:
    done = roofline.Work(parameter_bytes=30, kv_bytes=10.0, prefill_operations=1000)
    found = roofline.fractions(rates(1), done, Reading(8.0, 4.0, 16.0, ()), exactly(20.0))
    assert found.decode_of_bandwidth == Reading(0.5, 0.25, 1.0, ())
    assert found.prefill_of_f32.median == 0.5
    assert found.prefill_of_int8 is not None and found.prefill_of_int8.median == 0.125
    assert roofline.fractions(rates(1, int8=None), done, exactly(8.0), exactly(20.0)).prefill_of_int8 is None


def test_a_variant_is_held_against_what_its_threads_can_reach() -> None:
    found = roofline.Roofline(rates(1), rates(4, 3.0), 1, ())
    assert found.of("local-sync", 0).workers == found.of("local-task", 1).workers == 1
    assert found.of("local-task", 0).workers == found.of("local-task", 4).workers == 4


def test_the_script_prints_one_json_document_with_the_variants_of_a_catalog(built: Any) -> None:
    command = [sys.executable, str(SCRIPT), "-C", str(built.catalog), "--seconds", "0.2", "--mib", "4", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert [row["workers"] for row in made["limits"]] == sorted({1, host.cores()})
    assert made["variants"] and all(row["decode_of_bandwidth"]["median"] > 0 for row in made["variants"])
