from __future__ import annotations

import resource
import shlex
import subprocess
import sys
from pathlib import Path
from time import monotonic

import pytest

from llmbuild.compiler import iree
from llmbuild.compiler.flags import compile_flags
from llmbuild.errors import InputError
from llmbuild.process.child import TIME_UP, Limits, run
from llmbuild.search.knobs.space import KNOBS
from llmbuild.spec.target import Target
from tests.process.conftest import RunCode

DEFAULTS = {k.name: k.default for k in KNOBS}
HOST = Target("host", "llvm-cpu", "x86_64", "host")


def test_a_tool_that_writes_its_file_did_its_work(tmp_path: Path, run_code: RunCode) -> None:
    out = tmp_path / "out"
    assert run_code(f"open({str(out)!r}, 'w').write('x')", out) is None


@pytest.mark.parametrize("asked", [0, 1 << 33])
def test_addresses_are_bounded_as_asked_and_not_at_all_by_0(asked: int, tmp_path: Path, run_code: RunCode) -> None:
    out = tmp_path / "out"
    code = f"import resource; open({str(out)!r}, 'w').write(str(resource.getrlimit(resource.RLIMIT_AS)[0]))"
    assert run_code(code, out, Limits(20, asked)) is None
    assert int(out.read_text()) == (asked or resource.getrlimit(resource.RLIMIT_AS)[0])


@pytest.mark.parametrize(
    ("code", "reason", "lasting"),
    [
        ("import os; os.abort()", "crashed with SIGABRT", False),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashed with SIGSEGV", False),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "crashed with SIGKILL", False),
        ("print('x.mlir:1: error: no such op'); raise SystemExit(1)", "x.mlir:1: error: no such op", True),
        ("print('fatal: No space left on device'); raise SystemExit(1)", "ended with 1", False),
        ("pass", "ended well but wrote no file", False),
    ],
)
def test_what_a_tool_does_wrong_is_a_value(
    tmp_path: Path, run_code: RunCode, code: str, reason: str, lasting: bool
) -> None:
    failure = run_code(code, tmp_path / "out")
    assert failure is not None
    assert reason in failure.reason
    assert failure.lasting == lasting
    assert shlex.split(failure.command)[0] == sys.executable


def test_a_tool_that_never_ends_is_ended_with_what_it_started(tmp_path: Path, run_code: RunCode) -> None:
    code = "import subprocess, time; subprocess.Popen(['sleep', '61']); print('begun', flush=True); time.sleep(60)"
    failure = run_code(code, tmp_path / "out", Limits(1.0))
    assert failure is not None
    assert (failure.reason.split(" ran past ")[1], failure.lasting, "begun" in failure.log) == ("1 s", False, True)
    assert "sleep 61" not in subprocess.run(["ps", "-ax", "-o", "args"], capture_output=True, text=True).stdout


def test_a_tool_is_ended_when_the_time_of_the_whole_run_is_up(tmp_path: Path, run_code: RunCode) -> None:
    failure = run_code("import time; time.sleep(60)", tmp_path / "out", Limits(seconds=60, until=monotonic() + 0.2))
    assert failure is not None
    assert (failure.reason.partition(" ")[2], failure.lasting) == (TIME_UP, False)


def test_a_tool_that_wants_too_much_memory_fails_alone(tmp_path: Path, run_code: RunCode) -> None:
    failure = run_code("bytearray(8 << 30)", tmp_path / "out", Limits(20, memory_bytes=1 << 30))
    assert failure is not None
    assert "MemoryError" in failure.log


def test_a_tool_that_is_not_there_is_a_failure(tmp_path: Path) -> None:
    failure = run(["/nowhere/tool"], "compile", Limits(), tmp_path / "out")
    assert failure is not None
    assert failure.reason.startswith("cannot start /nowhere/tool")


def test_mlir_that_does_not_parse_is_a_failure_with_a_pasteable_command(tmp_path: Path) -> None:
    source = tmp_path / "bad.mlir"
    source.write_text("func.func @f( {")
    failure = iree.compile_module(source, tmp_path / "o.vmfb", HOST, DEFAULTS, Limits(60))
    assert failure is not None
    assert "error:" in failure.reason
    again = subprocess.run(shlex.split(failure.command), capture_output=True, text=True, check=False)
    assert again.returncode != 0
    assert failure.reason.partition("; ")[0] in again.stderr


def test_equal_inputs_compile_to_equal_bytes_whatever_the_file_is_called(tmp_path: Path) -> None:
    made = []
    for name in ("one", "two"):
        source = tmp_path / f"{name}.mlir"
        source.write_text(iree.PROBE)
        assert iree.compile_module(source, tmp_path / f"{name}.vmfb", HOST, DEFAULTS, Limits(60)) is None
        made.append((tmp_path / f"{name}.vmfb").read_bytes())
    assert made[0] == made[1]


def test_host_is_resolved_to_a_named_cpu_and_what_it_needs() -> None:
    resolved = iree.resolve(HOST)
    assert resolved.cpu not in ("", "host")
    assert "sse2" in resolved.requires or resolved.arch != "x86_64"
    assert iree.resolve(resolved).identity() == resolved.identity()


def test_a_cpu_the_compiler_does_not_know_is_bad_input() -> None:
    with pytest.raises(InputError, match="the compiler does not take it"):
        iree.resolve(Target("x", "llvm-cpu", "x86_64", "nonsense"))


def test_point_zero_adds_no_flag_of_the_search() -> None:
    target = Target("v3", "llvm-cpu", "x86_64", "x86-64-v3")
    flags = [f for f in compile_flags(target, DEFAULTS) if "opt-level" in f or "tiling" in f or "distribution" in f]
    assert flags == []


def test_flags_of_a_point_are_golden() -> None:
    point = {**DEFAULTS, "opt_level": "O3", "data_tiling": "dispatch", "split_reduction": True, "distribution_size": 32}
    assert compile_flags(Target("v3", "llvm-cpu", "x86_64", "x86-64-v3"), point) == [
        "--iree-hal-target-device=local",
        "--iree-hal-local-target-device-backends=llvm-cpu",
        "--iree-llvmcpu-target-cpu=x86-64-v3",
        "--iree-llvmcpu-target-triple=x86_64-unknown-linux-gnu",
        "--iree-opt-level=O3",
        "--iree-opt-data-tiling=true",
        "--iree-dispatch-creation-enable-split-reduction=true",
        "--iree-llvmcpu-distribution-size=32",
        "--iree-llvmcpu-debug-symbols=false",
        "--iree-hal-executable-debug-level=0",
        "--iree-vm-bytecode-module-strip-source-map=true",
        "--iree-vm-emit-polyglot-zip=false",
        "--verify=false",
    ]
