from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import Project, llmbuild, make_project

COMMANDS = ("build", "compile", "profile", "query", "pick", "run", "explain", "recipes", "targets", "doctor")
COMMANDS += ("verify", "gc", "diff", "merge", "publish", "pull", "keys")
README = Path(__file__).parents[2] / "README.md"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_stands_in_the_readme(command: str) -> None:
    done = llmbuild(command, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("Usage:")
    assert f"llmbuild {command}" in README.read_text()


def refused(*arguments: str | Path, code: int = 2, **env: str) -> str:
    done = llmbuild(*arguments, **env)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done.stderr


def edited(project: Project, folder: Path, old: str, new: str) -> Path:
    path = folder / "edited.yaml"
    text = (
        project.recipe.read_text()
        .replace("./model", str(project.model))
        .replace("./heldout", f"{project.folder}/heldout")
    )
    assert old in text
    path.write_text(text.replace(old, new))
    return path


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    assert "no such file" in refused("build", tmp_path / "none.yaml", "-C", tmp_path / "c")


def test_a_model_folder_that_is_not_there(project: Project, tmp_path: Path) -> None:
    path = edited(project, tmp_path, str(project.model), str(tmp_path / "nowhere"))
    assert f"{tmp_path / 'nowhere'}: no such model folder" in refused("build", path, "-C", tmp_path / "c")


def test_a_model_without_weights_says_what_would_build(project: Project, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((project.model / "config.json").read_text())
    path = edited(project, tmp_path, str(project.model), str(bare))
    assert "--random-init" in refused("build", path, "-C", tmp_path / "c")


def test_truncated_weights(project: Project, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    subprocess.run(["cp", "-r", project.model, cut], check=True)
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    path = edited(project, tmp_path, str(project.model), str(cut))
    assert "weights are truncated or corrupt" in refused("build", path, "-C", tmp_path / "c")


def test_an_architecture_we_cannot_take(project: Project, tmp_path: Path) -> None:
    other = tmp_path / "other"
    subprocess.run(["cp", "-r", project.model, other], check=True)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(
        json.dumps({**config, "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"})
    )
    path = edited(project, tmp_path, str(project.model), str(other))
    told = refused("build", path, "-C", tmp_path / "c")
    assert "GPT2LMHeadModel" in told
    assert "LlamaForCausalLM" in told


def test_a_target_this_host_cannot_run(project: Project, tmp_path: Path) -> None:
    target = tmp_path / "arm.yaml"
    target.write_text("backend: llvm-cpu\narch: aarch64\ncpu: cortex-a76\n")
    told = refused("build", project.recipe, "-t", target, "-C", tmp_path / "c")
    assert "cannot run on this host" in told
    assert "llmbuild compile" in told


def test_an_unknown_target_lists_those_there_are(project: Project, tmp_path: Path) -> None:
    told = refused("build", project.recipe, "-t", "z80", "-C", tmp_path / "c")
    assert "there are host, " in told and "x86-64-v3" in told


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--set", "opt_level"), "write KNOB=VALUE"),
        (("--set", "opt_level=O9"), "choose from O0, O1, O2, O3"),
        (("--set", "speed=9"), "unknown knob 'speed'"),
        (("--budget", "soon"), "not a duration"),
        (("--trials", "0"), "--trials"),
    ],
)
def test_options_that_make_no_sense(project: Project, tmp_path: Path, options: tuple[str, ...], told: str) -> None:
    assert told in refused("build", project.recipe, "-C", tmp_path / "c", *options)


def test_a_catalog_below_a_file_cannot_be_made(project: Project, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "the catalog cannot be used" in refused("build", project.recipe, "-C", tmp_path / "file" / "c")


def test_asking_an_absent_catalog(tmp_path: Path) -> None:
    for command in (("query",), ("pick",), ("run", "m"), ("explain", "abcdef")):
        assert "no catalog at" in refused(*command, "-C", tmp_path / "none")


def test_an_unknown_model_variant_or_metric(built: Project) -> None:
    assert "it has models tiny" in refused("pick", "-m", "other", "-C", built.catalog)
    assert "no variant 'ffffffff'" in refused("explain", "ffffffff", "-C", built.catalog)
    assert "unknown metric 'speed'" in refused("query", "--slo", "speed<=1", "-C", built.catalog)


def test_the_catalog_is_named_by_option_then_environment(built: Project, tmp_path: Path) -> None:
    by_env = llmbuild("query", "--json", cwd=tmp_path, LLMBUILD_CATALOG=str(built.catalog))
    assert json.loads(by_env.stdout) == json.loads(llmbuild("query", "--json", "-C", built.catalog).stdout)
    assert llmbuild("query", cwd=tmp_path).returncode == 2


def test_json_and_csv_hold_the_same_rows(built: Project) -> None:
    import csv
    import io

    rows = json.loads(llmbuild("query", "--json", "--all", "-C", built.catalog).stdout)
    lines = list(csv.DictReader(io.StringIO(llmbuild("query", "--csv", "--all", "-C", built.catalog).stdout)))
    assert [r["variant"] for r in rows] == [line["variant"] for line in lines]
    assert [r["tpot_s"] for r in rows] == [float(line["tpot_s"]) for line in lines]


def test_query_filters_and_sorts(built: Project) -> None:
    rows = json.loads(
        llmbuild("query", "--json", "--all", "--objective", "parameter_bytes", "-C", built.catalog).stdout
    )
    sizes = [r["parameter_bytes"] for r in rows]
    few = json.loads(
        llmbuild("query", "--json", "--all", "--slo", f"parameter_bytes<={sizes[0]}", "-C", built.catalog).stdout
    )
    assert sizes == sorted(sizes)
    assert [r["parameter_bytes"] for r in few] == [s for s in sizes if s == sizes[0]]


def test_listings(project: Project) -> None:
    recipes = json.loads(llmbuild("recipes", project.folder, "--json").stdout)
    targets = {t["target"]: t for t in json.loads(llmbuild("targets", "--json").stdout)}
    knobs = {k["knob"]: k["level"] for k in json.loads(llmbuild("targets", "--knobs", "--json").stdout)}
    assert [(r["model"], r["state"]) for r in recipes] == [("tiny", "ok")]
    assert (targets["host"]["compiles"], targets["host"]["runs"]) == ("yes", "yes")
    assert set(knobs.values()) == {"A model", "B code generation", "C run time", "excluded"}


def test_doctor_finds_nothing_wrong_here(built: Project) -> None:
    done = llmbuild("doctor", "--json", "-C", built.catalog)
    rows = {r["check"]: r["state"] for r in json.loads(done.stdout)}
    assert (done.returncode, rows["catalog"], rows["compiler and runtime"]) == (0, "ok", "ok")


def test_debug_shows_the_traceback_and_nothing_else_does(tmp_path: Path) -> None:
    assert "Traceback" in llmbuild("--debug", "build", tmp_path / "none.yaml").stderr
    assert "Traceback" not in llmbuild("build", tmp_path / "none.yaml").stderr


def test_an_interruption_ends_with_130_and_leaves_no_child(tmp_path: Path) -> None:
    project = make_project(tmp_path / "p")
    command = [sys.executable, "-m", "llmbuild", "build", str(project.recipe), "-C", str(project.catalog)]
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    time.sleep(4)
    child.send_signal(signal.SIGINT)
    _, told = child.communicate(timeout=30)
    left = subprocess.run(["pgrep", "-f", str(project.catalog)], capture_output=True, text=True).stdout.split()
    assert (child.returncode, "Traceback" in told) == (130, False), told
    assert [pid for pid in left if pid != str(os.getpid())] == []


def test_with_k_the_other_recipes_are_still_built(built: Project, tmp_path: Path) -> None:
    done = llmbuild("build", "-k", tmp_path / "none.yaml", built.recipe, "-C", built.catalog)
    assert (done.returncode, "no such file" in done.stderr, "nothing to do" in done.stderr) == (2, True, True)
