from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmbuild import digest
from llmbuild.errors import InputError
from llmbuild.spec.files.reader import read_recipe, read_target, seconds
from llmbuild.spec.recipe import Calibration, ModelSource, Text

GOOD = "model: {huggingface: ./m}\nworkloads:\n  - {name: w, prompt: 4, output: 4}\n"


def recipe_error(folder: Path, text: str) -> str:
    path = folder / "r.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        read_recipe(path)
    return str(error.value).replace(str(path), "r.yaml")


def test_shipped_recipes_and_targets_are_read() -> None:
    root = Path(__file__).parents[2]
    assert [p.stem for p in sorted((root / "recipes").glob("*.yaml"))] == [
        read_recipe(p).name for p in sorted((root / "recipes").glob("*.yaml"))
    ]
    assert all(read_target(p).backend for p in (root / "targets").glob("*.yaml"))


def test_unknown_key_is_told_with_line_and_path(tmp_path: Path) -> None:
    assert recipe_error(tmp_path, GOOD + "objectivs: [tpot_s]\n") == "r.yaml:4 $.objectivs: unknown key"
    nested = "model: {huggingface: ./m}\nworkloads:\n  - name: w\n    prompt: 4\n    output: 4\n    promt: 4\n"
    assert recipe_error(tmp_path, nested) == "r.yaml:6 $.workloads[0].promt: unknown key"


def test_duplicate_key_is_told_with_line(tmp_path: Path) -> None:
    assert recipe_error(tmp_path, GOOD + "model: {huggingface: ./n}\n").startswith("r.yaml:4 duplicate key 'model'")


def test_every_fault_is_told_at_once(tmp_path: Path) -> None:
    told = recipe_error(tmp_path, "model: {}\nworkloads:\n  - {name: w, prompt: 0, output: 4}\nbudget: {time: soon}\n")
    assert [line.split(":")[1].split(" ")[0] for line in told.splitlines()] == ["1", "3", "4"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "a mapping of keys is expected"),
        ("- a\n- b\n", "a mapping of keys is expected"),
        ("model: [", "not YAML"),
        (GOOD + "objectives: [speed]\n", "unknown metric 'speed'"),
        (GOOD + "constraints: [fast]\n", "cannot read the SLO 'fast'"),
        (
            "model: {huggingface: ./m}\nworkloads:\n  - {name: w, prompt: 4, output: 4, context: 5}\n",
            "smaller than prompt",
        ),
        (
            "model: {huggingface: ./m}\nworkloads:\n  - {name: w, prompt: 4, output: 4, batch: 8}\n"
            "  - {name: v, prompt: 4, output: 4}\n",
            "batches of [1, 8]: an artifact has one; write a recipe for each",
        ),
    ],
)
def test_bad_recipe_is_told(tmp_path: Path, text: str, told: str) -> None:
    assert told in recipe_error(tmp_path, text)


WORK = "workloads:\n  - {name: w, prompt: 4, output: 4}\n"


@pytest.mark.parametrize(
    ("place", "location"),
    [
        ("m.gguf", "{folder}/m.gguf"),
        ("./models/blob", "{folder}/models/blob"),
        ("/models/m.gguf", "/models/m.gguf"),
        ("package:some_models/sub/m.gguf", "package:some_models/sub/m.gguf"),
    ],
)
def test_a_gguf_file_is_a_source_of_a_model(tmp_path: Path, place: str, location: str) -> None:
    (tmp_path / "r.yaml").write_text(f"model: {{gguf: '{place}', random_init: true, seed: 7}}\n{WORK}")
    wanted = ModelSource("gguf", location.format(folder=tmp_path), True, 7)
    assert read_recipe(tmp_path / "r.yaml").model == wanted


@pytest.mark.parametrize(
    "place", ["package:", "package:m.gguf", "package:a/", "package:a.b/m.gguf", "package:a/../m.gguf"]
)
def test_a_file_of_no_package_is_told(tmp_path: Path, place: str) -> None:
    told = recipe_error(tmp_path, f"model: {{gguf: '{place}'}}\n{WORK}")
    assert told == f"r.yaml:1 $.model.gguf: '{place}' names no file of a Python package: write package:NAME/FILE"


@pytest.mark.parametrize("model", ["{}", "{huggingface: m, gguf: m.gguf}", "{gguf: ''}"])
def test_a_model_has_one_source(tmp_path: Path, model: str) -> None:
    told = recipe_error(tmp_path, f"model: {model}\n{WORK}")
    assert told == "r.yaml:1 $.model: name either `huggingface`, a folder or hub id, or `gguf`, a file"


def test_a_gguf_file_that_is_named_as_a_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").touch()
    told = recipe_error(tmp_path, f"model:\n  huggingface: m.gguf\n{WORK}")
    assert told == f"r.yaml:2 $.model.huggingface: {tmp_path / 'm.gguf'} is a GGUF file: name it with `gguf`"


def test_comments_order_and_spaces_change_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("name: r\n" + GOOD)
    (tmp_path / "b.yaml").write_text(
        "# a comment\nworkloads:\n  - {output: 4,   name: w, prompt: 4}\nmodel:\n  huggingface: ./m  # here\nname: r\n"
    )
    assert digest.of(read_recipe(tmp_path / "a.yaml")) == digest.of(read_recipe(tmp_path / "b.yaml"))


@pytest.mark.parametrize(
    ("quality", "bounds"),
    [
        ("", []),
        ("quality: {tokens: 64}", []),
        ("quality: {text: {stdlib: [ast]}}", ["quality_kl<=0.05", "quality_top1>=0.9"]),
        ("quality: {text: {stdlib: [ast]}, bounds: []}", []),
        ("quality: {text: {stdlib: [ast]}, bounds: [quality_kl<=1]}", ["quality_kl<=1"]),
    ],
)
def test_a_text_to_score_is_a_gate_unless_the_recipe_says_otherwise(
    tmp_path: Path, quality: str, bounds: list[str]
) -> None:
    (tmp_path / "r.yaml").write_text(GOOD + quality)
    assert [str(bound) for bound in read_recipe(tmp_path / "r.yaml").quality.bounds] == bounds


@pytest.mark.parametrize(("text", "expected"), [("90", 90), ("90s", 90), ("20m", 1200), ("1.5h", 5400), (30, 30)])
def test_durations(text: object, expected: float) -> None:
    assert seconds(text) == expected


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode) | st.just(GOOD.encode()))
def test_no_bytes_make_the_reader_fail_in_another_way(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "fuzz.yaml"
    path.write_bytes(data)
    try:
        actual = read_recipe(path).name
    except InputError:
        actual = "fuzz"
    assert actual == "fuzz"


def test_calibration_text_is_read_and_its_file_lies_beside_the_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(GOOD + "calibration: {text: {file: some.txt}, tokens: 64}\n")
    assert read_recipe(recipe).calibration == Calibration((Text(files=(str(tmp_path / "some.txt"),)),), 64)
    recipe.write_text(GOOD + "calibration: {text: {file: [some.txt, more.txt]}}\n")
    two = (str(tmp_path / "some.txt"), str(tmp_path / "more.txt"))
    assert read_recipe(recipe).calibration == Calibration((Text(files=two),), 4096)
    recipe.write_text(GOOD + "calibration: {text: {stdlib: [ast]}}\n")
    assert read_recipe(recipe).calibration == Calibration((Text(("ast",)),), 4096)
    recipe.write_text(GOOD + "calibration: {tokens: 64}\n")
    with pytest.raises(InputError, match=r"\$.calibration.text: this key is missing"):
        read_recipe(recipe)
