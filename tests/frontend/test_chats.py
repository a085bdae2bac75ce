"""Chats that a tiny model writes: prompts as they are asked, answers as it expects them, the same each time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmbuild.errors import InputError
from llmbuild.frontend import chats, huggingface
from llmbuild.frontend.chats import drawn, written
from tests.support import folders


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.write(tmp_path_factory.mktemp("chats") / "model", num_hidden_layers=1)


def test_each_window_begins_with_a_prompt_and_is_the_same_beside_fewer_others(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chats, "TOGETHER", 2)
    asked = [[1, 2, 3], [4], [5, 6]]
    found = written(str(model), asked, 3, 12)
    assert (found.shape, found.dtype) == ((3, 12), np.int64)
    assert [row[: len(p)].tolist() for row, p in zip(found, asked, strict=True)] == asked
    monkeypatch.undo()
    assert written(str(model), asked, 3, 12).tolist() == found.tolist()


def test_where_an_answer_ends_the_next_prompt_follows(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = tuple(range(320))
    monkeypatch.setattr(huggingface, "eos_tokens", lambda _: every)
    found = written(str(model), [[1, 2], [3], [4, 5]], 2, 7)
    drawn_at = ((2, 5), (1, 4))
    seen = [[t for i, t in enumerate(row) if i not in at] for row, at in zip(found.tolist(), drawn_at, strict=True)]
    assert seen == [[1, 2, 4, 5, 3], [3, 1, 2, 4, 5]]


def test_prompts_of_another_vocabulary_are_refused(model: Path) -> None:
    for asked in ([], [[]], [[1], [400]], [[-1]]):
        with pytest.raises(InputError, match="prompts must be tokens from 0 to"):
            written(str(model), asked, 1, 4)


@given(st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=9), st.floats(0, 1, exclude_max=True))
def test_a_token_is_drawn_where_the_sums_of_its_probabilities_say(logits: list[float], at: float) -> None:
    told = np.array(logits, np.float32)
    sums = np.concatenate([[0], np.cumsum(np.exp((told - told.max()).astype(np.float64)))])
    token = drawn(told, at)
    assert sums[token] / sums[-1] - 1e-6 <= at <= sums[token + 1] / sums[-1] + 1e-6
