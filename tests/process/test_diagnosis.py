"""What the end of a child means: the exception's own sentence, what to do, and whether it may pass."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmbuild.process import child
from llmbuild.process.child import Limits, failure_of, run
from llmbuild.process.diagnosis import AGAIN, CHOOSE, diagnose
from llmbuild.spec.variant import Failure, Stage
from llmbuild.system.resources import Bound
from tests.process.conftest import RunCode

PRELUDE = """\
import sys
def error_of(x): return x
"""


Ended = Callable[..., Failure]


@pytest.fixture
def ended(run_code: RunCode, tmp_path: Path) -> Ended:
    """Return the failure of a Python child that runs a script."""

    def ended(code: str, stage: Stage = "import", limits: Limits | None = None) -> Failure:
        failure = run_code(PRELUDE + textwrap.dedent(code), tmp_path / "out", limits or Limits(20), stage)
        assert failure is not None
        return failure

    return ended


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise ValueError(error_of('no such shape'))", f"ValueError: no such shape; {AGAIN}"),
        (
            "import sentencepiece_of_nobody",
            "ModuleNotFoundError: No module named 'sentencepiece_of_nobody'; pip install",
        ),
        (
            "raise ImportError('\\nThis needs protobuf but it was not found. Install it.\\n\\n')",
            "ImportError: This needs protobuf but it was not found. Install it.; install or mend the package",
        ),
        (
            "raise OSError(28, 'No space left on device')",
            "OSError: [Errno 28] No space left on device; free some space",
        ),
        ("open('/nowhere/at/all')", "FileNotFoundError: [Errno 2] No such file or directory: '/nowhere/at/all'; mend"),
        (
            "raise PermissionError(13, 'Permission denied', 'w')",
            "PermissionError: [Errno 13] Permission denied: 'w'; mend",
        ),
        ("raise BrokenPipeError(32, 'Broken pipe')", "BrokenPipeError: [Errno 32] Broken pipe; mend that"),
        (
            """
            try:
                raise OSError(5, 'Input/output error')
            except OSError as error:
                raise RuntimeError('error: weights cannot be read') from error
            """,
            "RuntimeError: error: weights cannot be read; from OSError: [Errno 5] Input/output error; mend that",
        ),
        (
            """
            try:
                import protobuf_of_nobody
            except ImportError:
                raise TypeError('takes no argument')
            """,
            "TypeError: takes no argument; from ModuleNotFoundError: No module named 'protobuf_of_nobody'; pip install",
        ),
        (
            """
            class Left:
                def __del__(self): raise KeyError('at the end')
            left = Left()
            raise LookupError('the cause')
            """,
            f"LookupError: the cause; {AGAIN}",
        ),
        (
            """
            import logging
            try: raise ValueError('logged')
            except ValueError: logging.exception('error: caught')
            raise ArithmeticError('the cause')
            """,
            f"ArithmeticError: the cause; {AGAIN}",
        ),
        (
            "raise ExceptionGroup('two things', [ValueError('one'), OSError(28, 'No space left')])",
            "ExceptionGroup: two things (2 sub-",
        ),
        ("print('starting'); print('the error: none'); sys.exit('cannot go on')", "ended with 1: the error: none"),
        ("print('only this'); sys.exit(3)", f"ended with 3: only this; {AGAIN}"),
        ("sys.exit(3)", f"ended with 3; {AGAIN}"),
    ],
)
def test_the_reason_of_a_python_child_is_its_exception_and_what_to_do_and_it_passes(
    code: str, reason: str, ended: Ended
) -> None:
    failure = ended(code)
    assert reason in failure.reason
    assert failure.lasting is False


def test_memory_names_the_limit_that_was_set_and_what_the_host_has(
    ended: Ended, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "memory_limit", lambda: Bound(8 << 30, Path("/proc/meminfo")))
    monkeypatch.setattr(child, "group_memory_limit", lambda: None)
    failure = ended("bytearray(8 << 30)", limits=Limits(20, 1 << 30))
    assert failure.reason == (
        "MemoryError; it reached the limit of 1 GiB that llmbuild set (this host has 8 GiB): free memory, use a larger "
        f"machine or a smaller model; {AGAIN}"
    )
    assert failure.lasting is False


@pytest.mark.parametrize(
    "sentence",
    [
        "RuntimeError: [enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you "
        "tried to allocate 67108864 bytes. Error code 12 (Cannot allocate memory)",
        "numpy._core._exceptions._ArrayMemoryError: Unable to allocate 7.28 TiB for an array with shape (1000000,)",
        "OSError: [Errno 12] Cannot allocate memory",
    ],
)
def test_an_allocator_that_met_our_limit_is_not_to_blame(sentence: str) -> None:
    log = f'Traceback (most recent call last):\n  File "x.py", line 1, in <module>\n    error = f()\n{sentence}\n'
    failure = failure_of(["python"], "import", Limits(20, 16 << 30), 1, log)
    assert failure.reason.startswith(sentence)
    assert "the limit of 16 GiB that llmbuild set" in failure.reason
    assert failure.lasting is False


def test_children_may_use_what_the_host_or_its_container_has(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for gib, file in ((64, "/proc/meminfo"), (2, "/sys/fs/cgroup/memory.max")):
        bound = Bound(gib << 30, Path(file))
        monkeypatch.setattr(child, "memory_limit", lambda bound=bound: bound)
        monkeypatch.setattr(
            child, "group_memory_limit", lambda bound=bound: bound if "cgroup" in str(bound.file) else None
        )
        child.address_limit.cache_clear()
        found.append((Limits().memory_bytes - child.ADDRESSES, Limits().memory()))
    child.address_limit.cache_clear()
    host, container = found
    assert host == (64 << 30, "the limit of 68 GiB that llmbuild set (this host has 64 GiB)")
    told = "(this container may use 2 GiB, says /sys/fs/cgroup/memory.max)"
    assert container == (2 << 30, f"the limit of 6 GiB that llmbuild set {told}")


def test_a_killed_child_says_what_there_is_of_memory(ended: Ended, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "memory_told", lambda: "this container may use 2 GiB")
    failure = ended("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert "crashed with SIGKILL: the kernel does that where memory runs out, and this container may" in failure.reason
    assert failure.lasting is False


LEGALIZE = """\
module.mlir:120:8: error: failed to legalize operation 'vector.maskedload' that was marked illegal
    %error = "error: not this one" : index
             ^
module.mlir:120:8: note: see current operation: %31 = "vector.maskedload"(%0) : (memref<64x172xi4>) -> vector<8xi4>
module.mlir:3:3: error: failed to run translation of source executable to target executable for backend
module.mlir:3:3: note: see current operation: "hal.executable.variant"() ({ sym_name = "main$async_dispatch_7_matvec"
"""


@pytest.mark.parametrize(
    ("code", "log", "reason", "lasting"),
    [
        (
            1,
            LEGALIZE,
            "module.mlir:120:8: error: failed to legalize operation 'vector.maskedload' that was marked illegal "
            '(at %31 = "vector.maskedload"(%0) : (memref<64x172xi4>) -> vector<8xi4>, in dispatch_7_matvec); '
            f"{CHOOSE}",
            True,
        ),
        (1, "/tmp/llmbuild-x/a b.mlir:1:2: error: no\n", f"a b.mlir:1:2: error: no; {CHOOSE}", True),
        (1, "<unknown>:0: error: loc(x): no\n", f"error: loc(x): no; {CHOOSE}", True),
        (
            1,
            "  // error: a comment\nplain\nx.mlir:3:1: error: the first\n",
            f"x.mlir:3:1: error: the first; {CHOOSE}",
            True,
        ),
        (
            1,
            "iree-compile: Unknown command line argument '--new'.  Try: 'x'\niree-compile: Did you mean '--n'?\n",
            f"iree-compile: Unknown command line argument '--new'.  Try: 'x'; {CHOOSE}",
            True,
        ),
        (
            -6,
            "LLVM ERROR: Cannot select: t1\nStack dump:\n",
            f"LLVM ERROR: Cannot select: t1, and c crashed with SIGABRT; {CHOOSE}",
            True,
        ),
        (
            -6,
            "LLVM ERROR: out of memory\nStack dump:\n",
            "c crashed with SIGABRT: LLVM ERROR: out of memory; free memory",
            False,
        ),
        (-11, "Stack dump:\n", f"c crashed with SIGSEGV; {AGAIN}", False),
        (-15, "x.mlir:1:1: warning: slow\n", f"c crashed with SIGTERM; {AGAIN}", False),
        (1, "LLVM ERROR: IO failure on output stream: No space left on device\n", "free some space, in $TMPDIR", False),
        (1, "error opening input file: cannot open output file '/x': Permission denied\n", "mend that", False),
        (127, "c: error while loading shared libraries: libX.so: failed to map segment\n", "free memory", False),
        (
            1,
            "x.mlir:1:1: error: linking failed; escaped command line returned exit code 9\n",
            "c ended with 1: x.mlir",
            False,
        ),
        (2, "", f"c ended with 2; {AGAIN}", False),
    ],
)
def test_the_reason_of_a_compiler_is_its_first_diagnostic_and_what_it_is_about(
    code: int, log: str, reason: str, lasting: bool
) -> None:
    found = diagnose("c", code, log)
    assert reason in found.reason
    assert found.lasting is lasting


def test_only_a_compile_lasts(tmp_path: Path) -> None:
    stages: tuple[Stage, ...] = ("import", "compile", "check", "quality", "profile")
    lasting = {stage for stage in stages if failure_of(["c"], stage, Limits(), 1, "x:1:1: error: no\n").lasting}
    assert lasting == {"compile"}


def test_the_first_diagnostic_of_a_long_log_is_kept(ended: Ended) -> None:
    code = "print('x.mlir:1:1: error: the cause'); print('dump ' * 100_000); print('the end'); sys.exit(1)"
    failure = ended(code, "compile")
    assert failure.reason == f"x.mlir:1:1: error: the cause; {CHOOSE}"
    assert failure.log.endswith("the end\n")
    assert len(failure.log) < child.LOG_BYTES + 100


LINES = st.text(st.characters(codec="utf-8"), max_size=60)


@given(
    st.lists(LINES, max_size=8),
    st.sampled_from(["ValueError", "a.b.Odd", "OSError"]),
    LINES,
    st.lists(LINES, max_size=3),
)
def test_any_exception_in_any_noise_is_named_and_never_lasts(
    before: list[str], kind: str, sentence: str, noise: list[str]
) -> None:
    head = [f"> {line}" for line in before]
    frames = ["Traceback (most recent call last):", '  File "error.py", line 1, in error', "    raise error_of(x)"]
    after = [f"  {line}" for text in noise for line in text.splitlines()]
    log = "\n".join([*head, *frames, f"{kind}: {sentence}", *after])
    for code in (1, 2):
        found = diagnose("python", code, log)
        assert found.reason.startswith(kind)
        assert found.lasting is False


def test_a_job_of_the_frontend_without_a_package_passes(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')\n")
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import torch"]
    failure = run(command, "import", Limits(30), tmp_path / "out")
    assert failure is not None
    assert (failure.reason.split(";")[0], failure.lasting) == (
        "ImportError: libcudart.so.12: cannot open shared object file",
        False,
    )
    assert subprocess.run(command, capture_output=True, check=False).returncode == 1
