"""Jobs that are forked from a process which has imported their modules: what they share with it, and what not."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from llmbuild.process import child
from llmbuild.process.child import Limits, python, run, stop_all
from llmbuild.process.prefork import Prefork
from llmbuild.spec.variant import Failure

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux forks")

BRIEF = Limits(30)
Job = Callable[..., Failure | None]
Make = Callable[..., Prefork]


@pytest.fixture
def make() -> Iterator[Make]:
    """Make what starts jobs, with modules that it imports before."""
    made: list[Prefork] = []

    def make(*preload: str) -> Prefork:
        made.append(Prefork(preload))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Run code by a prefork; it may use `told`, a file that it appends a line to, and must write `out` to succeed."""

    def job(prefork: Prefork, code: str, limits: Limits = BRIEF, **env: str) -> Failure | None:
        name = str(time.monotonic_ns())
        script, out = tmp_path / f"{name}.py", tmp_path / f"{name}.out"
        out.unlink(missing_ok=True)
        begin = f"""
            import os, sys, time
            def told(*words):
                with open({str(tmp_path / "told")!r}, "a") as file: print(*words, file=file, flush=True)
            def done(): open({str(out)!r}, "w").close()
        """
        script.write_text(textwrap.dedent(begin) + textwrap.dedent(code))
        return prefork.run(str(script), [], "import", limits, out, env or None)

    return job


def told(folder: Path, count: int = 1) -> list[list[str]]:
    """Return the words of each line that jobs have told, once there are so many."""
    file, until = folder / "told", time.monotonic() + 20
    while True:
        lines = file.read_text().splitlines() if file.exists() else []
        if len(lines) >= count or time.monotonic() > until:
            assert len(lines) == count
            return [line.split() for line in lines]
        time.sleep(0.01)


def gone(pid: int) -> bool:
    """Wait for the end of a process; a zombie has ended."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False


def begun(prefork: Prefork, job: Job, code: str, limits: Limits = BRIEF) -> Future[Failure | None]:
    """Run a job in a thread."""
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(job, prefork, code, limits)
    finally:
        pool.shutdown(wait=False)


def brought(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> str:
    """Return the name of a module that children find."""
    (folder / "brought.py").write_text(textwrap.dedent(code))
    monkeypatch.setattr(child, "_folders", ())
    child.look_in([str(folder)])
    return "brought"


WHO = "told(os.getpid(), os.getppid()); "
WAITS = "told(os.getpid(), os.getppid()); time.sleep(60)"
ENDS = {
    "well": "done()",
    "well by a code": "done(); sys.exit(0)",
    "without a file": "pass",
    "with a code": "print('why'); sys.exit(3)",
    "with words": "sys.exit('error of words')",
    "with an exception": "done(); raise ValueError('no such shape')",
    "with an interruption": "raise KeyboardInterrupt",
    "with no memory": "bytearray(8 << 30)",
    "at once": "os._exit(7)",
    "with a signal": "os.kill(os.getpid(), 11)",
    "with SIGABRT": "print('error: x'); sys.stdout.flush(); os.abort()",
    "without a module": "import nobody_has_this",
    "late": "import atexit; atexit.register(done)",
    "after a thread": "import threading; threading.Thread(target=lambda: (time.sleep(0.3), done())).start()",
    "with much to say": "print('x' * 300_000); print('the end'); sys.exit(1)",
    "well by a truth": "done(); sys.exit(False)",
    "with a code below 0": "sys.exit(-1)",
    "with a code above 255": "sys.exit(256 + 3)",
    "after a pool": "import concurrent.futures as f; f.ThreadPoolExecutor(1).submit(time.sleep, 0.3); done()",
    "with words of C": "import ctypes; ctypes.CDLL(None).puts(b'error: of C'); sys.exit(3)",
    "with an exception at the end": "import atexit; atexit.register(lambda: 1 / 0); sys.exit(3)",
    "with words in order": "print('one'); os.write(2, b'two\\n'); print('three', file=sys.stderr); sys.exit(1)",
}


@pytest.mark.parametrize("how", ENDS)
def test_a_job_ends_as_it_does_alone(how: str, prefork: Prefork, tmp_path: Path) -> None:
    script, out, ends = tmp_path / "tool.py", tmp_path / "out", []
    script.write_text(f"import os, sys, time\ndef done(): open({str(out)!r}, 'w').close()\n{ENDS[how]}\n")
    limits = Limits(20, 1 << 32)
    for forked in (False, True):
        out.unlink(missing_ok=True)
        if forked:
            ends.append(prefork.run(str(script), ["a b"], "import", limits, out))
        else:
            ends.append(run(python(str(script), "a b"), "import", limits, out))
    alone, forked_end = ends
    if alone is None or forked_end is None:
        assert forked_end is alone
        assert how.startswith(("well", "late", "after"))
        return
    for field in ("stage", "reason", "command", "lasting"):
        assert getattr(forked_end, field) == getattr(alone, field)
    lines = [re.sub("0x[0-9a-f]+", "at", end.log).splitlines() for end in (alone, forked_end)]
    logs = [[line for line in each if not line.startswith("  ")] for each in lines]
    assert logs[0] == logs[1]  # but for addresses and the frames of a traceback


def test_a_file_that_a_job_leaves_open_is_written(make: Make, tmp_path: Path) -> None:
    prefork, script, left = make(), tmp_path / "tool.py", tmp_path / "left"
    script.write_text(f"left = open({str(left)!r}, 'w'); left.write('all of it')")
    assert prefork.run(str(script), [], "import", BRIEF, left) is None
    assert (left.read_text(), prefork.told()) == ("all of it", [])


def test_jobs_begin_with_what_the_server_has_imported_and_import_nothing_for_each_other(
    make: Make, job: Job, tmp_path: Path
) -> None:
    prefork = make("wave", "wave.of_a_later_version", "nobody_has_this")
    code = "told('wave' in sys.modules, 'colorsys' in sys.modules, os.getppid()); import colorsys; done()"
    assert [job(prefork, code), job(prefork, code), prefork.told()] == [None, None, []]
    one, two = told(tmp_path, 2)
    assert one == two
    assert one[:2] == ["True", "False"]


def test_a_job_has_nothing_of_the_server_but_its_memory(make: Make, job: Job, tmp_path: Path) -> None:
    prefork = make()
    asked = begun(prefork, job, WHO + "time.sleep(1); done()")
    told(tmp_path)
    assert (
        job(
            prefork,
            """
            import json, resource, signal
            opened = sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")[:-1])
            told(
                os.getpid() == os.getsid(0) == os.getpgid(0), resource.getrlimit(resource.RLIMIT_CORE)[0],
                signal.getsignal(signal.SIGCHLD).name, os.getcwd(), sys.argv[1:], __name__, len(opened), opened[0],
                "socket" in "".join(opened), sys.stdin.read() == "",
            )
            done()
            """,
        )
        is None
    )
    assert told(tmp_path, 2)[1] == ["True", "0", "SIG_DFL", "/", "[]", "__main__", "3", "/dev/null", "False", "True"]
    assert asked.result() is None


def test_a_job_is_isolated_from_where_llmbuild_runs(
    make: Make, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "colorsys.py").write_text("raise SystemExit('of the folder')")
    monkeypatch.chdir(tmp_path)
    for name in ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP"):
        monkeypatch.setenv(name, str(tmp_path))
    code = "import colorsys; told([n for n in os.environ if n.startswith('PYTHON')], os.environ.get('ASKED')); done()"
    prefork = make()
    assert [job(prefork, code), job(prefork, code, ASKED="for"), prefork.told()] == [None, None, []]
    assert told(tmp_path, 2) == [["[]", "None"], ["[]", "for"]]


def test_a_job_whose_environment_differs_does_not_wait_for_others(make: Make, job: Job, tmp_path: Path) -> None:
    prefork = make("wave")
    other = begun(prefork, job, WAITS)
    told(tmp_path)
    assert job(prefork, "told(os.environ['ASKED'], 'wave' in sys.modules); done()", ASKED="for") is None
    assert told(tmp_path, 2)[1] == ["for", "False"]
    assert not other.done()


def test_all_jobs_have_what_a_prefork_gives_them_whoever_starts_them_and_a_job_may_have_another(
    make: Make, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefork, code = make("wave"), "told(os.environ['ALL'], 'wave' in sys.modules); done()"
    prefork.env = {"ALL": "theirs"}
    assert job(prefork, code) is None
    assert job(prefork, code, ALL="its own") is None
    monkeypatch.setattr(prefork, "_trouble", "none is to be started")
    assert job(prefork, code) is None
    assert (tmp_path / "told").read_text().splitlines() == ["theirs True", "its own True", "theirs False"]


def test_the_limits_of_a_job_are_its_own(make: Make, job: Job, tmp_path: Path) -> None:
    prefork = make()
    failure = job(prefork, WHO + "bytearray(8 << 30)", Limits(20, 1 << 30))
    assert failure is not None
    assert failure.reason.startswith("MemoryError; it reached the limit of 1 GiB that llmbuild set")
    code = "import resource; told(resource.getrlimit(resource.RLIMIT_AS)[0], os.getppid()); done()"
    assert job(prefork, code, Limits(20, 0)) is None
    before, after = told(tmp_path, 2)
    import resource

    assert after == [str(resource.getrlimit(resource.RLIMIT_AS)[0]), before[1]]


def test_jobs_of_several_threads_run_at_once(make: Make, job: Job, tmp_path: Path) -> None:
    prefork = make()
    meets = f"""
        told(os.getpid(), os.getppid())
        while len(open({str(tmp_path / "told")!r}).readlines()) < 3: time.sleep(0.01)
        done()
    """
    asked = [begun(prefork, job, meets) for _ in range(3)]
    assert [each.result() for each in asked] == [None] * 3
    pids, servers = zip(*told(tmp_path, 3), strict=True)
    assert (len(set(pids)), len(set(servers)), prefork.told()) == (3, 1, [])


def test_a_job_that_is_killed_does_no_harm_to_another_or_the_next(make: Make, job: Job, tmp_path: Path) -> None:
    prefork = make()
    other = begun(prefork, job, WHO + "time.sleep(2); done()")
    told(tmp_path)
    failure = job(prefork, WHO + "os.kill(os.getpid(), 9)")
    assert failure is not None
    assert "crashed with SIGKILL" in failure.reason
    late = job(prefork, WAITS, Limits(0.5))
    assert late is not None
    assert "ran past" in late.reason
    assert [job(prefork, WHO + "done()"), other.result(), prefork.told()] == [None, None, []]
    assert len({server for _, server in told(tmp_path, 4)}) == 1


def test_a_time_out_ends_what_the_job_started_before_it_returns(make: Make, job: Job, tmp_path: Path) -> None:
    code = "import subprocess; told(os.getpid(), subprocess.Popen(['sleep', '63']).pid); print('begun'); time.sleep(60)"
    failure = job(make(), code.replace("print('begun')", "print('begun', flush=True)"), Limits(2.0))
    assert failure is not None
    assert (failure.reason.split(" ran past ")[1], failure.lasting, failure.log) == ("2 s", False, "begun\n")
    mine, started = told(tmp_path)[0]
    assert not Path(f"/proc/{mine}").exists()
    assert gone(int(started))


def test_stop_all_ends_jobs_and_their_server_stays(make: Make, job: Job, tmp_path: Path) -> None:
    prefork = make()
    asked = [begun(prefork, job, WAITS) for _ in range(2)]
    pids = [pid for pid, _ in told(tmp_path, 2)]
    stop_all()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert ["crashed with SIGKILL" in str(each.result()) for each in asked] == [True, True]
    assert [job(prefork, WHO + "done()"), prefork.told()] == [None, []]
    assert len({server for _, server in told(tmp_path, 3)}) == 1


def test_an_interruption_ends_the_job(make: Make, job: Job, tmp_path: Path) -> None:
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 1.5)
    try:
        with pytest.raises(KeyboardInterrupt):
            job(make(), WAITS)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not Path(f"/proc/{told(tmp_path)[0][0]}").exists()


def test_a_server_that_still_imports_is_stopped_at_once_and_the_next_job_has_another(
    make: Make, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flag = tmp_path / "slow"
    flag.touch()
    name = brought(tmp_path, monkeypatch, f"import os, time\nif os.path.exists({str(flag)!r}): time.sleep(60)\n")
    prefork = make(name)
    prefork.start()
    failure = job(prefork, "done()", Limits(0.5))
    assert failure is not None
    assert "ran past" in failure.reason
    asked = begun(prefork, job, "done()")
    time.sleep(0.5)
    begin = time.monotonic()
    stop_all()
    assert "crashed with SIGKILL" in str(asked.result())
    assert time.monotonic() - begin < 5
    flag.unlink()
    assert [job(prefork, "told('brought' in sys.modules); done()"), prefork.told()] == [None, []]
    assert told(tmp_path) == [["True"]]


def test_jobs_run_alone_after_the_server_was_killed_and_that_is_told_once(make: Make, job: Job, tmp_path: Path) -> None:
    prefork = make("wave")
    code = "told(os.getppid(), 'wave' in sys.modules); done()"
    assert job(prefork, code) is None
    server = int(told(tmp_path)[0][0])
    os.kill(server, signal.SIGKILL)
    assert [job(prefork, code), job(prefork, code)] == [None, None]
    assert told(tmp_path, 3)[1:] == [[str(os.getpid()), "False"]] * 2
    (note,) = prefork.told()
    assert note.endswith(": it ended with SIGKILL")
    assert prefork.told() == []


def test_a_job_whose_server_is_killed_ends_and_runs_again_alone(make: Make, job: Job, tmp_path: Path) -> None:
    prefork = make()
    code = f"told(os.getpid(), os.getppid()); time.sleep(60 if os.getppid() != {os.getpid()} else 0); done()"
    asked = begun(prefork, job, code)
    pid, server = map(int, told(tmp_path)[0])
    os.kill(server, signal.SIGKILL)
    assert asked.result() is None
    assert gone(pid)
    assert told(tmp_path, 2)[1][1] == str(os.getpid())
    assert len(prefork.told()) == 1


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("raise ImportError('libx.so: cannot open shared object file')", "ImportError: libx.so: cannot open"),
        ("import nobody_has_this", "ModuleNotFoundError: No module named 'nobody_has_this'"),
        ("import threading, time; threading.Thread(target=time.sleep, args=(60,), daemon=True).start()", "2 threads"),
        ("import os; os._exit(3)", "it ended with 3"),
    ],
)
def test_a_server_that_cannot_fork_is_told_of_and_jobs_run_alone(
    code: str, why: str, make: Make, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefork = make(brought(tmp_path, monkeypatch, code))
    assert job(prefork, "told(os.getppid()); done()") is None
    assert told(tmp_path) == [[str(os.getpid())]]
    (note,) = prefork.told()
    assert why in note


def test_threads_that_end_at_a_fork_are_no_hindrance(
    make: Make, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
        import os, threading
        over = threading.Event()
        thread = threading.Thread(target=over.wait)
        thread.start()
        os.register_at_fork(before=lambda: (over.set(), thread.join()))
    """
    prefork = make(brought(tmp_path, monkeypatch, code))
    assert [job(prefork, "told('brought' in sys.modules); done()"), prefork.told()] == [None, []]
    assert told(tmp_path) == [["True"]]


def test_a_server_rests_when_no_job_runs(make: Make, job: Job, tmp_path: Path) -> None:
    prefork = make()
    asked = begun(prefork, job, WHO + "time.sleep(1); done()")
    server = int(told(tmp_path)[0][1])
    prefork.rest()
    assert asked.result() is None
    prefork.rest()
    assert not Path(f"/proc/{server}").exists()
    assert [job(prefork, WHO + "done()"), prefork.told()] == [None, []]
    assert told(tmp_path, 2)[1][1] not in (str(server), str(os.getpid()))


LLMBUILD = """
import sys
from pathlib import Path
from llmbuild.process.child import Limits
from llmbuild.process.prefork import Prefork
script, out, *preload = sys.argv[1:]
prefork = Prefork(preload)
print(prefork.run(script, [], "import", Limits(60), Path(out)), flush=True)
"""


@pytest.mark.parametrize("how", ["killed", "ended"])
def test_the_server_and_its_jobs_end_with_llmbuild(how: str, tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        "import os, subprocess, time\n"
        "pids = [os.getpid(), os.getppid(), subprocess.Popen(['sleep', '64']).pid]\n"
        f"open({str(tmp_path / 'told')!r}, 'w').write(' '.join(map(str, pids)) + '\\n')\n"
        + ("time.sleep(60)\n" if how == "killed" else "")
    )
    package = str(Path(child.__file__).parents[2])
    parent = subprocess.Popen(
        [sys.executable, "-c", LLMBUILD, str(script), str(tmp_path / "out")], env={**os.environ, "PYTHONPATH": package}
    )
    mine, server, started = map(int, told(tmp_path)[0])
    if how == "killed":
        parent.send_signal(signal.SIGKILL)
    assert parent.wait() == (-signal.SIGKILL if how == "killed" else 0)
    assert [gone(mine), gone(server)] == [True, True]
    if how == "killed":
        assert gone(started)
    else:
        os.kill(started, signal.SIGKILL)
