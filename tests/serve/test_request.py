"""Sampling parameters: every value is bounded, named where it is wrong, and brought into one form."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmbuild.serve.errors import RequestRefused
from llmbuild.serve.request import SamplingParams

NAMES = [each.name for each in fields(SamplingParams)]

WRONG: list[tuple[str, Any]] = [
    ("n", 0),
    ("n", 5_000_000),
    ("n", True),
    ("n", 1.0),
    ("temperature", -0.1),
    ("temperature", float("nan")),
    ("temperature", float("inf")),
    ("temperature", "1"),
    ("top_p", 0),
    ("top_p", 1.1),
    ("top_k", -2),
    ("top_k", 10**30),
    ("min_p", 1.5),
    ("presence_penalty", 2.5),
    ("frequency_penalty", -3),
    ("repetition_penalty", 0),
    ("seed", 2**63),
    ("seed", "a"),
    ("stop", ""),
    ("stop", [""]),
    ("stop", ["a"] * 17),
    ("stop", 3),
    ("stop", "\ud800"),
    ("stop", "x" * 2000),
    ("stop_token_ids", "12"),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", [True]),
    ("ignore_eos", 1),
    ("max_tokens", 0),
    ("max_tokens", 10**12),
    ("min_tokens", -1),
    ("min_tokens", 17),
    ("logprobs", 21),
    ("logprobs", 10**9),
    ("logit_bias", [1]),
    ("logit_bias", {"a": 1}),
    ("logit_bias", {"1": 101}),
    ("logit_bias", {-1: 1}),
    ("logit_bias", dict.fromkeys(range(2000), 1)),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda v: str(v)[:30])
def test_a_wrong_value_is_refused_by_its_name(name: str, value: Any) -> None:
    with pytest.raises(RequestRefused) as told:
        SamplingParams.of({name: value})
    assert told.value.param == name
    assert name in str(told.value)
    assert len(str(told.value)) < 300


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(NAMES), JSON)
def test_any_value_is_taken_or_refused(name: str, value: Any) -> None:
    refused = ""
    try:
        made = SamplingParams.of({name: value})
    except RequestRefused as error:
        refused = str(error.param)
    if refused:
        assert refused == name
    else:
        assert SamplingParams.of({each: getattr(made, each) for each in NAMES}) == made


def test_values_have_one_form() -> None:
    made = SamplingParams(stop="a", logit_bias={"7": 1}, top_k=-1, stop_token_ids=None)  # type: ignore[dict-item]
    assert (made.stops, made.biases, made.top_k, made.stop_tokens) == (("a",), {7: 1.0}, 0, ())


@pytest.mark.parametrize(
    ("params", "plain"),
    [
        ({}, True),
        ({"top_k": 3}, True),
        ({"min_tokens": 1}, False),
        ({"logit_bias": {1: 1}}, False),
        ({"seed": 2}, True),
    ],
)
def test_the_device_chooses_where_nothing_changes_a_logit(params: dict[str, Any], plain: bool) -> None:
    assert SamplingParams.of({"temperature": 0, **params}).plain == plain
    assert not SamplingParams.of(params).plain
