"""Imports of a build start from a process that has imported the libraries, and are those that start alone."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from llmbuild.build import imports
from llmbuild.build.build import Build
from llmbuild.build.events import Event
from llmbuild.build.jobs import job_of
from llmbuild.build.request import BuildRequest
from llmbuild.build.steps import Steps
from llmbuild.catalog.writer import Catalog
from llmbuild.digest import plain
from llmbuild.process import child
from llmbuild.process.child import Limits, python, run
from llmbuild.process.prefork import Prefork
from llmbuild.spec.program import Program
from llmbuild.spec.recipe import Budget
from tests.conftest import Project

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux forks")


@pytest.fixture
def steps(project: Project, tmp_path: Path) -> Iterator[Steps]:
    catalog = Catalog(tmp_path / "catalog")
    steps = Steps(job_of(project.recipe, "host", BuildRequest(dry_run=True)), catalog)
    yield steps
    steps.close()
    catalog.close()


@pytest.fixture
def frontend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Prefork]:
    """What starts the frontend's jobs, for one test."""
    made = Prefork(imports.FRONTEND.preload)
    monkeypatch.setattr(imports, "FRONTEND", made)
    yield made
    made.close()


def test_every_module_that_is_imported_before_is_there() -> None:
    assert [name for name in imports.FRONTEND.preload if importlib.util.find_spec(name) is None] == []


def test_an_import_is_the_same_alone_and_the_server_lives_while_imports_are_to_come(
    steps: Steps, frontend: Prefork, project: Project, tmp_path: Path
) -> None:
    point, running = steps.job.space.default(), [frontend.running]
    steps.imports.expect(point)
    running.append(frontend.running)
    program = steps.import_(point)
    assert isinstance(program, Program), program
    assert frontend.told() == []
    steps.close()
    running.append(frontend.running)
    steps.imports.expect(point)
    running.append(frontend.running)
    Steps(replace(steps.job, force=True), steps.catalog).imports.expect(point)
    running.append(frontend.running)
    assert running == [False, True, False, False, True]

    inputs, job, out = steps.import_inputs(point), tmp_path / "job.json", tmp_path / "out"
    asked = {name: inputs[name] for name in ("context", "batch", "choices", "features")}
    job.write_text(json.dumps({"verb": "import", "model": str(project.model), "out": str(out), **asked}))
    assert run(python("llmbuild.frontend", str(job)), "import", Limits(120), out / "result.json") is None
    assert json.loads((out / "result.json").read_text())["program"] == plain(program)


@pytest.mark.exhaustive
def test_a_build_whose_imports_start_alone_says_so(
    steps: Steps, frontend: Prefork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text("raise ImportError('libx.so: cannot open shared object file')\n")
    monkeypatch.setattr(child, "_folders", ())
    child.look_in([str(tmp_path)])
    monkeypatch.setattr(imports, "FRONTEND", Prefork(["broken"]))
    told: list[Event] = []
    ((_, made),) = Build(steps, Budget(1, 60.0), 0, 1, told.append).import_()
    assert isinstance(made, Program)
    assert [(event.step, event.text.rpartition("imported them: ")[2]) for event in told] == [
        ("note", "ImportError: libx.so: cannot open shared object file")
    ]
