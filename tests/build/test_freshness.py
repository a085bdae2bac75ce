"""What a change of anything does to a build: stale by name where it must be, fresh where it may be, never corrupt."""

from __future__ import annotations

import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from llmbuild.build import plan
from llmbuild.build.freshness import DISPLACED
from llmbuild.build.job import Job
from llmbuild.build.jobs import jobs_of
from llmbuild.build.request import BuildRequest
from llmbuild.catalog.schema import FILE
from llmbuild.catalog.store import BlobStore
from llmbuild.catalog.writer import Catalog
from llmbuild.errors import CatalogError, LoadRefused
from llmbuild.runtime import load, reader
from tests.conftest import Project, llmbuild

FRESH = {"import": "", "compile": "", "profile": "", "search": ""}


@pytest.fixture
def moved(built: Project, tmp_path: Path) -> Project:
    """A copy of the built project in another folder."""
    subprocess.run(["cp", "-r", built.folder, tmp_path / "p"], check=True)
    folder = tmp_path / "p"
    return Project(folder, folder / built.recipe.name, folder / "catalog", folder / "model")


def job_of(project: Project, **options: Any) -> Job:
    (make,) = jobs_of(BuildRequest(recipes=(project.recipe,), **options))
    return make()


def planned(project: Project, job: Job | None = None) -> dict[str, str]:
    """Return the reason of each step; empty is fresh."""
    job = job or job_of(project)
    catalog = Catalog(project.catalog)
    try:
        return {p.step: p.reason for p in plan.plan(job, catalog, job.recipe.budget, 0)}
    finally:
        catalog.close()


def edit(path: Path, change: Callable[[str], str]) -> None:
    before = path.read_text()
    path.write_text(change(before))
    assert path.read_text() != before


def flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)


# --- what changes nothing ----------------------------------------------------------------------------------------


def touch(project: Project) -> None:
    for path in project.folder.rglob("*"):
        os.utime(path)


def comment(project: Project) -> None:
    edit(project.recipe, lambda text: "# nothing new\n" + text.replace("budget:", "\n# nor here\nbudget:"))


def key_order(project: Project) -> None:
    def turned(text: str) -> str:
        head, _, knobs = text.partition("knobs:\n")
        parts = head.split("\nquality:")
        lines = knobs.splitlines()
        return "quality:" + parts[1] + "knobs:\n" + "\n".join(reversed(lines)) + "\n" + parts[0] + "\n"

    edit(project.recipe, turned)


def spaces(project: Project) -> None:
    edit(project.recipe, lambda text: text.replace("{name: short, prompt: 8", "{ prompt:   8,  name:  short"))


def nothing_but_the_place(project: Project) -> None:
    """The project was moved already."""


@pytest.mark.parametrize("change", [nothing_but_the_place, touch, comment, key_order, spaces])
def test_what_decides_nothing_makes_nothing_stale(moved: Project, change: Callable[[Project], None]) -> None:
    change(moved)
    assert planned(moved) == FRESH


# --- what changes something, and what it is called -----------------------------------------------------------------


def weight_byte(project: Project) -> None:
    flip(project.model / "model.safetensors")


def tokenizer(project: Project) -> None:
    edit(project.model / "tokenizer.json", lambda text: text.replace('"version": "1.0"', '"version":  "1.0"'))


def held_out_text(project: Project) -> None:
    edit(project.folder / "heldout.txt", lambda text: text + "more\n")


def workload(project: Project) -> None:
    edit(project.recipe, lambda text: text.replace("output: 8", "output: 9"))


@pytest.mark.parametrize(
    ("change", "field", "fresh"),
    [
        (weight_byte, "model", set()),
        (tokenizer, "tokenizer", {"import", "compile"}),
        (held_out_text, "quality text", {"import", "compile"}),
        (workload, "workloads", {"import", "compile"}),
    ],
)
def test_what_decides_something_makes_that_stale_by_name(
    moved: Project, change: Callable[[Project], None], field: str, fresh: set[str]
) -> None:
    change(moved)
    found = planned(moved)
    assert {step for step, reason in found.items() if not reason} == fresh
    assert found["search"] == f"changed: {field}"


@pytest.mark.parametrize(
    ("changed", "field", "fresh"),
    [
        (lambda j: replace(j, toolchain=replace(j.toolchain, compiler="9.9.9")), "toolchain.compiler", {"import"}),
        (
            lambda j: replace(j, toolchain=replace(j.toolchain, runtime="9.9.9")),
            "toolchain.runtime",
            {"import", "compile"},
        ),
        (lambda j: replace(j, toolchain=replace(j.toolchain, importer="x")), "toolchain.importer", set()),
        (
            lambda j: replace(j, target=replace(j.target, features=(*j.target.features, "+sse9"))),
            "target.features",
            {"import"},
        ),
        (lambda j: replace(j, machine=replace(j.machine, memory_gib=1)), "machine.memory_gib", {"import", "compile"}),
    ],
    ids=["compiler", "runtime", "importer", "CPU features", "machine"],
)
def test_another_tool_or_host_makes_stale_what_depends_on_it(
    moved: Project, changed: Callable[[Job], Job], field: str, fresh: set[str]
) -> None:
    found = planned(moved, changed(job_of(moved)))
    assert {step for step, reason in found.items() if not reason} == fresh
    assert found["search"] == f"changed: {field}"


def test_a_chat_template_makes_nothing_stale_but_what_stands(moved: Project) -> None:
    (moved.model / "chat_template.jinja").write_text("{{ messages }}")
    assert planned(moved) == {**FRESH, "search": DISPLACED}


def test_a_knob_makes_only_the_search_stale(moved: Project) -> None:
    edit(moved.recipe, lambda text: text.replace("opt_level: [O2]", "opt_level: [O2, O3]"))
    assert planned(moved) == {**FRESH, "search": "changed: knobs, objectives, bounds, seed or sampler"}


# --- damage ------------------------------------------------------------------------------------------------------


def artifact_of(project: Project) -> Path:
    row = next(r for r in reader.variants(project.catalog) if r["status"] == "pareto")
    return reader.blob_path(project.catalog, row["artifact"])


def test_a_deleted_artifact_is_missed_and_a_flipped_one_is_noticed_and_never_opened(moved: Project) -> None:
    path = artifact_of(moved)
    flip(path, 100)
    damaged = planned(moved)["search"]
    with pytest.raises(LoadRefused, match="was changed"):
        load(
            moved.catalog,
            "tiny",
            variant=next(r["variant"] for r in reader.variants(moved.catalog) if r["artifact"] == path.name),
        )
    path.unlink()
    assert "1 artifacts are missing or damaged" in damaged
    assert "1 artifacts are missing or damaged" in planned(moved)["search"]


def test_a_flipped_module_is_imported_again_and_never_compiled(moved: Project) -> None:
    program = next(r["program"] for r in reader.variants(moved.catalog, everything=True) if r["default"])
    with reader.opened(moved.catalog) as connection:
        module = connection.execute("SELECT module FROM program WHERE digest = ?", (program,)).fetchone()[0]
    flip(reader.blob_path(moved.catalog, module), 100)
    found = planned(moved)
    assert (found["import"], found["compile"]) == ("never imported", "its program is stale")


def test_a_build_mends_what_is_damaged(moved: Project) -> None:
    path = artifact_of(moved)
    good = path.read_bytes()
    flip(path, 100)
    done = llmbuild("build", moved.recipe, "-C", moved.catalog)
    assert (done.returncode, path.read_bytes() == good) == (0, True), done.stderr
    assert planned(moved) == FRESH


def test_a_full_disk_ends_in_one_message_and_the_next_build_goes_on(moved: Project, tmp_path: Path) -> None:
    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    command = [
        sys.executable,
        "-m",
        "llmbuild",
        "build",
        "--until",
        "import",
        str(moved.recipe),
        "-C",
        str(tmp_path / "c"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=small_files)
    left = [p for p in (tmp_path / "c").rglob("*") if p.name.startswith(".put-")]
    again = llmbuild("build", "--until", "import", "--trials", "1", moved.recipe, "-C", tmp_path / "c")
    assert (done.returncode in (1, 2), "Traceback" in done.stderr, left) == (True, False, []), done.stderr
    assert again.returncode == 0, again.stderr


def killed(code: str, *arguments: str | Path) -> None:
    """Run a script that kills itself with -9."""
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


def test_killed_in_the_middle_of_writing_an_artifact_nothing_is_seen_of_it(moved: Project) -> None:
    code = (
        "import os, shutil, signal, sys; from pathlib import Path; from llmbuild.catalog.store import BlobStore\n"
        "def half(source, out, size):\n    out.write(source.read(500)); out.flush()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "shutil.copyfileobj = half\nBlobStore(Path(sys.argv[1])).put_file(Path(sys.argv[2]))"
    )
    path, copy = artifact_of(moved), moved.folder / "copy.vmfb"
    copy.write_bytes(path.read_bytes())
    path.unlink()
    killed(code, moved.catalog, copy)
    left = [p.name for p in path.parent.iterdir() if p.name.startswith(".put-")]
    assert (path.exists(), len(left), planned(moved)["search"]) == (False, 1, "1 artifacts are missing or damaged")
    assert llmbuild("gc", "-C", moved.catalog).returncode == 0
    assert BlobStore(moved.catalog).put_file(copy) == path.name
    assert (planned(moved), [p for p in path.parent.iterdir() if p.name.startswith(".put-")]) == (FRESH, [])


def test_killed_in_the_middle_of_recording_a_trial_all_or_nothing_of_it_is_there(moved: Project) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from sqlalchemy import text\n"
        "from llmbuild.catalog.writer import Catalog\n"
        "with Catalog(Path(sys.argv[1])).session(write=True) as session:\n"
        "    session.execute(text('DELETE FROM trial')); session.execute(text('DELETE FROM standing'))\n"
        "    session.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed(code, moved.catalog)
    with sqlite3.connect(moved.catalog / FILE) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert planned(moved) == FRESH


def fill_up(catalog: Catalog) -> None:
    """Write to a database that may not grow."""
    row = {"at": "x" * (1 << 20)}
    with catalog.session(write=True) as session:
        pages = session.execute(text("PRAGMA page_count")).scalar()
        session.execute(text(f"PRAGMA max_page_count = {pages}"))
        session.execute(text("INSERT INTO collected VALUES ('a', 1, :at)"), row)


def test_a_full_disk_under_the_database_is_one_message_and_nothing_finished_is_lost(moved: Project) -> None:
    catalog = Catalog(moved.catalog)
    with pytest.raises(CatalogError, match="free some space"):
        fill_up(catalog)
    catalog.close()
    assert planned(moved) == FRESH


def test_of_two_builds_at_once_one_makes_and_the_other_takes(moved: Project, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "llmbuild",
        "build",
        "--until",
        "compile",
        "--trials",
        "1",
        "--json",
        str(moved.recipe),
    ]
    Catalog(tmp_path / "c").close()
    with sqlite3.connect(tmp_path / "c" / FILE) as connection:  # a row that is written twice is one row in the end
        connection.execute("CREATE TABLE written (name TEXT)")
        for name, event in product(("import", "compile"), ("INSERT", "UPDATE")):
            action = f"INSERT INTO written VALUES ('{name}')"
            connection.execute(f'CREATE TRIGGER {event}_{name} AFTER {event} ON "{name}" BEGIN {action}; END')
    both = [
        subprocess.Popen(
            [*command, "-C", str(tmp_path / "c")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    told = [child.communicate(timeout=200) for child in both]
    with reader.opened(tmp_path / "c") as connection:
        written = [name for (name,) in connection.execute("SELECT name FROM written ORDER BY name DESC")]
    made = [json.loads(out)[0]["artifact"] for out, _ in told]
    expected = ["import", "compile", "compile"]  # the whole compile and its last phase have a row each
    assert ([child.returncode for child in both], written, made[0] == made[1]) == ([0, 0], expected, True), told


def test_a_killed_holder_frees_its_lock(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from llmbuild.catalog.writer import Catalog\n"
        "c = Catalog(Path(sys.argv[1]))\n"
        "with c.making('k'):\n    print('held', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    begin = time.monotonic()
    catalog = Catalog(tmp_path)
    with catalog.making("k"):
        pass
    catalog.close()
    assert time.monotonic() - begin < 5


# --- the plan ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    recipe: str
    step: str
    state: str


def test_several_recipes_have_one_plan(built: Project, moved: Project) -> None:
    edit(moved.recipe, lambda text: text.replace("name: tiny", "name: other"))
    done = llmbuild("build", "-n", "--json", built.recipe, moved.recipe, "-C", built.catalog)
    steps = [Step(p["recipe"], p["step"], p["state"]) for p in json.loads(done.stdout)]
    assert [s.recipe for s in steps] == ["tiny"] * 4 + ["other"] * 4
    assert [s.state for s in steps if s.recipe == "tiny"] == ["fresh"] * 4


def test_with_j_several_recipes_and_targets_compile_side_by_side(moved: Project) -> None:
    (moved.folder / "v2.yaml").write_text("backend: llvm-cpu\narch: x86_64\ncpu: x86-64-v2\n")
    (moved.folder / "v3.yaml").write_text("backend: llvm-cpu\narch: x86_64\ncpu: x86-64-v3\n")
    targets = [word for name in ("v2", "v3") for word in ("-t", moved.folder / f"{name}.yaml")]
    given = [moved.recipe, *targets, "--trials", "1", "--json", "-C", moved.catalog]
    side = llmbuild("compile", "-j", "2", *given)
    assert (side.returncode, [r["target"] for r in json.loads(side.stdout)]) == (0, ["v2", "v3"]), side.stderr
    with reader.opened(moved.catalog) as connection:
        rows = connection.execute("SELECT inputs, seconds, created_at FROM compile ORDER BY created_at").fetchall()
    whole = [r for r in rows if "module" in json.loads(r["inputs"])][-2:]  # the last two compiles from a module
    ends = [datetime.fromisoformat(r["created_at"]).timestamp() for r in whole]
    begins = [end - r["seconds"] for end, r in zip(ends, whole, strict=True)]
    assert max(begins) < min(ends)
    assert "2 points of 2 builds, 2 at a time" in side.stderr


def test_explain_gives_keys_and_the_fields_that_changed(moved: Project) -> None:
    weight_byte(moved)
    done = llmbuild("build", "-n", "--explain", "--json", moved.recipe, "-C", moved.catalog)
    steps = json.loads(done.stdout)
    assert list(steps[0]["changed"]) == ["model"]
    was, now = steps[0]["changed"]["model"]
    assert len(was) == len(now) == len(steps[0]["key"]) == 64
    assert was != now


def test_until_stops_every_variant_after_a_step(built: Project, tmp_path: Path) -> None:
    done = llmbuild("build", "--until", "import", "--json", built.recipe, "-C", built.catalog)
    shown = llmbuild("build", "-n", "--until", "compile", "--json", built.recipe, "-C", built.catalog)
    assert all(len(r["program"]) == 64 for r in json.loads(done.stdout)), done.stderr
    assert [p["step"] for p in json.loads(shown.stdout)] == ["import", "compile"]


def test_pins_that_the_recipe_does_not_search_are_told(project: Project) -> None:
    own, foreign = (job_of(project, pins=(("opt_level", level),)).notes for level in ("O2", "O3"))
    assert foreign[: len(own)] == own
    assert foreign[len(own) :] == (
        "the recipe does not search opt_level=O3: only builds that pin them rank these variants, "
        "unless the recipe lists the values under knobs",
    )
