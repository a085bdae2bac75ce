"""What is packed here runs on a machine with a Python and nothing else, and comes back as rows of that machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.metadata import distribution
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from llmbuild import digest
from llmbuild.carry.pack import _leave_checks
from llmbuild.catalog.schema import FILE
from llmbuild.catalog.writer import Catalog
from llmbuild.process import child
from llmbuild.process.child import Limits
from llmbuild.profiler import wire
from llmbuild.profiler.board_operators import board_operators
from llmbuild.runtime import devices, host, reader
from llmbuild.spec.measurement import Operator
from llmbuild.spec.variant import Failure
from tests.conftest import CHAT, Project, llmbuild, low_copy

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_check.py"
WHEELS = ("iree-base-runtime", "ml-dtypes", "numpy")


def gpu_check(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def project(tiers: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    made = low_copy(tiers, tmp_path_factory.mktemp("packing") / "project")
    (made.model / "chat_template.jinja").write_text(CHAT)
    return made


@pytest.fixture(scope="module")
def packed(project: Project) -> Path:
    """A folder with a variant for each of two targets, the profiler's code, and the wheels that are installed here."""
    folder = project.folder / "packed"
    targets = ["-t", "host", "-t", project.folder / "low.yaml", "--trials", "1"]
    done = gpu_check(project.recipe, *targets, "-o", folder, "-C", project.catalog, "--no-wheels")
    assert done.returncode == 0, done.stderr
    assert "2 variants" in done.stdout
    (folder / "wheels").mkdir()
    for name in WHEELS:
        wheel_of(name, folder / "wheels")
    return folder


def there(packed: Path, folder: Path, change: Callable[[dict], None] = lambda job: None) -> Path:
    """Carry a packed folder to another place, its jobs changed on the way."""
    shutil.copytree(packed, folder / "there")
    path = folder / "there" / "job.json"
    body = json.loads(path.read_text())
    for job in body["jobs"]:
        change(job)
    path.write_text(json.dumps(body))
    return folder / "there"


def shorter(job: dict) -> None:
    job["bench"]["protocol"] |= {"warmup_s": 0.05, "seconds": 0.3, "race_seconds": 1.0}


def wheel_of(name: str, folder: Path) -> None:
    """Make a wheel again of what is installed."""
    found = distribution(name)
    tag = next(line.split()[1] for line in (found.read_text("WHEEL") or "").splitlines() if line.startswith("Tag:"))
    with zipfile.ZipFile(folder / f"{name.replace('-', '_')}-{found.version}-{tag}.whl", "w") as wheel:
        for file in found.files or ():
            if ".." not in file.parts and file.suffix != ".pyc":
                wheel.write(str(found.locate_file(file)), str(file))


def alone(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a packed folder with a bare Python: nothing installed, no environment, and no network where that can be."""
    command = [os.path.realpath(sys.executable), "-I", "-S", str(folder / "run.py"), *arguments]
    for cut in (["unshare", "-n"], ["unshare", "-rn"]):
        if shutil.which("unshare") and subprocess.run([*cut, "true"], capture_output=True, check=False).returncode == 0:
            command = [*cut, *command]
            break
    bare = {"PATH": "/usr/bin:/bin", "HOME": str(folder)}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=200, env=bare, cwd="/")


def test_a_packed_folder_is_measured_alone_and_merged_back(packed: Path, project: Project, tmp_path: Path) -> None:
    away = there(packed, tmp_path, shorter)
    done = alone(away, "--budget", "120")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == host.machine().describe()
    assert lines[1].split()[:4] == ["model", "target", "batch", "tpot_ms"]
    ranked = [line.split() for line in lines[2:4]]
    assert {cells[1] for cells in ranked} == {"host", "low"}
    assert {cells[2] for cells in ranked} == {"1"}
    assert 0 < float(ranked[0][3]) <= float(ranked[1][3])
    assert float(ranked[0][8]) > 0, "the part of the read rate"
    assert lines[4] == "targets in the same rounds:"
    assert lines[5].split()[:3] == ["model", "target", "variant"]
    assert lines[6].endswith("1 [1, 1]")
    steps = [line for line in lines[8:] if line.startswith("a decode step of tiny on ")]
    assert len(steps) == 2, "where each target spends its time"
    home = tmp_path / "home"
    shutil.copytree(project.catalog, home)
    merged = llmbuild("merge", away, "-C", home)
    assert merged.returncode == 0, merged.stderr
    asked = llmbuild("query", "-m", "tiny", "--json", "-C", home)
    read = [row for row in json.loads(asked.stdout) if row["tpot_s"]]
    assert {(r["target"], r["machine"], r["status"]) for r in read} == {
        (target, host.machine().describe(), "pareto") for target in ("host", "low")
    }
    assert {r["quality_top1"] for r in read} == {1.0}
    stored = [r["machine_digest"] for r in reader.variants(home, "tiny") if r["tpot_s"]]
    assert stored == [digest.of(host.machine())] * 2
    assert llmbuild("verify", "-C", home).returncode == 0
    assert llmbuild("merge", away, "-C", tmp_path / "fresh").returncode == 0
    checked = llmbuild("verify", "-C", tmp_path / "fresh")
    assert checked.returncode == 0, checked.stdout
    for folder in (away, home, tmp_path / "fresh"):
        said = llmbuild("run", "tiny", "--chat", "--prompt", "push", "--max-new-tokens", "3", "-C", folder)
        assert said.returncode == 0, said.stderr
        assert len({row["chat"] for row in reader.variants(folder, "tiny", target="host")} - {None}) == 1


def test_check_data_that_was_carried_in_part_is_not_missed_where_a_folder_is_merged(
    packed: Path, project: Project, tmp_path: Path
) -> None:
    away = there(packed, tmp_path)
    with zipfile.ZipFile(away / "blobs.zip") as file:
        file.extractall(away)
    with sqlite3.connect(away / FILE) as connection:
        names = {name for (name,) in connection.execute("SELECT checks FROM program")}
    connection.close()
    for name in names:
        reader.blob_path(away, name).unlink()
    assert llmbuild("verify", "-C", away).returncode == 1, "nothing said that it would not be there"
    catalog = Catalog(project.catalog)
    try:
        _leave_checks(catalog, away, names)
        assert llmbuild("verify", "-C", away).returncode == 1, "it was said to be carried"
        _leave_checks(catalog, away, ())
    finally:
        catalog.close()
    assert llmbuild("merge", away, "-C", tmp_path / "fresh").returncode == 0
    checked = llmbuild("verify", "-C", tmp_path / "fresh")
    assert checked.returncode == 0, checked.stdout


def test_random_weights_are_drawn_where_they_are_measured(project: Project, tmp_path: Path) -> None:
    folder, options = tmp_path / "packed", ["-t", "host", "--trials", "1", "--random-init", "--set", "kernel=compiler"]
    done = gpu_check(project.recipe, *options, "-o", folder, "-C", tmp_path / "catalog", "--no-wheels")
    assert done.returncode == 0, done.stderr
    (drawn,) = re.findall(r"beside 0\.0 MB of weights; ([0-9.]+) MB are drawn from their seed there", done.stdout)
    assert float(drawn) > 0.5
    (folder / "wheels").mkdir()
    for name in WHEELS:
        wheel_of(name, folder / "wheels")
    (job,) = json.loads((folder / "job.json").read_text())["jobs"]
    (weights,) = job["seeded"]
    assert not reader.blob_path(folder, weights).exists()
    other = there(
        folder, tmp_path / "other", lambda job: job["seeded"][weights].update(seed=job["seeded"][weights]["seed"] + 1)
    )
    refused = alone(other, "--budget", "60")
    assert refused.returncode == 1
    assert f"weights drawn here are not {digest.short(weights)}: pack again with the weights" in refused.stderr
    done = alone(there(folder, tmp_path / "same", shorter), "--budget", "60")
    assert done.returncode == 0, done.stderr
    assert digest.of_file(reader.blob_path(tmp_path / "same" / "there", weights)) == weights


def test_what_needs_a_device_that_is_not_here_is_one_message(packed: Path, tmp_path: Path) -> None:
    if not devices.lacks("cuda"):
        pytest.skip("this machine has an NVIDIA driver")

    def on_gpu(job: dict) -> None:
        job["bench"]["target"]["backend"] = "cuda"
        for one in job["subjects"]:
            one["subject"]["driver"] = "cuda"

    done = alone(there(packed, tmp_path, on_gpu))
    assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
    assert "error: nothing was measured: the target is for cuda, and this host has none that runs it" in done.stderr


def test_what_does_not_fit_the_budget_is_named(packed: Path, tmp_path: Path) -> None:
    done = alone(there(packed, tmp_path), "--budget", "0", "--json")
    assert done.returncode == 1
    assert [row["reason"] for row in json.loads(done.stdout)["rows"]] == ["left out: the time was up"] * 2


def test_what_is_still_measured_when_the_time_is_up_is_ended_and_named(packed: Path, tmp_path: Path) -> None:
    folder = there(packed, tmp_path, lambda job: job["bench"]["protocol"].update(warmup_s=120.0))
    begin = monotonic()
    done = alone(folder, "--budget", "4", "--json")
    assert monotonic() - begin < 60
    assert done.returncode == 1
    assert [row["reason"] for row in json.loads(done.stdout)["rows"]] == ["left out: the time was up"] * 2
    with sqlite3.connect(folder / FILE) as connection:
        assert connection.execute("SELECT count(*) FROM failure").fetchone() == (0,)


def test_a_cpu_that_lacks_features_is_told_before_anything_is_opened(packed: Path, tmp_path: Path) -> None:
    done = alone(there(packed, tmp_path, lambda job: job["bench"]["target"].update(requires=["avx99"])))
    assert (done.returncode, "needs CPU features this host lacks: avx99" in done.stderr) == (1, True)


def test_a_folder_with_something_in_it_is_not_packed_into(packed: Path, project: Project) -> None:
    done = gpu_check(project.recipe, "-t", "host", "-o", packed, "-C", project.catalog, "--no-wheels")
    assert (done.returncode, "is not empty" in done.stderr) == (2, True)


def test_pytorch_is_timed_on_the_models_own_shape(packed: Path, project: Project, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    (shape,) = {json.dumps(job["shape"]) for job in json.loads((packed / "job.json").read_text())["jobs"]}
    peer = import_module_from(packed / "torch_peer.py")
    stored = sum(tensor.size for tensor in load_file(project.model / "model.safetensors").values())
    assert stored == sum(p.numel() for p in peer.Model(json.loads(shape), 32).parameters())
    (tmp_path / "shape.json").write_text(shape)
    script = [sys.executable, packed / "torch_peer.py", tmp_path / "shape.json", "8", "8", "--seconds", "0.1"]
    plainly = {**os.environ, "TORCH_COMPILE_DISABLE": "1"}
    done = subprocess.run(
        [*script, "--batch", "1", "--batch", "8"], capture_output=True, text=True, check=False, env=plainly, timeout=100
    )
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(one["batch"], one["runtime"].split()[2]) for one in told] == [
        (batch, mode) for batch in (1, 8) for mode in ("eager", "compiled")
    ], done.stderr
    assert all(one["tpot_s"] > 0 and one["ttft_s"] > 0 for one in told)
    assert all(one["tokens"] == one["answers"] * 8 * one["batch"] for one in told)


def test_a_sequence_of_pytorch_is_the_same_alone_and_beside_others(packed: Path) -> None:
    import torch

    (shape,) = {json.dumps(job["shape"]) for job in json.loads((packed / "job.json").read_text())["jobs"]}
    peer, taken = import_module_from(packed / "torch_peer.py"), {}
    for batch in (1, 8):
        torch.manual_seed(0)
        model = peer.Model(json.loads(shape), 24, batch).eval()
        with torch.inference_mode():
            peer.Contender(model, False, batch, 16, 8).answer(kept := [])
        taken[batch] = kept
    assert [len(step) for step in taken[8]] == [8] * 8
    assert [step[0] for step in taken[8]] == [step[0] for step in taken[1]]
    assert len({tuple(step[row] for step in taken[8]) for row in range(8)}) > 1, "sequences differ"


FAKE_TORCH = """
from types import SimpleNamespace
cuda = SimpleNamespace(is_available=lambda: {gpu})
zeros = lambda *_, device: None
class profile:
    def __init__(self, activities): pass
    def __enter__(self): return self
    def __exit__(self, *_): pass
    def key_averages(self):
        row = SimpleNamespace(key="decode$async_dispatch_3_matmul", count=20, self_device_time_total=5000.0)
        return [row, SimpleNamespace(key="cudaLaunchKernel", count=20, self_device_time_total=0.0)]
ProfilerActivity = SimpleNamespace(CUDA=1)
"""


@pytest.mark.parametrize("gpu", [True, False])
def test_kernels_of_a_step_are_read_off_pytorchs_profiler(
    packed: Path, tmp_path: Path, gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(FAKE_TORCH.format(gpu=gpu))
    (tmp_path / "torch" / "profiler.py").write_text("from torch import ProfilerActivity, profile")
    monkeypatch.setattr(child, "_folders", (str(tmp_path),))  # as `run.py` does with what a folder brings along
    (body,) = (b for b in json.loads((packed / "job.json").read_text())["jobs"] if b["target"] == "host")
    with zipfile.ZipFile(packed / "blobs.zip") as blobs:
        blobs.extractall(tmp_path)

    def where(name: str) -> Path:
        return next(path for folder in (tmp_path, packed) if (path := reader.blob_path(folder, name)).is_file())

    subject = wire.subject_of(body["subjects"][0]["subject"], where)
    found = board_operators(subject, packed / "torch_kernels.py", Limits(seconds=60))
    if gpu:
        assert found == (Operator("matmul", 2, pytest.approx(5e-4)),)
    else:
        assert isinstance(found, Failure) and "PyTorch here sees no GPU" in found.reason


def import_module_from(path: Path) -> Any:
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
