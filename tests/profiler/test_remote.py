"""Compile here, measure there: over ssh to a server of our own on loopback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from llmbuild import digest
from llmbuild.carry.pack import MORE_CODE
from llmbuild.errors import InputError, NothingUsable
from llmbuild.profiler import serve, wire
from llmbuild.profiler.protocol import Prepared, Protocol, Quality, Stage, Subject
from llmbuild.profiler.remote import Place, Remote, RemoteBench, archive, place_of
from llmbuild.runtime import devices, host, reader
from llmbuild.spec.measurement import Measurement, Operator, Reading
from llmbuild.spec.target import Target
from llmbuild.spec.variant import Failure
from llmbuild.spec.workload import Workload
from tests.conftest import Project, llmbuild, low_copy
from tests.support import sshd

needs_sshd = pytest.mark.skipif(bool(sshd.missing()), reason=sshd.missing())


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("ssh://pi", Place("pi")),
        ("ssh://me@pi:2222", Place("me@pi", 2222)),
        ("ssh://me@pi/opt/venv/bin/python", Place("me@pi", None, "/opt/venv/bin/python")),
        ("ssh://PI/", Place("PI")),
    ],
)
def test_a_place_is_read_from_a_url(text: str, place: Place) -> None:
    assert place_of(text) == place


@pytest.mark.parametrize("text", ["pi", "http://pi", "ssh://", "ssh://me:secret@pi", "ssh://pi:port", "ssh://pi?x=1"])
def test_a_url_that_names_no_place_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="write ssh://"):
        place_of(text)


def test_a_host_that_looks_like_an_option_is_a_host() -> None:
    command = Place("-oProxyCommand=touch /tmp/x").command("print()")
    assert command.index("--") < command.index("-oProxyCommand=touch /tmp/x")


def test_the_same_code_makes_the_same_archive() -> None:
    assert archive() == archive()


def test_a_measurement_survives_the_wire() -> None:
    reading = Reading(1.0, 0.5, 2.0, (1.0, 0.5))
    made = Measurement(
        "k", "v", "a", Workload("w", 8, 8, 32), "m", {"tpot_s": reading}, {"tpot_s": reading}, {"noise": "some"},
        "nvml_counter", (Operator("matmul", 3, 0.1),), "s", {"idle_w": 70.0},
    )  # fmt: skip
    assert wire.measurement_of(json.loads(json.dumps(digest.plain(made)))) == made
    assert wire.machine_of(json.loads(json.dumps(digest.plain(host.machine())))) == host.machine()


def test_what_is_known_of_a_subject_survives_the_wire(tmp_path: Path) -> None:
    reading = Reading(1.0, 0.5, 2.0, (1.0, 0.5))
    known = Prepared({"load_s": reading}, {"check": "well"}, (Operator("matmul", 3, 0.1),), {"w": {"tpot_s": reading}})
    paths = [tmp_path / name for name in "abc"]
    for one in (Subject("v", "a", *paths, {}, "local-sync", 1, 0.1, meters=("rapl",), known=known), None):
        made = one or Subject("v", "a", *paths, {}, "local-sync", 1, 0.1)
        body = json.loads(json.dumps(wire.subject_body(made)))
        assert wire.subject_of(body, lambda name: tmp_path / name) == made


def test_a_target_that_would_crash_is_refused_before_anything_is_opened() -> None:
    runtime = host.runtime_version()
    cpu = {"backend": "llvm-cpu", "arch": host.architecture(), "requires": []}
    assert serve.unfit(cpu, runtime) == ""
    assert "lacks: avx99" in serve.unfit({**cpu, "requires": ["avx99"]}, runtime)
    assert "is for vax" in serve.unfit({**cpu, "arch": "vax"}, runtime)
    assert "needs IREE runtime 1.0" in serve.unfit(cpu, "1.0.0")
    gpu = serve.unfit({"backend": "cuda", "arch": "nvptx64", "requires": []}, runtime)
    assert (gpu == "") == (not devices.lacks("cuda"))


# --- over a connection --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sshd.Far]:
    with sshd.server(tmp_path_factory.mktemp("far")) as found, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", found.env["PATH"])
        yield found


@pytest.fixture(scope="module")
def compiled(tiers: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A tiny model compiled for a target that runs here, and not measured."""
    made = low_copy(tiers, tmp_path_factory.mktemp("compiled") / "project")
    done = llmbuild("compile", made.recipe, "-t", made.folder / "low.yaml", "--trials", "1", "-C", made.catalog)
    assert done.returncode == 0, done.stderr
    return made


@needs_sshd
def test_what_is_compiled_here_is_measured_there_as_a_row_of_that_machine(compiled: Project, far: sshd.Far) -> None:
    asked = ["-t", compiled.folder / "low.yaml", "--on", far.url, "--json", "-C", compiled.catalog]
    done = llmbuild("profile", compiled.recipe, *asked)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)
    assert row["tpot_s"] > 0
    assert row["quality_top1"] == 1.0
    stored = next(r for r in reader.variants(compiled.catalog, everything=True) if r["tpot_s"])
    there = Remote(place_of(far.url))
    try:
        assert stored["machine_digest"] == digest.of(there.machine)
        assert there.machine == replace(host.machine(), system="Linux 0.1")
    finally:
        there.close()
    assert sshd.KERNEL in stored["notes"]["conditions"]
    if host.machine_cores() > 1:
        assert stored["notes"]["held back"].startswith("pinned to CPU 0 of ")
    sent = {path.name for path in (far.cache / "llmbuild" / "blobs").iterdir()}
    assert {row["artifact"], stored["parameters"]} <= sent
    again = llmbuild("profile", row["variant"][:12], "--on", far.url, "--json", "-C", compiled.catalog)
    assert again.returncode == 0, again.stderr
    assert {r["variant"] for r in json.loads(again.stdout)} == {row["variant"]}
    assert {r["machine"] for r in json.loads(again.stdout)} == {row["machine"]}


@needs_sshd
def test_a_blob_is_sent_once_and_a_damaged_one_again(far: sshd.Far, tmp_path: Path) -> None:
    data = tmp_path / "blob"
    data.write_bytes(b"weights" * 1000)
    name = digest.of_file(data)
    sent = []
    for damage in (False, False, True):
        there = Remote(place_of(far.url))
        try:
            if damage:
                (far.cache / "llmbuild" / "blobs" / name).write_bytes(b"other")
            there.put({name: data})
            sent.append(there.sent_bytes)
        finally:
            there.close()
    assert sent == [7000, 0, 7000]


@needs_sshd
def test_a_lost_connection_is_a_passing_failure(far: sshd.Far, compiled: Project) -> None:
    there = Remote(place_of(far.url))
    bench = bench_on(there)
    connection = there.connection
    lost = threading.Timer(0.5, connection._process.kill)
    lost.start()
    found = bench.measure(subject_in(compiled))
    lost.join()
    there.close()
    assert isinstance(found, Failure)
    assert (found.lasting, "was lost" in found.reason) == (False, True)
    assert bench.race([subject_in(compiled)]) == [] or not bench.has_baseline
    there.close()


@needs_sshd
def test_a_host_that_cannot_be_reached_is_one_message(far: sshd.Far, compiled: Project) -> None:
    done = llmbuild("profile", compiled.recipe, "--on", "ssh://127.0.0.1:1", "-C", compiled.catalog)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert "127.0.0.1: cannot be measured on: " in done.stderr
    with pytest.raises(NothingUsable, match=r"No such file|not found"):
        _ = Remote(place_of(f"ssh://{far.url[6:].split('/')[0]}/no/such/python")).machine


@needs_sshd
def test_an_interruption_ends_what_runs_there(far: sshd.Far, compiled: Project) -> None:
    variant = subject_in(compiled).variant
    command = [sys.executable, "-m", "llmbuild", "profile", variant, "--on", far.url, "-C", compiled.catalog]
    child = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    try:
        wait_for(lambda: len(workers(far)) > 1)
        child.send_signal(signal.SIGINT)
        _, told = child.communicate(timeout=60)
    finally:
        child.kill()
    assert (child.returncode, "Traceback" in told) == (130, False), told
    wait_for(lambda: not workers(far))


@needs_sshd
def test_a_target_that_the_far_host_lacks_is_refused(far: sshd.Far, compiled: Project) -> None:
    other = "aarch64" if host.architecture() == "x86_64" else "x86_64"
    (compiled.folder / "other.yaml").write_text(f"backend: llvm-cpu\narch: {other}\ncpu: generic\n")
    target = compiled.folder / "other.yaml"
    done = llmbuild("profile", compiled.recipe, "-t", target, "--on", far.url, "-C", compiled.catalog)
    assert (done.returncode, f"cannot run on {far.url[6:].split(':')[0]}" in done.stderr) == (2, True), done.stderr


@needs_sshd
def test_a_race_there_asks_here_who_is_still_undecided(far: sshd.Far, compiled: Project) -> None:
    there = Remote(place_of(far.url))
    bench, asked = bench_on(there), list[set[str]]()
    one = subject_in(compiled)
    twin = replace(one, variant="f" * 64)

    def nobody(measured: Sequence[Measurement], reach: float) -> set[str]:
        assert reach >= 4
        asked.append({m.variant for m in measured})
        return set()

    try:
        raced = bench.race([one, twin], nobody)
    finally:
        bench.close()
    assert asked == [{one.variant, twin.variant}]
    assert [m.variant for (m,) in raced] == [one.variant, twin.variant]
    assert {m.session for (m,) in raced} == {raced[0][0].session}
    assert all(len(m.readings["tpot_s"].samples) <= 4 for (m,) in raced)


@needs_sshd
def test_what_is_known_here_is_not_measured_there_and_a_decided_variant_has_the_least_rounds(
    far: sshd.Far, compiled: Project
) -> None:
    there, one = Remote(place_of(far.url)), subject_in(compiled)
    bench, told, reached = bench_on(there), list[Stage](), list[Measurement]()

    def decided(so_far: Measurement) -> bool:
        reached.append(so_far)
        return True

    try:
        alone = bench.measure(one, baseline=True)
        assert not isinstance(alone, Failure), alone.reason
        bench.close()
        bench.tell = told.append
        assert bench.open_baseline(replace(one, known=Prepared.of(alone))) is None
        assert (bench.has_baseline, told) == (True, [Stage("check")])
        twin = replace(one, variant="f" * 64)
        found = bench.measure(twin, False, None, decided)
    finally:
        bench.close()
    assert not isinstance(found, Failure), found.reason
    assert [len(m.readings["tpot_s"].samples) for m in (*reached, *found)] == [3, 3]
    assert list(dict.fromkeys(told[1:])) == [Stage("check"), *(Stage("measure", n, 3) for n in (1, 2, 3))]
    assert found[0].ratios["tpot_s"].median > 0


def bench_on(there: Remote) -> RemoteBench:
    target = Target("low", "llvm-cpu", host.architecture(), "generic")
    load, brief = Workload("short", 8, 8, 32), Protocol(rounds=3, race_rounds=4, race_seconds=30.0)
    return RemoteBench(there, [load], Quality(None, "none"), brief, None, target, host.runtime_version())


def subject_in(compiled: Project):  # type: ignore[no-untyped-def]
    from llmbuild.build.remeasure import known_of, subject_of

    def measured() -> list[dict]:
        return [r for r in reader.variants(compiled.catalog, everything=True) if r["tpot_s"]]

    if not measured():
        low = compiled.folder / "low.yaml"
        done = llmbuild("profile", compiled.recipe, "-t", low, "-C", compiled.catalog)
        assert done.returncode == 0, done.stderr
    return subject_of(compiled.catalog, known_of(compiled.catalog, measured()[0]))


def workers(far: sshd.Far) -> list[int]:
    """Return the processes of the far end."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            told = (folder / "environ").read_bytes()
        except OSError:
            continue
        if f"XDG_CACHE_HOME={far.cache}".encode() in told:
            found.append(int(folder.name))
    return found


def wait_for(happened: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)


def test_the_code_that_is_sent_needs_nothing_that_stays_here(tmp_path: Path) -> None:
    (tmp_path / "code.zip").write_bytes(archive(*MORE_CODE))
    with zipfile.ZipFile(tmp_path / "code.zip") as code:
        code.extractall(tmp_path / "code")
    names = ("profiler.serve", "profiler.worker", "profiler.operators", "carry.packed", "carry.table", "carry.seeded")
    script = f"import sys; sys.path[0] = {str(tmp_path / 'code')!r}\n" + "".join(
        f"import llmbuild.{n}\n" for n in names
    )
    script += "import llmbuild; print(llmbuild.__file__)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.stdout.strip(), done.stderr) == (str(tmp_path / "code" / "llmbuild" / "__init__.py"), "")
