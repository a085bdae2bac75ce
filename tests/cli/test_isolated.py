"""Nothing that lies in the caller's folder, or that the environment's Python variables name, is run by a command."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmbuild.cli.main import main
from llmbuild.process import child
from llmbuild.process.child import Limits, python, run
from llmbuild.runtime import reader
from tests.conftest import Project
from tests.support import marked
from tests.support.limits import give_limits

SCRIPT = Path(sys.executable).with_name("llmbuild")
FLEET = Path(__file__).parents[2] / "recipes" / "fleets" / "cpus.yaml"
IN_CHILDREN = {"PYTHONPATH": "{0}", "PYTHONSTARTUP": "{0}/json.py", "PYTHONHOME": "/nowhere", "PYTHONWARNINGS": "error"}


@pytest.fixture(scope="module")
def trap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trap")
    return marked.fill(folder / "here", folder / "log")


@pytest.fixture
def untouched(trap: Path) -> Iterator[Path]:
    yield trap
    log = trap.parent / "log"
    assert not log.exists(), f"files of the caller's folder were run: {sorted(set(log.read_text().split()))}"


def made_here(folder: Path) -> Path:
    """Write a fleet of this machine."""
    text = (FLEET.parent / "local.yaml").read_text().replace("pystdlib", "tiny").replace("count: 2", "count: 1")
    path = folder / "here.yaml"
    path.write_text(text.replace("[[0], [1]]", f"[[{min(os.sched_getaffinity(0))}]]").replace("rate: 30", "rate: 0.1"))
    return path


def lines(built: Project, out: Path) -> dict[str, list[str]]:
    """Return a call of every command; those that build and measure do so."""
    variant = reader.variants(built.catalog, "tiny")[0]["variant"]
    recipe, catalog = str(built.recipe), ["-C", str(built.catalog)]
    return {
        "build": [recipe, "--trials", "1", "-C", str(out / "new")],
        "compile": [recipe, "--trials", "1", "-C", str(out / "new")],
        "profile": [variant, *catalog],
        "tune": ["0123", *catalog],
        "query": catalog,
        "pick": catalog,
        "run": ["tiny", "--max-new-tokens", "1", *catalog],
        "serve": ["tiny", "--host", "192.0.2.1", "--port", "0", *catalog],  # no address of this host: it ends
        "explain": [variant, *catalog],
        "recipes": [str(built.folder)],
        "targets": ["-t", "host", "--probe", *catalog],
        "doctor": catalog,
        "verify": catalog,
        "gc": ["-n", *catalog],
        "diff": [str(built.catalog), str(built.catalog)],
        "merge": [str(built.catalog), "-C", str(out / "merged")],
        "publish": [str(out / "published"), *catalog],
        "pull": [str(out / "published"), "-C", str(out / "pulled")],
        "study": ["tiny", "--storage", f"sqlite:///{out / 'study.db'}", *catalog],
        "keys": [str(out / "mine")],
        "convert": ["vllm", "vllm serve org/name"],
        "plan": [str(FLEET)],
        "nodes": [str(made_here(out)), *catalog],
        "orchestrate": [str(made_here(out)), "-n", *catalog],
        "simulate": [str(FLEET), "--trace", "steady", "--policy", "static-mean", "--seconds", "5", "--seeds", "1"],
    }


def test_no_command_runs_what_lies_in_the_callers_folder(built: Project, untouched: Path, tmp_path: Path) -> None:
    asked = lines(built, tmp_path)
    give_limits(tmp_path / "new")
    assert set(main.commands) <= set(asked), "every command is tried"
    env = {**os.environ, "PATH": f"{os.pathsep}.{os.pathsep}{os.environ['PATH']}"}
    codes = {}
    for command in asked:
        done = subprocess.run(
            [SCRIPT, command, *asked[command]], cwd=untouched, env=env, capture_output=True, text=True, check=False
        )
        codes[command] = done.returncode if "Traceback" not in done.stderr else done.stderr
    assert codes == dict.fromkeys(asked, 0) | {"tune": 2, "serve": 2, "doctor": codes["doctor"]}


def test_a_child_imports_by_no_variable_of_the_environment(
    untouched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in IN_CHILDREN.items():
        monkeypatch.setenv(name, text.format(untouched))
    monkeypatch.chdir(untouched)
    script, out = tmp_path / "told.py", tmp_path / "told.json"
    script.write_text(
        "import json, llmbuild.digest, os, sys\n"
        "told = [os.getcwd(), [n for n in os.environ if n.startswith('PYTHON')], sys.argv[1:]]\n"
        f"open({str(out)!r}, 'w').write(json.dumps(told))\n"
    )
    assert run(python(str(script), "a b"), "import", Limits(60), out) is None
    assert json.loads(out.read_text()) == ["/", [], ["a b"]]


def test_a_pasted_command_finds_this_very_package(untouched: Path) -> None:
    line = shlex.join(python("llmbuild.frontend"))
    done = subprocess.run(
        line, shell=True, cwd=untouched, capture_output=True, text=True, check=False, env={"PATH": ""}
    )
    assert (done.returncode, done.stderr) == (2, "usage: python -m llmbuild.frontend JOB.json\n")


def test_libraries_of_a_packed_folder_are_named_to_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "brought.py").write_text("import sys\nopen(sys.argv[1], 'w').write('here')\n")
    monkeypatch.setattr(child, "_folders", ())
    child.look_in([str(tmp_path)])
    assert run(python("brought", str(tmp_path / "out")), "import", Limits(60), tmp_path / "out") is None


def test_a_program_is_never_looked_for_in_a_folder_that_depends_on_where_we_are(
    untouched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(untouched)
    monkeypatch.setenv("PATH", f"{os.pathsep}.{os.pathsep}bin{os.pathsep}/usr/bin{os.pathsep}/bin")
    assert Path(child.program("sh")).is_absolute()
    assert child.program("iree-opt") == "iree-opt"
