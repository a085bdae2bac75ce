"""The searches of a model, exported as studies that Optuna's own tools read."""

from __future__ import annotations

import json
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from llmbuild.runtime import reader
from tests.conftest import Project, llmbuild


@pytest.fixture
def storage(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'study.db'}"


def export(project: Project, storage: str, *options: str) -> list[dict]:
    done = llmbuild("study", "tiny", "--storage", storage, "--json", "-C", project.catalog, *options)
    assert done.returncode == 0, done.stderr
    rows: list[dict] = json.loads(done.stdout)
    return rows


def test_an_exported_study_has_every_trial_with_its_readings(built: Project, storage: str) -> None:
    (row,) = export(built, storage)
    study = optuna.load_study(study_name=row["study"], storage=storage)
    known = {r["variant"]: r for r in reader.variants(built.catalog, everything=True)}
    assert {t.user_attrs["variant"] for t in study.trials} == set(known)
    assert row["added"] == len(known)
    names = row["objectives"].split()
    assert study.metric_names == names
    for trial in study.trials:
        if trial.state == TrialState.COMPLETE:
            found = known[trial.user_attrs["variant"]]
            assert trial.values == [found[name] for name in names]
            assert {name: found["point"][name] for name in trial.params} == trial.params
    assert {t.state for t in study.trials} <= {TrialState.COMPLETE, TrialState.FAIL, TrialState.PRUNED}
    assert study.best_trials


def test_a_second_export_adds_nothing_and_other_objectives_are_refused(built: Project, storage: str) -> None:
    (first,) = export(built, storage, "--objective", "tpot_s")
    (second,) = export(built, storage, "--objective", "tpot_s")
    assert (second["added"], second["known"]) == (0, first["added"])
    done = llmbuild("study", "tiny", "--storage", storage, "--objective", "ttft_s", "-C", built.catalog)
    assert (done.returncode, "has the objectives tpot_s: use another storage" in done.stderr) == (2, True)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("tiny", "--storage", "nonsense"), "--storage nonsense: cannot be used"),
        (("tiny", "--storage", "sqlite:///no/such/folder/s.db"), "cannot be used"),
        (("tiny", "--storage", "sqlite:///s.db", "--objective", "speed"), "--objective speed: no metric; there are"),
        (("other", "--storage", "sqlite:///s.db"), "no model other in"),
        (("tiny", "--storage", "sqlite:///s.db", "-t", "elsewhere"), "no build of tiny on elsewhere in"),
    ],
)
def test_what_cannot_be_exported_is_one_message(
    built: Project, tmp_path: Path, options: tuple[str, ...], told: str
) -> None:
    done = llmbuild("study", *options, "-C", built.catalog, cwd=tmp_path)
    assert (done.returncode, told in done.stderr, "Traceback" in done.stderr) == (2, True, False), done.stderr
    assert not list(tmp_path.iterdir())


def test_a_build_takes_the_sampler_of_its_recipe_and_is_another_one(built: Project, tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(built.recipe.read_text().replace("./", f"{built.folder}/") + "sampler: tpe\n")
    plan = [
        llmbuild("build", "-n", "--json", path, "-C", built.catalog, *more)
        for path, more in (
            (built.recipe, ()),
            (built.recipe, ("--sampler", "tpe")),
            (recipe, ()),
            (built.recipe, ("--sampler", "auto")),
            (built.recipe, ("--sampler", "gp")),
        )
    ]
    searches = [next(r for r in json.loads(done.stdout) if r["step"] == "search")["reason"] for done in plan]
    assert searches == ["", *["changed: knobs, objectives, bounds, seed or sampler"] * 2, "", ""]
