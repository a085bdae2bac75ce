"""Choosing a token: what each parameter leaves in, draws that are numbered, and log-probabilities."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from llmbuild.errors import InputError
from llmbuild.runtime.draw import drawn
from llmbuild.serve.choose import Chooser, Numbers, logprob
from llmbuild.serve.grammar import Grammar
from llmbuild.serve.step import Output
from tests.support.serving import request

ROW = np.array([1.0, 3.0, 2.0, 2.5, -1.0], np.float32)


def share_of(row: Any, **params: Any) -> dict[int, float]:
    """Return how often each token is drawn, of many equal steps through [0, 1)."""
    steps = 4000
    heat = params.pop("temperature", 1.0)
    tokens, counts = np.unique([drawn(row, i / steps, heat, **params) for i in range(steps)], return_counts=True)
    return dict(zip(tokens.tolist(), (counts / steps).tolist(), strict=True))


def softmax(row: Any) -> Any:
    wide = np.exp(row.astype(np.float64) - row.max())
    return wide / wide.sum()


@pytest.mark.parametrize("heat", [0.3, 1.0, 2.0])
def test_draws_have_the_probabilities_of_the_softmax(heat: float) -> None:
    wanted = softmax(ROW / np.float32(heat))
    found = share_of(ROW, temperature=heat)
    assert all(abs(found.get(n, 0) - wanted[n]) < 1e-3 for n in range(5))


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_k": 2}, {1, 3}),
        ({"top_k": -1}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.4}, {1}),
        ({"top_p": 0.5}, {1, 3}),
        ({"min_p": 0.3}, {1, 2, 3}),
        ({"min_p": 0.3, "temperature": 0.5}, {1, 3}),
        ({"min_p": 1.0}, {1}),
        ({"top_k": 3, "top_p": 0.6}, {1, 3}),
    ],
)
def test_what_is_left_in(params: dict[str, Any], kept: set[int]) -> None:
    assert set(share_of(ROW, **params)) == kept


def test_tokens_as_likely_as_the_kth_are_left_in() -> None:
    assert set(share_of(np.array([1, 2, 2, 0], np.float32), top_k=1)) == {1, 2}


@given(arrays(np.float32, 1500, elements=st.floats(-8, 8, width=32)), st.floats(0.05, 0.999), st.floats(0, 0.999))
def test_the_nucleus_of_many_tokens_is_that_of_a_full_sort(row: Any, share: float, at: float) -> None:
    weights = softmax(row)
    order = np.argsort(-weights, kind="stable")
    reached = np.cumsum(weights[order])
    inside = set(order[: int(np.searchsorted(reached, share * (1 + 1e-9))) + 1].tolist())
    assert drawn(row, at, 1.0, top_p=share) in inside


@given(
    arrays(np.float32, st.sampled_from([1, 255, 256, 257, 700]), elements=st.floats(-30, 8, width=32)),
    st.floats(0, 1, exclude_max=True),
)
def test_a_draw_is_where_its_share_of_the_softmax_is_reached(row: Any, at: float) -> None:
    token, reached = drawn(row, at, 1.0), np.cumsum(softmax(row))
    assert reached[token] >= at - 1e-6
    assert at >= (reached[token - 1] if token else 0) - 1e-6


def choices(row: Any, count: int, prompt: list[int], **params: Any) -> list[int]:
    """Return tokens that are chosen in turn from equal logits."""
    chooser = Chooser(request("r", prompt, 1, **params), 0, [4])
    return [chooser.choose(Output(int(row.argmax()), row.copy()))[0] for _ in range(count)]


def test_penalties_of_the_answer_and_of_the_prompt() -> None:
    assert choices(ROW, 3, [0]) == [1, 1, 1]
    assert choices(ROW, 3, [0], presence_penalty=0.75) == [1, 3, 1]  # then 2.25 against 1.75 and 2
    assert choices(ROW, 4, [0], frequency_penalty=0.75) == [1, 3, 1, 2]
    assert choices(ROW, 1, [1], repetition_penalty=1.5) == [3]
    assert choices(-ROW, 1, [4], repetition_penalty=1.5) == [4]
    assert choices(-ROW[:4], 2, [], repetition_penalty=4.0) == [0, 2]


def test_biases_and_ends_that_are_held_back() -> None:
    assert choices(ROW, 1, [], logit_bias={"2": 5}) == [2]
    high = np.array([0, 1, 2, 3, 9], np.float32)
    assert choices(high, 4, [], min_tokens=2) == [3, 3, 4, 4]


def test_the_given_logits_are_only_read() -> None:
    row = ROW.copy()
    chooser = Chooser(request("r", [1], 1, logit_bias={1: -9}, repetition_penalty=2.0, min_tokens=3), 0, [2])
    chooser.choose(Output(1, row))
    assert (row == ROW).all()


class Only:
    """A grammar, and the beginning of an answer in it, that lets some tokens follow and no others."""

    def __init__(self, *tokens: int) -> None:
        self.tokens, self.tried = np.array(sorted(tokens)), list[int]()

    def begin(self) -> Only:
        return self

    def tries(self, token: int) -> bool:
        self.tried.append(token)
        return token in self.tokens

    def allowed(self) -> Any:
        return self.tokens

    def take(self, token: int) -> None:
        assert token in self.tokens


def under(grammar: Only, row: Any, said: int, count: int, **params: Any) -> list[int]:
    """Return tokens that are chosen in turn from equal logits, of which a device says the likeliest."""
    chooser = Chooser(replace(request("r", [0], count, **params), grammar=cast(Grammar, grammar)), 0, [])
    return [chooser.choose(Output(said, row))[0] for _ in range(count)]


SHARES: list[tuple[dict[str, Any], float, list[int]]] = [
    ({}, 1.0, []),
    ({"temperature": 2.0}, 2.0, []),
    ({"top_k": 2, "temperature": 0.5}, 0.5, [1, 2]),
    ({"min_p": 0.2}, 1.0, [1, 2]),
    ({"top_p": 0.7, "temperature": 2.0}, 2.0, [1, 2]),
    ({"logit_bias": {0: 9.0}}, 1.0, []),
]


@pytest.mark.parametrize(("params", "heat", "left"), SHARES, ids=str)
@pytest.mark.parametrize("tokens", [(4, 1, 2), (4, 2)], ids=str)
def test_draws_under_a_grammar_have_the_shares_of_those_that_may_follow(
    tokens: tuple[int, ...], params: dict[str, Any], heat: float, left: list[int]
) -> None:
    """Most tokens may follow, or few: draws of all are tried, or none is. What is narrowed is so of those that may."""
    draws, grammar = 4000, Only(*tokens)
    found = under(grammar, ROW, 1, draws, **{"temperature": 1.0, **params})
    tried = len(tokens) > 2 and not left
    assert len(grammar.tried) == (draws - 1 if tried else 0)
    kept = [token for token in left if token in tokens] or sorted(tokens)
    wanted = dict(zip(kept, softmax(ROW[kept] / np.float32(heat)), strict=True))
    counts = np.bincount(found, minlength=5) / draws
    assert [counts[n] for n in range(5)] == pytest.approx([wanted.get(n, 0) for n in range(5)], abs=0.03)


@given(
    arrays(np.float32, 40, elements=st.floats(-5, 5, width=32), unique=True),
    st.sets(st.integers(0, 39), min_size=1),
    st.sampled_from([{}, {"logit_bias": {3: 4.5}}, {"presence_penalty": 1.5}]),
)
def test_the_likeliest_under_a_grammar_is_that_of_those_that_may_follow(
    row: Any, tokens: set[int], params: dict[str, Any]
) -> None:
    changed, allowed = row.copy(), sorted(tokens)
    changed[3] += 4.5 if "logit_bias" in params else 0.0
    (found,) = under(Only(*tokens), row, int(row.argmax()), 1, temperature=0, **params)
    assert changed[found] == changed[allowed].max()
    assert found in tokens


def test_draws_are_numbered() -> None:
    numbers = [[Numbers(seed, sequence) for sequence in range(3)] for seed in (0, 1, -1)]
    found = [one.at(place, turn) for row in numbers for one in row for place in range(100) for turn in range(2)]
    assert len(set(found)) == len(found)
    assert all(0 <= one < 1 for one in found)
    assert abs(float(np.mean(found)) - 0.5) < 0.03
    again = Numbers(-1, 2)
    assert [again.at(place) for place in (99, 0)] == [numbers[2][2].at(place) for place in (99, 0)]


@pytest.mark.parametrize(("seed", "sequence", "place", "turn"), [(0, 0, 0, 0), (5, 1, 9, 0), (-3, 2, 2**40, 1)])
def test_a_numbered_draw_is_that_of_a_new_generator(seed: int, sequence: int, place: int, turn: int) -> None:
    key, counter = np.array([seed & (2**64 - 1), sequence], np.uint64), np.array([place, turn, 0, 0], np.uint64)
    wanted = np.random.Generator(np.random.Philox(key=key, counter=counter)).random()
    assert Numbers(seed, sequence).at(place, turn) == wanted


@given(arrays(np.float32, 12, elements=st.floats(-50, 50, width=32)), st.integers(0, 11), st.integers(0, 20))
def test_log_probabilities_are_those_of_the_softmax(row: Any, token: int, count: int) -> None:
    wanted = np.log(np.maximum(softmax(row), 1e-300))
    found = logprob(row, token, count)
    assert found.logprob == pytest.approx(wanted[token], abs=1e-6)
    assert [one for one, _ in found.top] == np.argsort(-row, kind="stable")[:count].tolist()
    assert [value for _, value in found.top] == sorted((value for _, value in found.top), reverse=True)


def test_a_token_that_cannot_come_has_a_number() -> None:
    row = np.array([0, -np.inf], np.float32)
    assert logprob(row, 1, 2).logprob == -9999.0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("params", [{"temperature": 1.0}, {"logit_bias": {0: 1}}, {"logprobs": 1}], ids=str)
def test_logits_that_are_no_distribution_are_refused(bad: float, params: dict[str, Any]) -> None:
    row = ROW.copy()
    row[2] = bad
    with pytest.raises(InputError, match="computes no probabilities"):
        choices(row, 1, [], **params)
    with pytest.raises(InputError, match="computes no probabilities"):
        choices(np.full(4, -np.inf, np.float32), 1, [], **params)
