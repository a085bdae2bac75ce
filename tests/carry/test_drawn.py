"""Random weights that numpy draws alike everywhere, and archives that are made of them again."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbuild import digest
from llmbuild.carry.seeded import put_together, take_apart
from llmbuild.frontend import huggingface
from llmbuild.frontend.program import import_model
from llmbuild.spec.program import PARAMETERS_FILE, ImportJob
from llmbuild.transform import drawn
from llmbuild.transform.drawn import draw, draw_rows
from tests.support import tiny


def test_a_seed_and_a_name_give_these_bits_on_every_machine() -> None:
    found = draw(3, "model.norm", (2, 2), 0.5)
    assert found.dtype == np.float32
    assert found.view(np.uint32).tolist() == [[1032915006, 1058391656], [3201723875, 1058627326]]


def test_numbers_behind_the_first_part_are_the_same_on_every_machine_too() -> None:
    found = draw(6, "y", (300, 1001), 0.5)
    assert found.size > drawn.AT_ONCE
    assert digest.of_bytes(found.astype("<f4").tobytes())[:16] == "2db54119b6e4912a"


@settings(max_examples=60)
@given(st.integers(1, 40), st.lists(st.integers(1, 12), max_size=2), st.data())
def test_rows_are_drawn_without_those_before_them(rows: int, more: list[int], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, rows))
    stop = data.draw(st.integers(start, rows))
    shape = (rows, *more)
    with patch.object(drawn, "AT_ONCE", data.draw(st.sampled_from((4, 8, 40, 1 << 18)))):
        found = draw_rows(3, "a matrix", shape, 0.1, start, stop)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, draw(3, "a matrix", shape, 0.1)[start:stop])


def test_drawn_weights_are_about_normal_and_differ_by_name_and_seed() -> None:
    found = draw(0, "a", (256, 256), 0.02)
    assert found.std() == pytest.approx(0.02, rel=0.01)
    assert abs(found.mean()) < 3e-4
    assert 3.2 < np.abs(found).max() / 0.02 < 3.5, "four numbers of 16 bits reach 3.46 standard deviations"
    assert not np.array_equal(found, draw(0, "b", (256, 256), 0.02))
    assert not np.array_equal(found, draw(1, "a", (256, 256), 0.02))


@pytest.mark.parametrize(
    "forms", [("bf16", "f16"), ("int4_g64", "int8"), ("int4a_g32", "f32"), ("int2_g32s8", "int4_g32s8")]
)
def test_an_archive_of_random_weights_is_made_again_from_its_seed(tmp_path: Path, forms: tuple[str, str]) -> None:
    model, choices = (
        tiny.write(tmp_path / "model", num_hidden_layers=1),
        (("weight_format", forms[0]), ("head_format", forms[1])),
    )
    import_model(ImportJob(str(model), 32, random_init=True, seed=7, choices=choices), tmp_path)
    archive, rest, again = tmp_path / PARAMETERS_FILE, tmp_path / "rest.irpa", tmp_path / "again.irpa"
    config = json.loads((model / "config.json").read_text())
    assert take_apart(archive, config, 8, forms, rest) is None, "another seed"
    made = take_apart(archive, config, 7, forms, rest)
    assert made is not None
    assert rest.stat().st_size < archive.stat().st_size / 10
    put_together(json.loads(json.dumps(made)), rest, again)
    assert digest.of_file(again) == digest.of_file(archive)


def test_an_archive_that_no_seed_gives_is_carried(tmp_path: Path) -> None:
    model = tiny.write(tmp_path / "model", num_hidden_layers=1)
    import_model(ImportJob(str(model), 32, choices=(("weight_format", "f16"),)), tmp_path)
    config = json.loads((model / "config.json").read_text())
    assert take_apart(tmp_path / PARAMETERS_FILE, config, 0, ("f16", "f16"), tmp_path / "rest.irpa") is None


def test_matrices_are_drawn_in_parts_and_a_models_own_first_numbers_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = draw(5, "model.embed_tokens.weight", (33, 7), 0.02)
    monkeypatch.setattr(drawn, "AT_ONCE", 10)
    np.testing.assert_array_equal(draw(5, "model.embed_tokens.weight", (33, 7), 0.02), whole)
    model = huggingface.load(str(tiny.write(tmp_path / "model", num_hidden_layers=1)), True, 5, "eager")
    for name, weights in model.named_parameters():
        spread = model.config.initializer_range
        expected = draw(5, name, tuple(weights.shape), spread) if weights.dim() > 1 else np.ones(weights.shape)
        np.testing.assert_array_equal(weights.numpy(), expected, err_msg=name)
