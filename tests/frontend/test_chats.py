"""Chats that a tiny model writes: prompts as they are asked, answers as it expects them, the same each time.

What was written when a run was ended is not written again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmbuild.errors import InputError
from llmbuild.frontend import chats, huggingface, transcript
from llmbuild.frontend.chats import drawn, written
from llmbuild.frontend.transcript import Transcript, count
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


@pytest.mark.parametrize("steps", [0, 1, 4, 9])
def test_a_run_that_was_ended_goes_on_with_the_same_texts(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    monkeypatch.setattr(chats, "TOGETHER", 2)
    monkeypatch.setattr(transcript, "SAVE_S", 0.0)
    monkeypatch.setattr(huggingface, "eos_tokens", lambda _: tuple(range(0, 320, 3)))
    asked, real = ([[1, 2, 3], [4], [5, 6]], 3, 8), drawn
    whole = written(str(model), *asked)
    left, file = [steps], tmp_path / "kept.npz"

    def killed(logits: np.ndarray, at: float) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise InterruptedError
        return real(logits, at)

    with monkeypatch.context() as patched:
        patched.setattr(chats, "drawn", killed)
        with pytest.raises(InterruptedError):
            written(str(model), *asked, Transcript(file, "one"))
    known, again = count(file), list[int]()
    assert known < whole.size
    assert (known > 0) == (steps > 0)
    monkeypatch.setattr(chats, "drawn", lambda logits, at: again.append(0) or real(logits, at))
    assert written(str(model), *asked, Transcript(file, "one")).tolist() == whole.tolist()
    assert len(again) <= whole.size - known


def test_a_transcript_of_another_key_of_other_texts_or_broken_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transcript, "SAVE_S", 0.0)
    file, texts = tmp_path / "kept.npz", [[1, 2], [], [3]]
    kept = Transcript(file, "one")
    assert (count(file), kept.tokens(3)) == (0, [[], [], []])
    kept.keep(texts)
    assert (count(file), Transcript(file, "one").tokens(3)) == (3, texts)
    for key, number in (("other", 3), ("", 3), ("one", 2)):
        assert Transcript(file, key).tokens(number) == [[]] * number
    Transcript(tmp_path / "none.npz", "").keep(texts)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.npz"]
    file.write_bytes(file.read_bytes()[:100])
    assert (count(file), Transcript(file, "one").tokens(3)) == (0, [[], [], []])


def test_prompts_that_fill_a_window_need_no_answer(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(chats, "drawn", asked)
    assert written(str(model), [[1, 2, 3], [4, 5, 6, 7]], 2, 3).tolist() == [[1, 2, 3], [4, 5, 6]]


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
