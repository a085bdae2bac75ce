"""What a model is calibrated on: shares of texts, their order, and what the model is asked to write."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmbuild.errors import InputError
from llmbuild.profiler.calibration import Chats, Parts, mixed, parts, shared_out, uncalibrated
from llmbuild.profiler.heldout import WINDOW
from llmbuild.runtime.chat import ChatTemplate
from llmbuild.spec.recipe import Calibration, Text
from tests.conftest import Project
from tests.search.test_space import recipe

CHAT = ChatTemplate("{% for m in messages %}Q {{ m.content }} A {% endfor %}").blob()


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=6), st.integers(1, 200))
def test_windows_are_shared_out_by_share_and_every_text_has_one(shares: list[float], windows: int) -> None:
    found = shared_out(shares, windows)
    exact = [windows * share / sum(shares) for share in shares]
    assert all(abs(got - due) < 1.001 for got, due in zip(found, exact, strict=True))
    assert min(found) >= 1
    if min(exact) > 1.001:
        assert sum(found) == windows


def test_windows_of_all_texts_are_spread_evenly_and_those_of_one_keep_their_order() -> None:
    one, other = np.arange(4)[:, None], 10 + np.arange(2)[:, None]
    assert mixed([one, other]).ravel().tolist() == [0, 10, 1, 2, 11, 3]
    assert mixed([one]).ravel().tolist() == [0, 1, 2, 3]


def test_chats_are_known_by_what_the_model_is_asked() -> None:
    asked, text = Chats(((1, 2), (3,)), 2, 8), np.zeros((1, 8), np.int64)
    others = [replace(asked, prompts=((1, 2), (4,))), replace(asked, windows=3), replace(asked, length=9)]
    named = {Parts((text, each)).identity() for each in (asked, *others)} | {Parts((text,)).identity()}
    assert len(named) == 5
    assert Parts((text, asked)).identity() in named


def test_parts_follow_the_texts_and_prompts_go_through_the_chat_template(project: Project, tmp_path: Path) -> None:
    prompts, prose = tmp_path / "prompts.txt", tmp_path / "prose.txt"
    prompts.write_text("push\n\n  pop  \n")
    prose.write_text("def push " * 200)
    asked = Calibration((Text(chats=str(prompts), share=3), Text(files=(str(prose),))), 4 * WINDOW)
    chats, windows = parts(asked, project.model / "tokenizer.json", 1024, CHAT).each
    assert isinstance(chats, Chats) and not isinstance(windows, Chats)
    assert (chats.windows, chats.length, len(chats.prompts), windows.shape) == (3, WINDOW, 2, (1, WINDOW))
    with pytest.raises(InputError, match="no chat template to ask calibration prompts through"):
        parts(asked, project.model / "tokenizer.json", 1024, None)


def test_a_model_that_cannot_be_asked_is_told_why(project: Project, tmp_path: Path) -> None:
    prompts, tokenizer = tmp_path / "prompts.txt", project.model / "tokenizer.json"
    asked = replace(recipe(), calibration=Calibration((Text(chats=str(prompts)),)))
    told = []
    for text, door, chat in (
        ("push", None, CHAT),
        ("push", tokenizer, None),
        ("\n", tokenizer, CHAT),
        ("push " * 500, tokenizer, CHAT),
        ("push", tokenizer, CHAT),
    ):
        prompts.write_text(text)
        told.append(uncalibrated(asked, door, 320, chat))
    found = ("no tokenizer.json", "no chat template", "no line of text", "tokens, and a window")
    assert ([part in why for part, why in zip(found, told, strict=False)], told[-1]) == ([True] * 4, "")
