from __future__ import annotations

import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmbuild.build import race
from llmbuild.build.jobs import jobs_of
from llmbuild.build.request import BuildRequest
from llmbuild.catalog.schema import FILE
from llmbuild.cli import building
from llmbuild.errors import LoadRefused, NoVariant
from llmbuild.frontend.reference import reference_greedy
from llmbuild.profiler.child import Child
from llmbuild.runtime import load, reader
from llmbuild.runtime.model import pick
from llmbuild.spec.trial import USABLE
from tests.conftest import Project, llmbuild, make_project
from tests.support.limits import give_limits


def rows_of(project: Project) -> list[dict]:
    done = llmbuild("query", "--all", "--json", "-C", project.catalog)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_point_zero_is_built_first_and_marked(built: Project) -> None:
    with sqlite3.connect(built.catalog / FILE) as connection:
        first = connection.execute(
            "SELECT v.is_default FROM trial t JOIN variant v ON v.digest = t.variant ORDER BY t.number LIMIT 1"
        ).fetchone()
    assert first == (1,)
    assert [r["default"] for r in rows_of(built)].count(True) == 1


def test_every_variant_is_measured_whole(built: Project) -> None:
    for row in rows_of(built):
        measured = {name: row[name] for name in ("ttft_s", "tpot_s", "output_tokens_per_s", "load_s", "quality_kl")}
        assert all(v is not None and v >= 0 for v in measured.values()), row
        assert row["peak_memory_bytes"] > row["parameter_bytes"] > 0
        assert row["dispatches_per_token"] >= 1
        assert (row["bandwidth_fraction"] is None) == ("limits" in row["notes"])
        low, high = row["intervals"]["tpot_s"]
        assert low <= row["tpot_s"] <= high


def test_energy_is_absent_with_its_reason_or_named_by_its_source(built: Project) -> None:
    for row in rows_of(built):
        assert (row["energy_j_per_token"] is None) == (row["energy_source"] is None)
        assert ("energy" in row["notes"]) == (row["energy_source"] is None)


def test_f32_is_the_f32_model(built: Project) -> None:
    exact = [r for r in rows_of(built) if r["point"]["weight_format"] == "f32" and r["point"]["kv_dtype"] == "f32"]
    assert exact
    assert max(r["quality_kl"] for r in exact) < 1e-6
    assert min(r["quality_top1"] for r in exact) == 1.0


def test_generated_tokens_equal_pytorchs(built: Project) -> None:
    model = load(built.catalog, variant=next(r["variant"] for r in rows_of(built) if r["default"]))
    prompt = model.tokenizer.encode("def push(").ids
    expected = reference_greedy(str(built.model), False, 0, np.asarray(prompt, np.int64), 16)
    assert list(model.tokens(prompt, 16)) == expected.tolist()


def test_text_is_streamed_and_is_what_the_tokens_say(built: Project) -> None:
    model = load(built.catalog, "tiny")
    prompt = model.tokenizer.encode("def push(").ids
    tokens = list(model.tokens(prompt, 12))
    whole = model.tokenizer.decode(prompt + tokens)[len(model.tokenizer.decode(prompt)) :]
    assert "".join(model.generate("def push(", 12)) == whole


def test_generation_ends_with_the_context(built: Project) -> None:
    model = load(built.catalog, "tiny")
    context = model.session.abi.context
    assert len(list(model.tokens([5] * (context - 2), 64))) == 3


def test_one_session_serves_one_prompt_after_another(built: Project) -> None:
    model = load(built.catalog, "tiny")
    first = list(model.tokens([7, 8, 9], 8))
    list(model.tokens([11] * 20, 8))
    assert list(model.tokens([7, 8, 9], 8)) == first


def test_an_unchanged_build_does_nothing_and_says_so(built: Project) -> None:
    before = (built.catalog / FILE).stat().st_size
    done = llmbuild("build", built.recipe, "-C", built.catalog)
    assert (done.returncode, "nothing to do: all 3 trials are up to date" in done.stderr) == (0, True)
    assert (built.catalog / FILE).stat().st_size == before


def test_comments_and_a_moved_project_change_nothing(built: Project, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    subprocess.run(["cp", "-r", built.folder, moved], check=True)
    recipe = moved / built.recipe.name
    recipe.write_text("# said nothing new\n" + recipe.read_text())
    done = llmbuild("build", recipe, "-C", moved / "catalog")
    assert "nothing to do" in done.stderr, done.stderr


def test_a_weight_byte_makes_everything_stale_by_name(built: Project, tmp_path: Path) -> None:
    moved = tmp_path / "changed"
    subprocess.run(["cp", "-r", built.folder, moved], check=True)
    weights = moved / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    done = llmbuild("build", "-n", "--json", moved / built.recipe.name, "-C", moved / "catalog")
    plan = {p["step"]: (p["state"], p["reason"]) for p in json.loads(done.stdout)}
    assert plan["import"] == ("stale", "changed: model")
    assert plan["search"] == ("stale", "changed: model")


def test_a_dry_run_writes_nothing(project: Project, tmp_path: Path) -> None:
    done = llmbuild("build", "-n", project.recipe, "-C", tmp_path / "none")
    assert (done.returncode, "no catalog yet" in done.stdout, (tmp_path / "none").exists()) == (0, True, False)
    opening = r"tiny on host \(.*\): up to 3 trials; some \d+ (s|min), .* of catalog \(no earlier build here: a guess\)"
    assert re.search(opening, done.stderr), done.stderr


def test_more_trials_go_on_from_those_known(built: Project, tmp_path: Path) -> None:
    moved = tmp_path / "more"
    subprocess.run(["cp", "-r", built.folder, moved], check=True)
    done = llmbuild("build", moved / built.recipe.name, "-C", moved / "catalog", "--trials", "4")
    assert "1 trials made" in done.stderr, done.stderr
    opening, *rest = done.stderr.splitlines()
    assert re.fullmatch(r"tiny on .*: 1 of 4 trials to go; some .* of catalog \(from 1 earlier build here\)", opening)
    steps = " ".join(rf"{step} [\d.]+s" for step in ("import", "compile", "check", "measure"))
    assert re.search(rf"\[4/4\] done [\d.]+s  \({steps}\)  .*  some [\d.]+ (s|min) left$", rest[0]), rest[0]
    with sqlite3.connect(moved / "catalog" / FILE) as connection:
        counts = connection.execute("SELECT count(*), count(DISTINCT point) FROM trial").fetchone()
    assert counts == (4, 4)


class Verbs:
    """Counts what workers are asked for, by artifact."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.asked: dict[str, Counter[str]] = defaultdict(Counter)
        self._opened: dict[Child, str] = {}
        ask = Child.ask

        def counted(child: Child, stage: Any, verb: str, **request: Any) -> Any:
            if verb == "open":
                self._opened[child] = Path(request["artifact"]).name
            self.asked[self._opened.get(child, "none")][verb] += 1
            return ask(child, stage, verb, **request)

        patch.setattr(Child, "ask", counted)


def test_what_is_known_is_neither_checked_nor_scored_again(
    built: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = tmp_path / "resumed"
    subprocess.run(["cp", "-r", built.folder, moved], check=True)
    catalog = moved / "catalog"
    before = {row["variant"]: row for row in reader.variants(catalog, everything=True)}
    known = {row["artifact"] for row in before.values()}
    with sqlite3.connect(catalog / FILE) as connection:
        connection.execute("UPDATE build SET raced = 0")  # as if it had been killed in its race
    request = BuildRequest(recipes=(moved / built.recipe.name,), catalog=catalog)

    def build(patch: pytest.MonkeyPatch, **options: Any) -> Verbs:
        verbs = Verbs(patch)
        (make,) = jobs_of(replace(request, **options))
        building.build(make(), replace(request, **options))
        return verbs

    with monkeypatch.context() as patch:
        patch.setattr(race, "FRONT", USABLE)  # whoever survives with these readings
        raced = build(patch)
    assert len(raced.asked) == len(known)
    assert {verb for counts in raced.asked.values() for verb in counts} == {"open", "round", "meter"}
    with monkeypatch.context() as patch:
        extended = build(patch, trials=4, budget_s=1e6)
    new = extended.asked.keys() - known
    assert len(new) == 1
    assert {"check", "quality"} <= set(extended.asked[new.pop()])
    for artifact in known & extended.asked.keys():
        assert set(extended.asked[artifact]) == {"open", "round", "meter"}
    kept = ("quality_kl", "quality_top1", "quality_perplexity", "load_s", "peak_memory_bytes", "dispatches_per_token")
    for row in reader.variants(catalog, everything=True):
        if row["variant"] in before:
            was = before[row["variant"]]
            assert {n: row[n] for n in kept} == {n: was[n] for n in kept}
            assert row["operators"] == was["operators"]
            assert row["notes"]["check"] == was["notes"]["check"]


def test_a_pinned_build_adds_to_what_is_known_and_takes_nothing_away(built: Project, tmp_path: Path) -> None:
    moved = tmp_path / "pinned"
    subprocess.run(["cp", "-r", built.folder, moved], check=True)
    before = {r["variant"] for r in reader.variants(moved / "catalog", everything=True)}
    pins = ["--set", "opt_level=O3", "--set", "weight_format=f32", "--set", "layout=row_major", "--trials", "2"]
    done = llmbuild("build", moved / built.recipe.name, "-C", moved / "catalog", *pins)
    rows = {r["variant"]: r for r in reader.variants(moved / "catalog", everything=True)}
    added = [rows[name] for name in rows.keys() - before]
    assert (before - rows.keys(), {r["point"]["opt_level"] for r in added}) == (set(), {"O3"}), done.stderr
    assert (len(added), len(finished(moved / "catalog"))) == (1, 4)


def test_a_missing_artifact_is_made_again(built: Project, tmp_path: Path) -> None:
    moved = tmp_path / "lost"
    subprocess.run(["cp", "-r", built.folder, moved], check=True)
    artifact = reader.blob_path(moved / "catalog", rows_of(built)[0]["artifact"])
    artifact.unlink()
    done = llmbuild("build", moved / built.recipe.name, "-C", moved / "catalog")
    assert (done.returncode, artifact.is_file()) == (0, True), done.stderr


def test_a_flipped_byte_is_refused_before_anything_is_opened(built: Project, tmp_path: Path) -> None:
    moved = tmp_path / "flipped"
    subprocess.run(["cp", "-r", built.catalog, moved], check=True)
    row = pick(moved, "tiny").chosen
    assert row is not None
    for kind in ("artifact", "parameters"):
        path = reader.blob_path(moved, row[kind])
        good = path.read_bytes()
        path.chmod(0o600)
        path.write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
        with pytest.raises(LoadRefused, match=f"the {kind} was changed"):
            load(moved, "tiny")
        path.write_bytes(good)
    assert load(moved, "tiny").row["variant"] == row["variant"]


def test_an_impossible_slo_ends_with_3_the_nearest_row_and_its_distance(built: Project) -> None:
    done = llmbuild("pick", "--slo", "tpot_s<=1e-9", "--json", "-C", built.catalog)
    told = json.loads(done.stdout)
    assert done.returncode == 3
    assert "the nearest is" in done.stderr
    assert told["distance"] > 1
    assert told["nearest"]["variant"] in {r["variant"] for r in rows_of(built)}
    with pytest.raises(NoVariant):
        load(built.catalog, "tiny", slo=["tpot_s<=1e-9"])


def test_pick_explains_every_row(built: Project) -> None:
    made = pick(built.catalog, "tiny", ["quality_kl<=0.5"], "tpot_s")
    assert len(made.candidates) == 3
    assert all(c.reason or c.row is made.chosen for c in made.candidates)
    assert made.explain().splitlines()[1].startswith("chosen")


def test_run_continues_a_prompt(built: Project) -> None:
    done = llmbuild("run", "tiny", "--prompt", "def push(", "--max-new-tokens", "5", "-C", built.catalog)
    assert (done.returncode, done.stdout.startswith("def push(")) == (0, True), done.stderr


def test_explain_gives_a_command_that_makes_the_same_bytes(built: Project, tmp_path: Path) -> None:
    from llmbuild import digest

    row = rows_of(built)[0]
    done = llmbuild("explain", row["variant"][:12], "-C", built.catalog)
    command = next(line.split(maxsplit=1)[1] for line in done.stdout.splitlines() if line.startswith("compile"))
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert digest.of_file(tmp_path / "out.vmfb") == row["artifact"]


def test_explain_shows_the_time_by_operator(built: Project) -> None:
    row = next(r for r in rows_of(built) if r["default"])
    done = llmbuild("explain", row["variant"], "-C", built.catalog)
    lines = [line.split() for line in done.stdout.splitlines() if " calls " in line]
    assert len(lines) >= 3
    assert [float(x[0].rstrip("%")) for x in lines] == sorted((float(x[0].rstrip("%")) for x in lines), reverse=True)


def test_two_targets_in_one_catalog_stand_apart(built: Project, tmp_path: Path) -> None:
    moved = tmp_path / "two"
    subprocess.run(["cp", "-r", built.folder, moved], check=True)
    v2 = moved / "v2.yaml"
    v2.write_text("backend: llvm-cpu\narch: x86_64\ncpu: x86-64-v2\n")
    done = llmbuild("compile", moved / "tiny.yaml", "-t", v2, "--trials", "1", "--json", "-C", moved / "catalog")
    assert [r["target"] for r in json.loads(done.stdout)] == ["v2"], done.stderr
    measured = llmbuild("profile", moved / "tiny.yaml", "-t", v2, "--json", "-C", moved / "catalog")
    assert [r["target"] for r in json.loads(measured.stdout)] == ["v2"], measured.stderr
    assert {r["target"] for r in reader.variants(moved / "catalog", everything=True)} == {"host", "v2"}


def test_random_init_marks_quality_absent_and_takes_no_real_models_place(built: Project, tmp_path: Path) -> None:
    moved = tmp_path / "random"
    subprocess.run(["cp", "-r", built.folder, moved], check=True)
    options = ["--random-init", "--trials", "1", "--json", "-C", moved / "catalog"]
    done = llmbuild("build", moved / "tiny.yaml", *options)
    rows = json.loads(done.stdout)
    assert [(r["model"], r["quality_kl"]) for r in rows] == [("tiny-random-init", None)], done.stderr
    assert rows[0]["notes"]["quality"] == "absent: random-init weights, speed only"
    assert set(reader.models(moved / "catalog")) == {"tiny", "tiny-random-init"}


def kill_at_random(command: list[str], moment: float) -> bool:
    """Start a build and kill it with everything it started; say whether it was still running."""
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    time.sleep(moment)
    running = child.poll() is None
    child.send_signal(signal.SIGKILL)
    child.wait()
    return running


def finished(catalog: Path) -> dict[str, tuple]:
    if not (catalog / FILE).is_file():
        return {}
    with sqlite3.connect(catalog / FILE) as connection:
        try:
            found = connection.execute("SELECT point, number, variant, created_at FROM trial").fetchall()
        except sqlite3.OperationalError:
            return {}
        assert connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    return {row[0]: row[1:] for row in found}


def test_a_killed_build_keeps_what_was_finished_and_repeats_none_of_it(tmp_path: Path) -> None:
    project = make_project(tmp_path / "killed", num_hidden_layers=1)
    give_limits(project.catalog)
    options = ["--set", "weight_format=f32", "--set", "layout=row_major", "--set", "kv_dtype=f32"]
    command = [sys.executable, "-m", "llmbuild", "build", str(project.recipe), "-C", str(project.catalog), *options]
    chosen, before, kills = random.Random(int.from_bytes(os.urandom(4), "big")), {}, 0
    for _ in range(3):
        kills += kill_at_random(command, chosen.uniform(1.0, 8.0))
        after = finished(project.catalog)
        assert {k: after.get(k) for k in before} == before
        before = after
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    after = finished(project.catalog)
    assert done.returncode == 0, done.stderr
    assert kills >= 1
    assert {k: after[k] for k in before} == before
    assert len(after) == 3


def test_profiling_a_variant_again_keeps_its_quality_and_renews_its_times(built: Project, tmp_path: Path) -> None:
    moved = tmp_path / "again"
    subprocess.run(["cp", "-r", built.catalog, moved], check=True)
    row = next(r for r in rows_of(built) if not r["default"])
    done = llmbuild("profile", row["variant"][:16], "--json", "-C", moved.name, cwd=tmp_path)
    fresh = json.loads(done.stdout)
    assert [r["variant"] for r in fresh] == [row["variant"]], done.stderr
    assert fresh[0]["quality_kl"] == row["quality_kl"]
    assert fresh[0]["intervals"]["tpot_s"] != row["intervals"]["tpot_s"]
