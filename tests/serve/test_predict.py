"""Predicted lengths: what is expected of every answer, what a fit finds, its file, and what tenants change."""

from __future__ import annotations

import contextlib
import io
import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmbuild.errors import InputError
from llmbuild.serve import learn
from llmbuild.serve.lengths import AGAIN
from llmbuild.serve.predict import files
from llmbuild.serve.predict.features import BUCKETS, SEEN, buckets
from llmbuild.serve.predict.fit import LEAST, Answered, fit, folds, spread_of
from llmbuild.serve.predict.judge import request_of, scores
from llmbuild.serve.predict.learned import Learned
from llmbuild.serve.predict.model import LengthModel, Spread
from llmbuild.serve.schedule.isrtf import Isrtf
from llmbuild.serve.simulate import Arrival, Host, simulate
from llmbuild.system.ranks import kendall

SPREAD = Spread((-1.0, -0.5, 0.0, 0.5, 1.0))
HEADER = files.Header("m", "v" * 64, "t" * 64, 50, 100)
ids = st.lists(st.integers(0, 2**32 - 1), max_size=300)


def answers(count: int, seed: int, most: int = 10_000) -> list[Answered]:
    """Return answers whose length one token of the prompt tells: 8 for token 100, and twice as many for each next."""
    draw, found = random.Random(seed), []
    for _ in range(count):
        kind = draw.randrange(5)
        prompt = (*range(20), 100 + kind, *(draw.randrange(1000, 9000) for _ in range(draw.randrange(1, 5))))
        tokens = round(8 * 2**kind * math.exp(draw.gauss(0, 0.2)))
        found.append(Answered(prompt, min(tokens, most), tokens >= most, str(kind), str(kind)))
    return found


@pytest.fixture(scope="module")
def model() -> LengthModel:
    return fit(answers(120, 0))


@given(ids=ids)
def test_every_prompt_has_features(ids: list[int]) -> None:
    found = buckets(ids)
    assert len(found) == max(1, 2 * min(len(ids), 2 * SEEN)) and 0 <= found.min() <= found.max() < BUCKETS
    assert buckets(tuple(ids)).tolist() == found.tolist()


def test_the_middle_of_a_long_prompt_is_not_looked_at() -> None:
    ends = [*range(SEEN)], [*range(500, 500 + SEEN)]
    one, other = ([*ends[0], *middle, *ends[1]] for middle in ([7] * 90, [8] * 90))
    assert buckets(one).tolist() == buckets(other).tolist()
    assert buckets(one).tolist() != buckets([1, *one[1:]]).tolist()


@given(
    quantiles=st.lists(st.floats(-3, 3), min_size=1, max_size=9),
    location=st.floats(0, 9),
    tokens=st.integers(0, 5000),
    more=st.integers(0, 500),
)
def test_an_answer_is_expected_to_go_on_and_never_to_be_shorter_than_before(
    quantiles: list[float], location: float, tokens: int, more: int
) -> None:
    spread = Spread(tuple(sorted(quantiles)))
    expected = spread.expected(location, tokens)
    assert expected > tokens
    assert spread.expected(location, tokens + more) >= expected


def test_an_overrun_grows_with_the_answer() -> None:
    at = math.log1p(50)
    assert [round(SPREAD.expected(at, tokens)) for tokens in (0, 50, 90, 200, 400)] == [50, 138, 138, 300, 600]


def test_a_fit_finds_what_prompts_say(model: LengthModel) -> None:
    fresh = answers(60, 1)
    said = [model.location(one.prompt) for one in fresh]
    assert kendall(said, [one.tokens for one in fresh]) > 0.75
    assert 0.15 < model.spread.scale < 0.7  # what was drawn has 0.2 within a kind, and 1 over all


def test_cut_answers_are_not_taken_for_short_ones() -> None:
    """The longest kind has 128 tokens, and every one of its answers is cut at 40."""
    cut = answers(120, 0, most=40)
    longest = next(one.prompt for one in cut if one.tenant == "4")
    known, mistaken = fit(cut), fit([replace(one, cut=False) for one in cut])
    assert known.spread.quantiles[-1] >= mistaken.spread.quantiles[-1]
    expected = [each.spread.expected(each.location(longest), 0) for each in (known, mistaken)]
    assert expected[0] >= 38 and expected[0] >= expected[1] - 1


def test_too_few_answers_are_refused() -> None:
    with pytest.raises(
        InputError, match=f"there are {LEAST - 1} answers: a predictor of lengths takes at least {LEAST}"
    ):
        fit(answers(LEAST - 1, 0))


def test_distances_are_those_of_answers_that_ended_and_above_those_that_were_cut() -> None:
    values = np.linspace(-1, 1, 640)
    plain = spread_of(values, [False] * 640)
    assert np.allclose(plain.quantiles, np.quantile(values, (np.arange(64) + 0.5) / 64), atol=0.01)
    cut = spread_of(values, [i % 2 == 0 for i in range(640)])
    assert all(a >= b for a, b in zip(cut.quantiles, plain.quantiles, strict=True)) and cut != plain


def test_prompts_of_one_name_are_in_one_fold() -> None:
    names = [str(i % 7) for i in range(70)]
    parts = folds(names, 3, 0)
    assert len(set(zip(names, parts, strict=True))) == 7 and sorted(map(parts.count, range(3))) == [20, 20, 30]


def test_rankings_agree_oppose_and_are_unrelated() -> None:
    assert kendall([1, 2, 3], [4, 5, 9]) == 1.0
    assert kendall([1, 2, 3], [9, 5, 4]) == -1.0
    assert kendall([1, 1, 1], [9, 5, 4]) == 0.0


def test_a_predictor_is_judged_beside_what_knows_less(model: LengthModel) -> None:
    fresh = answers(80, 2)
    made = scores(fresh, model.spread, {"trained": [model.location(one.prompt) for one in fresh]})
    tau = {one.predictor: one.kendall_tau for one in made if not one.tokens}
    error = {one.predictor: one.log_error for one in made if not one.tokens}
    assert tau["constant"] == 0.0 and tau["trained"] > tau["history, a tenant for each kind"] > 0.3
    assert error["trained"] < 0.35 < error["constant"]
    assert {one.tokens for one in made} == {0, 50}


def test_a_file_holds_the_model(model: LengthModel, tmp_path: Path) -> None:
    files.write(tmp_path / "p", model, HEADER)
    found, header = files.read(tmp_path / "p")
    assert header == HEADER and [path.name for path in tmp_path.iterdir()] == ["p"]
    for one in answers(5, 3):
        assert found.location(one.prompt) == pytest.approx(model.location(one.prompt), abs=1e-4)
    assert found.spread.quantiles == pytest.approx(model.spread.quantiles, abs=1e-6)
    files.of_tokens(tmp_path / "p", "m", "t" * 64)
    told = "p predicts the answers of m, whose tokenizer is tttttttttttt; that of other is uuuuuuuuuuuu: `llmbuild pro"
    with pytest.raises(InputError, match=told):
        files.of_tokens(tmp_path / "p", "other", "u" * 64)


def arrays(**changed: Any) -> bytes:
    body = io.BytesIO()
    header = json.dumps({**HEADER.__dict__, **changed.pop("header", {})}).encode()
    found = {"weights": np.zeros(BUCKETS, np.float32), "rarity": np.zeros(BUCKETS, np.float32)}
    rest = {"middle": np.zeros(1, np.float32), "quantiles": np.zeros(3, np.float32)}
    np.savez(body, header=np.frombuffer(header, np.uint8), **{**found, **rest, **changed})
    return body.getvalue()


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", "no predictor of lengths"),
        (b"{}", "no predictor of lengths"),
        (arrays()[:-40], "no predictor of lengths"),
        (arrays(weights=np.zeros(3, np.float32)), r"weights is float32\[3\]"),
        (arrays(quantiles=np.array([math.nan], np.float32)), "quantiles is .* not finite"),
        (arrays(middle=np.array([{}], object)), "Object arrays cannot be loaded"),
        (arrays(header={"version": 2}), "it has version 2; this llmbuild reads version 1"),
        (arrays(header={"answers": "many"}), "answers of its header is 'many'"),
        (arrays(header={"more": 1}), "its header has not the keys"),
        (arrays(rarity=np.zeros(1 << 20, np.float32)), "more than 1048576 bytes"),
    ],
)
def test_what_is_no_predictor_is_refused(body: bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(body)
    with pytest.raises(InputError, match=told):
        files.read(tmp_path / "p")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 40_000), byte=st.integers(0, 255))
def test_a_damaged_file_is_read_or_refused(at: int, byte: int, tmp_path: Path) -> None:
    body = bytearray(arrays())
    body[at % len(body)] = byte
    (tmp_path / "p").write_bytes(body)
    with contextlib.suppress(InputError):
        files.read(tmp_path / "p")


def test_a_missing_file_and_a_missing_folder_are_told(model: LengthModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        files.read(tmp_path / "p")
    with pytest.raises(InputError, match="it cannot be written: No such file"):
        files.write(tmp_path / "none" / "p", model, HEADER)


def learned() -> Learned:
    return Learned(lambda ids: math.log1p(40), SPREAD)


def test_a_tenants_answers_set_its_predictions_right_and_no_others() -> None:
    lengths = learned()
    for _ in range(100):
        lengths.learn(request_of(0, "long"), 400)
        lengths.learn(request_of(0, "as predicted"), 40 if _ % 2 else 38)
    expected = {name: lengths.predict(request_of(0, name), 0) for name in ("long", "as predicted", "new")}
    assert expected["new"] == pytest.approx(40)
    assert 250 < (expected["long"] or 0) < 600 and 30 < (expected["as predicted"] or 0) < 50
    assert lengths.predict(request_of(0, "long", most=64), 0) == 64


def test_an_answer_that_was_cut_does_not_pull_down_what_is_expected() -> None:
    cut, ended = learned(), learned()
    for _ in range(30):
        cut.learn(request_of(0, "t", most=20), 20)
        ended.learn(request_of(0, "t"), 20)
    expected = [each.predict(request_of(0, "t"), 0) or 0 for each in (cut, ended)]
    assert expected[0] > 30 > expected[1]


class Noted:
    """Predicts the true length, and notes when it is asked and told."""

    def __init__(self) -> None:
        self.asked: list[tuple[float, int]] = []
        self.told: list[tuple[float, int]] = []

    def predict(self, asked: Arrival, tokens: int) -> float | None:
        self.asked.append((asked.arrival_s, tokens))
        return float(asked.output)

    def learn(self, asked: Arrival, tokens: int) -> None:
        self.told.append((asked.arrival_s, tokens))


def test_simulated_answers_are_predicted_as_the_engine_does_and_right_ones_help() -> None:
    host = Host(slots=2, blocks=2 * 32, page=32, context=1024)
    drawn = [Arrival(i / 1000, 8, 10 if i % 2 else 120) for i in range(20)]
    noted = Noted()
    told = simulate(drawn, Isrtf(), host, lambda work: 0.01, lengths=noted)
    plain = simulate(drawn, Isrtf(), host, lambda work: 0.01)
    assert sorted(tokens for _, tokens in noted.asked) == [0] * 20 + [AGAIN] * 10 + [2 * AGAIN] * 10
    assert sorted(noted.told) == [(one.arrival_s, one.output) for one in drawn]
    means = [sum(life.e2e_s for life in run.lives) for run in (told, plain)]
    assert means[0] < 0.8 * means[1]


LINE = {"prompt": "ab", "tenant": "t"}


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "p:1: "),
        ("[]", "p:1 is no object"),
        (json.dumps({**LINE, "tennant": "t"}), "p:1: tennant is unknown; a line has prompt, messages"),
        (json.dumps({"group": "a"}), "p:1 must have either prompt or messages"),
        (json.dumps({"messages": "ab"}), "p:1: messages must be a list of objects"),
        (json.dumps({**LINE, "output_tokens": 0}), "p:1: output_tokens is 0; it must be 1 or more"),
        (json.dumps({**LINE, "cut": 1}), "p:1: cut must be true or false"),
        (json.dumps(LINE), f"p has 1 prompts: a predictor of lengths takes at least {LEAST}"),
    ],
)
def test_prompts_that_cannot_be_read_are_told_by_their_line(line: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "p").write_text(line + "\n")
    with pytest.raises(InputError, match=told):
        learn.read(tmp_path / "p")
