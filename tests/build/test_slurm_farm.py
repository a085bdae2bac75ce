"""A build on Slurm, without Slurm: what jobs ask for, what a lost one becomes, and how a node is held."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmbuild.build import farm
from llmbuild.build.farm import cluster_of, is_cluster
from llmbuild.build.jobs import place_of
from llmbuild.build.request import BuildRequest
from llmbuild.build.slurm_farm import SlurmFarm
from llmbuild.compiler.afar import Gone, Made, Sent
from llmbuild.compiler.calls import Call
from llmbuild.errors import InputError, NothingUsable
from llmbuild.process import slurm
from llmbuild.process.slurm import Asked, Options, asked_of, connected, jobs_folder, python
from llmbuild.process.slurm_jobs import Ended, Jobs, Running, Work, this_node
from llmbuild.profiler.allotted import Allotted
from llmbuild.profiler.remote import Remote
from tests.support.slurms import Slurm

LOOK_S = 0.02


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    """A cluster on this machine."""
    pytest.importorskip("submitit", reason="pip install 'llmbuild[slurm]'")
    return Slurm.on_path(tmp_path / "slurm", monkeypatch)


@pytest.fixture
def jobs(here: Slurm) -> Iterator[Jobs]:
    """The jobs of one build there."""
    made = Jobs(connected(Asked()), LOOK_S)
    yield made
    made.close()


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Jobs]:
    """Jobs of submitit's own executor for this machine."""
    submitit = pytest.importorskip("submitit", reason="pip install 'llmbuild[slurm]'")
    made = Jobs(submitit.AutoExecutor(jobs_folder(str(tmp_path)), "local", local_python=python()), LOOK_S)
    yield made
    made.close()


def work(function: Callable[..., object], *words: object) -> Work:
    return Work(function, words, 60.0, Options())


def sent(tmp_path: Path) -> Sent:
    """Work that a node refuses at once, for its versions."""
    return Sent(Call("iree-compile", tmp_path / "in", (), tmp_path / "out"), b"text", 600.0, True, ("1", "2"))


def test_a_place_on_slurm_is_a_partition_and_options() -> None:
    assert asked_of("slurm") == asked_of("slurm://") == Asked()
    found = asked_of("slurm://cpu,big?devices=gpu&account=ml&cpus=2&mem=8G&gres=gpu:h100:1&constraint=a%26b&lease=90")
    assert found == Asked(
        "cpu,big", devices="gpu", account="ml", cpus=2, mem="8G", gres="gpu:h100:1", constraint="a&b", lease="90"
    )


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("slurm:cpu", "write slurm://"),
        ("slurm://cpu/path", "write slurm://"),
        ("slurm://cpu?nodes=2", "options are devices, account, .*: nodes"),
        ("slurm://cpu?qos=a&qos=b", "one is given twice"),
        ("slurm://cpu?account=", "'' is no value"),
        ("slurm://cpu?constraint=a+b", "'a b' is no value .* is written %2B"),
        ("slurm://c'pu", "is no value"),
        ("slurm://cpu?cpus=0", "cpus is a number from 1, not '0'"),
        ("slurm://cpu?folder=here", "folder is an absolute path"),
        ("slurm://cpu?what", "bad query field"),
    ],
)
def test_another_form_is_refused_with_the_right_one(text: str, why: str) -> None:
    with pytest.raises(InputError, match=why):
        place_of(BuildRequest(on=text))


def test_clusters_are_told_from_machines() -> None:
    assert [is_cluster(text) for text in ("slurm", "slurm://a", "ray", "ssh://slurm", "slurms")] == [
        True,
        True,
        True,
        False,
        False,
    ]


def test_a_compile_asks_for_cpus_and_a_device_for_a_node_of_its_own() -> None:
    asked = Asked("cpu", devices="gpu", account="ml", mem="8G", lease="90")
    compiling = asked.compiling().words()
    assert compiling == ["--partition=cpu", "--account=ml", "--mem=8G", "--no-requeue"]
    probe = asked.measuring("llmbuild_target_h200", gpu=True)
    words = ["--partition=gpu", "--account=ml", "--constraint=llmbuild_target_h200", "--gres=gpu:1"]
    assert probe.words() == [*words, "--mem=0", "--exclusive"]
    assert asked.leasing(probe, "n7").words() == [*words, "--nodelist=n7", "--mem=0", "--time=90", "--exclusive"]
    assert Asked(gres="none", constraint="a100").measuring("x", gpu=True) == Options(
        constraint="a100", gres="none", mem="0", exclusive=True
    )


def test_without_submitit_there_is_one_clear_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"^submitit is not installed: pip install 'llmbuild\[slurm\]'$"):
        place_of(BuildRequest(on="slurm"))


def test_without_slurm_there_is_one_clear_message(here: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    here.keeps_no_account()
    with pytest.raises(
        InputError, match="accounting is needed to watch jobs, and sacct says: Slurm accounting storage"
    ):
        connected(Asked())
    for name in ("sacct", "srun"):
        (here.folder / name).unlink()
    with pytest.raises(InputError, match="no Slurm here: srun, sacct not on PATH"):
        connected(Asked())


def test_a_build_within_a_job_is_no_part_of_that_job(here: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_CONF"):
        monkeypatch.setenv(name, "7")
    Jobs(connected(Asked())).close()
    assert [name for name in os.environ if name.startswith("SLURM_")] == ["SLURM_CONF"]


def test_a_compile_is_a_job_and_its_files_go_with_it(here: Slurm, jobs: Jobs, tmp_path: Path) -> None:
    wait, _ = SlurmFarm(jobs, Asked("cpu", cpus=2, qos="high"), "slurm://cpu").submit(sent(tmp_path))
    made = wait()
    assert made.failure is not None
    assert (made.where, "node n1 has llmbuild" in made.failure.reason) == ("n1", True)
    asked = [line.removeprefix("#SBATCH --") for line in here.script(1) if line.startswith("#SBATCH")]
    wanted = {"job-name=llmbuild", "partition=cpu", "cpus-per-task=2", "qos=high", "no-requeue", "time=12"}
    assert wanted - set(asked) == set()
    assert [name for name in here.files() if name.startswith("1_")] == []
    jobs.close()
    assert here.files() == []


def test_a_lost_node_s_compile_is_submitted_again_but_not_for_ever(here: Slurm, jobs: Jobs, tmp_path: Path) -> None:
    here.fates("NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "NODE_FAIL")
    wait, _ = SlurmFarm(jobs, Asked(), "slurm").submit(sent(tmp_path))
    with pytest.raises(Gone, match=r"Slurm has not compiled it: job 4 ended as NODE_FAIL: slurmstepd: .* JOB 4 ON n1"):
        wait()


def test_a_compile_goes_on_where_its_node_was_not_lost(here: Slurm, jobs: Jobs) -> None:
    here.fates("NODE_FAIL", "")
    assert Running(jobs, work(this_node), 1).wait() == "n1"


@pytest.mark.parametrize("state", ["TIMEOUT", "CANCELLED by 1000", "OUT_OF_MEMORY"])
def test_a_job_that_was_ended_is_not_begun_again(here: Slurm, jobs: Jobs, state: str) -> None:
    here.fates(state)
    with pytest.raises(Ended, match=f"job 1 ended as {state.partition(' ')[0]}: .*{state}"):
        Running(jobs, work(this_node), 3).wait()
    assert len(here.calls("sbatch")) == 1


def test_a_job_that_slurm_refuses_is_told_with_its_reason(here: Slurm, jobs: Jobs, tmp_path: Path) -> None:
    here.refuses("sbatch: error: invalid partition specified: cpu\n")
    with pytest.raises(Gone, match="did not take a job: sbatch: error: invalid partition specified: cpu"):
        SlurmFarm(jobs, Asked("cpu"), "slurm://cpu").submit(sent(tmp_path))
    with pytest.raises(
        InputError, match=r"measure x86-64-v3 on \(--constraint=llmbuild_target_x86-64-v3 .*--until com"
    ):
        SlurmFarm(jobs, Asked(), "slurm").device("x86-64-v3")


def test_who_waits_for_a_cancelled_job_goes_on_and_slurm_is_told(here: Slurm, jobs: Jobs) -> None:
    here.fates("PENDING")
    running = Running(jobs, work(this_node), 3)
    running.cancel()
    with pytest.raises(Ended, match="job 1 was cancelled"):
        running.wait()
    assert here.calls("scancel") == ["1"]


def test_what_still_runs_at_the_end_is_cancelled(here: Slurm, jobs: Jobs) -> None:
    here.fates("PENDING", "PENDING")
    kept = [Running(jobs, work(this_node), 3) for _ in range(2)]
    jobs.close()
    assert (sorted(here.calls("scancel")), len(kept), here.files()) == (["1", "2"], 2, [])


def test_an_interruption_of_who_waits_cancels_the_job(here: Slurm, jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(job: object) -> None:
        raise KeyboardInterrupt

    here.fates("PENDING")
    running = Running(jobs, work(this_node), 3)
    monkeypatch.setattr(jobs, "result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        running.wait()
    assert here.calls("scancel") == ["1"]


def test_submitit_s_own_executor_for_one_machine_does_the_same(local: Jobs, tmp_path: Path) -> None:
    farm = SlurmFarm(local, Asked(), "slurm")
    wait, _ = farm.submit(sent(tmp_path))
    bad = Running(local, work(int, "no number"), 3)
    made: Made = wait()
    assert made.failure is not None
    assert "install the same on all nodes" in made.failure.reason
    with pytest.raises(Ended, match="ended as FINISHED: ValueError: invalid literal for int"):
        bad.wait()


def test_a_node_is_found_once_and_held_only_while_it_is_measured(here: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = farm.Cluster(SlurmFarm(Jobs(connected(Asked()), LOOK_S), Asked("gpu", lease="90"), "slurm://gpu"))
    remote = cluster.remote("x86-64-v3")
    assert remote is cluster.remote("x86-64-v3")
    assert remote.place.destination == "n1 of slurm://gpu"
    try:
        assert remote.machine == remote.machine
        assert remote._connection is None
    finally:
        remote.close()
    words = here.calls("srun")[0].split()
    label = "--constraint=llmbuild_target_x86-64-v3"
    assert {"--nodelist=n1", "--exclusive", label, "--partition=gpu", "--time=90"} - set(words) == set()
    assert {"#SBATCH --exclusive", f"#SBATCH {label}", "#SBATCH --mem=0"} - set(here.script(1)) == set()


def test_a_lease_that_slurm_refuses_is_told_with_its_reason(here: Slurm) -> None:
    here.refuses("srun: error: Unable to allocate resources: Invalid account\n")
    remote = Remote(Allotted("n1 of slurm", leased=True))
    with pytest.raises(NothingUsable, match=r"n1 of slurm: cannot be measured on: srun: error: .* Invalid acc"):
        _ = remote.machine


def test_a_lease_ends_with_who_holds_it_also_where_its_server_does_not(here: Slurm, tmp_path: Path) -> None:
    deaf = tmp_path / "deaf.py"
    deaf.write_text("import time\ntime.sleep(60)\n")
    words = ("srun", "--quiet", sys.executable, str(deaf))
    code = f"from llmbuild.process import keeper; keeper.GRACE_S = 0.1; keeper.main(*{words})"
    front = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    assert front.stdin is not None
    srun = int(_read(here.folder / "srun.pid"))
    front.kill()
    front.wait()
    assert _gone(srun)
    front.stdin.close()


def _read(path: Path) -> str:
    for _ in range(1500):
        if path.is_file() and (text := path.read_text()):
            return text
        time.sleep(0.02)
    raise AssertionError(path)


def _gone(pid: int) -> bool:
    for _ in range(1500):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


def test_a_command_of_the_node_can_be_pasted() -> None:
    place = Allotted("n1 of slurm", options=Options(nodelist="n1", exclusive=True))
    assert place.pasted("true").endswith("--nodelist=n1 --exclusive true")
    assert place.command("print(1)")[-3:] != place.words()


def test_ray_and_slurm_are_two_farms_behind_one_cluster(here: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster_of.cache_clear()
    try:
        place = place_of(BuildRequest(on="slurm://cpu", until="compile"))
        assert isinstance(place.run, farm.Afar)
        assert place.remote("h200") is None
    finally:
        cluster_of.cache_clear()
