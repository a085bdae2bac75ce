"""What is packed here runs on a machine with a Python and nothing else, and comes back as rows of that machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

from llmbuild import digest
from llmbuild.packed import device_lacks
from llmbuild.runtime import host, reader
from tests.conftest import Project, llmbuild, make_project

SCRIPT = Path(__file__).parents[1] / "scripts" / "gpu_check.py"
WHEELS = ("iree-base-runtime", "numpy")


def gpu_check(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return make_project(tmp_path_factory.mktemp("packing"))


@pytest.fixture(scope="module")
def packed(project: Project) -> Path:
    """A folder with one variant, the profiler's code, and the wheels that are installed here."""
    folder = project.folder / "packed"
    done = gpu_check(project.recipe, "-t", "host", "-o", folder, "-C", project.catalog, "--trials", "1", "--no-wheels")
    assert done.returncode == 0, done.stderr
    assert "1 variants" in done.stdout
    (folder / "wheels").mkdir()
    for name in WHEELS:
        wheel_of(name, folder / "wheels")
    return folder


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
    shutil.copytree(packed, tmp_path / "there")
    done = alone(tmp_path / "there", "--budget", "40")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == host.machine().describe()
    assert lines[1].split()[:3] == ["model", "target", "tpot_ms"]
    assert lines[2].split()[:2] == ["tiny", "host"]
    assert float(lines[2].split()[2]) > 0
    home = tmp_path / "home"
    shutil.copytree(project.catalog, home)
    merged = llmbuild("merge", tmp_path / "there", "-C", home)
    assert merged.returncode == 0, merged.stderr
    asked = llmbuild("query", "-m", "tiny", "--json", "-C", home)
    read = [row for row in json.loads(asked.stdout) if row["tpot_s"]]
    assert [(r["target"], r["machine"], r["status"]) for r in read] == [("host", host.machine().describe(), "pareto")]
    assert read[0]["quality_top1"] == 1.0
    stored = next(r for r in reader.variants(home, "tiny") if r["tpot_s"])
    assert stored["machine_digest"] == digest.of(host.machine())
    assert llmbuild("verify", "-C", home).returncode == 0


def test_what_needs_a_device_that_is_not_here_is_one_message(packed: Path, tmp_path: Path) -> None:
    if not device_lacks("cuda"):
        pytest.skip("this machine has an NVIDIA driver")
    there = tmp_path / "there"
    shutil.copytree(packed, there)
    job = json.loads((there / "job.json").read_text())
    for one in job["jobs"][0]["subjects"]:
        one["subject"]["driver"] = "cuda"
    (there / "job.json").write_text(json.dumps(job))
    done = alone(there)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
    assert "error: nothing was measured: no NVIDIA driver on this machine" in done.stderr


def test_what_does_not_fit_the_budget_is_named(packed: Path, tmp_path: Path) -> None:
    shutil.copytree(packed, tmp_path / "there")
    done = alone(tmp_path / "there", "--budget", "0", "--json")
    assert done.returncode == 1
    assert [row["reason"] for row in json.loads(done.stdout)["rows"]] == ["left out: the time was up"]


def test_a_cpu_that_lacks_features_is_told_before_anything_is_opened(packed: Path, tmp_path: Path) -> None:
    shutil.copytree(packed, tmp_path / "there")
    job = json.loads((tmp_path / "there" / "job.json").read_text())
    job["jobs"][0]["bench"]["target"]["requires"] = ["avx99"]
    (tmp_path / "there" / "job.json").write_text(json.dumps(job))
    done = alone(tmp_path / "there")
    assert (done.returncode, "needs CPU features this host lacks: avx99" in done.stderr) == (1, True)


def test_a_folder_with_something_in_it_is_not_packed_into(packed: Path, project: Project) -> None:
    done = gpu_check(project.recipe, "-t", "host", "-o", packed, "-C", project.catalog, "--no-wheels")
    assert (done.returncode, "is not empty" in done.stderr) == (2, True)
