"""What a newcomer types in the first minutes, and what each command answers; all in this process, nothing is built."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click
import pytest

from llmbuild.catalog.writer import Catalog
from llmbuild.cli.main import main
from llmbuild.spec.files.reader import read_recipe

NAMES = sorted(main.commands)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own to stand in, with nothing in it."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("LLMBUILD_CATALOG", raising=False)
    return folder


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Run the command line and return its exit code, stdout and stderr."""
    with pytest.raises(SystemExit) as ended:
        main.main(list(words))
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    code, out, err = said(capsys, *words)
    assert (code, out, "Traceback" in err) == (2, "", False)
    return err


# --- options on either side of the name --------------------------------------------------------------------------


@pytest.mark.parametrize("words", [("-C", "a", "query", "--json"), ("query", "-C", "a", "--json")])
def test_a_catalog_is_named_before_or_behind_the_command(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    Catalog(Path("a")).close()
    assert said(capsys, *words)[:2] == (0, "[]\n")


def test_the_option_before_the_name_is_stronger_than_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Catalog(Path("a")).close()
    monkeypatch.setenv("LLMBUILD_CATALOG", "b")
    assert said(capsys, "-C", "a", "--json", "query")[:2] == (0, "[]\n")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("-C", "a", "query", "-C", "b"), "-C a and -C b are both given"),
        (("query", "-C", "a", "--catalog", "b"), "-C a and -C b are both given"),
        (("--json", "query", "--csv"), "--json and --csv are both given"),
        (("query", "--csv", "--json"), "--csv and --json are both given"),
        (("-C", "a", "diff", "a", "b"), "`llmbuild diff` takes no -C"),
        (("--csv", "explain", "abc"), "`llmbuild explain` takes no --csv"),
    ],
)
def test_two_that_differ_or_one_that_nobody_hears_are_refused(
    words: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told in refused(capsys, *words)


def test_the_same_catalog_may_be_named_twice(capsys: pytest.CaptureFixture[str]) -> None:
    Catalog(Path("a")).close()
    assert said(capsys, "-C", "a", "query", "-C", "a", "--json")[:2] == (0, "[]\n")


@pytest.mark.parametrize("words", [("--debug", "query"), ("query", "--debug")])
def test_debug_is_taken_on_either_side_and_for_one_command_alone(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    from llmbuild.errors import CatalogError

    with pytest.raises(CatalogError):
        main.main(list(words))
    assert "no catalog" in refused(capsys, "query")


# --- arguments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [n for n in NAMES if any(isinstance(p, click.Argument) and p.required for p in main.commands[n].params)]
)
def test_a_missing_argument_says_what_to_give(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert re.search(r"Error: \S.* is missing: .{10}", refused(capsys, name))


@pytest.mark.parametrize("name", ["query", "pick"])
def test_a_model_given_as_an_argument_is_told_its_option(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "unexpected argument 'tiny': a model is named with -m" in refused(capsys, name, "tiny")


def test_a_recipe_by_its_bare_name_is_told_its_file(capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipes").mkdir()
    Path("recipes/tiny.yaml").write_text("")
    assert "did you mean recipes/tiny.yaml?" in refused(capsys, "build", "tiny")
    assert "did you mean recipes/tiny.yaml?" in refused(capsys, "build", "recipes/tny.yaml")


def test_a_models_folder_is_told_a_recipe_that_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path("my: model #1")
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    told = refused(capsys, "build", str(folder))
    Path("written.yaml").write_text(told.partition("at least ")[2])
    assert read_recipe(Path("written.yaml")).model.location == str(folder.resolve())


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("backend: llvm-cpu\narch: x86_64\ncpu: znver4\n", "a target, not a recipe: name it with -t"),
        ("- a list\n", "a recipe is a YAML file, at least {model: "),
        ("", "a recipe is a YAML file, at least {model: "),
    ],
)
def test_a_file_that_is_no_recipe_says_what_one_is(text: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("x.yaml").write_text(text)
    assert told in refused(capsys, "build", "x.yaml")


def test_a_recipe_given_as_a_target_is_told_so(capsys: pytest.CaptureFixture[str]) -> None:
    Path("x.yaml").write_text("model: {huggingface: m}\n")
    assert "a recipe, not a target" in refused(capsys, "targets", "-t", "x.yaml")


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: __import__("os").mkfifo(path)])
def test_what_is_no_regular_file_is_refused_at_once(make: object, capsys: pytest.CaptureFixture[str]) -> None:
    make(Path("odd.yaml"))  # type: ignore[operator]
    assert "not a regular file" in (told := refused(capsys, "build", "odd.yaml")) or "a folder, not a file" in told


# --- empty places ------------------------------------------------------------------------------------------------


def test_recipes_without_a_folder_of_them_says_how_to_name_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert "llmbuild recipes FOLDER" in refused(capsys, "recipes")
    Path("x.yaml").write_text("")
    assert "a file, not a folder" in refused(capsys, "recipes", "x.yaml")


def test_a_folder_without_recipes_says_what_one_is(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(capsys, "recipes", ".")
    assert (code, out, "a recipe is a YAML file" in err) == (0, "", True)
    assert json.loads(said(capsys, "recipes", ".", "--json")[1]) == []


def test_an_empty_catalog_says_what_fills_it(capsys: pytest.CaptureFixture[str]) -> None:
    Catalog(Path("catalog")).close()
    code, out, err = said(capsys, "query")
    assert (code, out, "llmbuild build" in err) == (0, "", True)


def test_help_names_the_exit_codes_and_the_first_commands(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, "-h")
    assert (code, "llmbuild doctor" in out, "130 interrupted" in out, "..." in out.partition("Commands:")[2]) == (
        0,
        True,
        True,
        False,
    )


# --- wrong names -------------------------------------------------------------------------------------------------


@pytest.fixture
def seed(elsewhere: Path) -> Path:
    """A catalog of one model `m` for one target and workload, in the current folder."""
    from tests.support.synthetic import Made, fill

    fill(elsewhere / "seed", [Made("default", "dominated", default=True), Made("fast")])
    return elsewhere / "seed"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("publish", "m"), "m is a model of seed: name a place"),
        (("publish", "m", "x", "out"), "no model x in seed: it has m"),
        (("pick", "-t", "z80"), "it has target host, workload short"),
        (("pick", "--workload", "z80"), "it has target host, workload short"),
        (("pick", "-m", "x"), "it has models m"),
        (("keys", "."), "a folder, not a name"),
        (("keys", ".."), "a folder, not a name"),
        (("pull", "http://["), "http://["),
    ],
)
def test_a_wrong_name_is_told_the_right_ones(
    words: tuple[str, ...], told: str, seed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = () if words[0] in ("keys", "pull") else ("-C", "seed")
    assert told in refused(capsys, *words, *more)
    assert sorted(path.name for path in seed.parent.iterdir()) == ["seed"]


@pytest.mark.parametrize("column", ["model", "target", "workload"])
def test_a_query_that_finds_nothing_says_what_is_there(
    column: str, seed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = said(capsys, "query", f"--{column}", "z80", "-C", "seed")
    assert (code, out, f"no {column} 'z80' in seed: it has " in err) == (0, "", True)


# --- models that cannot be taken ---------------------------------------------------------------------------------


def test_a_model_that_cannot_be_taken_is_told_by_recipes_and_by_a_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    Path("gpt").mkdir()
    Path("gpt/config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}')
    Path("gpt/model.safetensors").write_bytes(b"")
    Path("gpt.yaml").write_text("model: {huggingface: gpt}\nworkloads: [{name: a, prompt: 8, output: 8}]\n")
    state = json.loads(said(capsys, "recipes", ".", "--json")[1])[0]["state"]
    planned = refused(capsys, "build", "gpt.yaml", "-n")
    for told in (state, planned):
        assert "GPT2LMHeadModel" in told and "LlamaForCausalLM" in told and "qwen3" in told


def test_recipes_and_doctor_name_the_architectures(capsys: pytest.CaptureFixture[str]) -> None:
    assert "qwen3 (Qwen3ForCausalLM)" in said(capsys, "recipes", ".")[2]
    rows = {row["check"]: row["found"] for row in json.loads(said(capsys, "doctor", "--json")[1])}
    assert "qwen3 (Qwen3ForCausalLM)" in rows["architectures"]


def test_a_recipe_whose_file_name_is_no_text_asks_for_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    Path("\udcff.yaml").write_text("model: {huggingface: m}\nworkloads: [{name: a, prompt: 8, output: 8}]\n")
    assert "add `name: NAME`" in refused(capsys, "build", "\udcff.yaml", "-n")


@pytest.mark.parametrize(
    "words", [("run", "\udcff"), ("pick", "-m", "\udcff"), ("explain", "\udcff"), ("query", "--slo", "\udcff<=1")]
)
def test_a_text_that_is_no_utf_8_is_refused(
    words: tuple[str, ...], seed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "is no UTF-8 text" in refused(capsys, *words, "-C", "seed")


def test_a_trusted_key_is_a_regular_file(capsys: pytest.CaptureFixture[str]) -> None:
    import os

    os.mkfifo("pipe")
    Path("endless").symlink_to("/dev/zero")
    Path("folder/odd.pub").mkdir(parents=True)
    Path("large").write_bytes(b"x" * 100_000)
    told = {
        name: refused(capsys, "pull", "nowhere", "--trust", name) for name in ("pipe", "endless", "folder", "large")
    }
    assert {name: text.split(": ", 1)[1].strip() for name, text in told.items()} == {
        "pipe": "trusted key pipe: not a regular file",
        "endless": "trusted key endless: not a regular file",
        "folder": "folder: no trusted key there: public keys are files that end in .pub",
        "large": "trusted key large: larger than 65536 bytes, which no key is",
    }
