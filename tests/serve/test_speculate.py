"""Guessed tokens: what is looked up, how many are worth a step, and that answers are those without them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from llmbuild.errors import InputError
from llmbuild.serve.per_sequence import PerSequenceStep
from llmbuild.serve.request import Request
from llmbuild.serve.served import Plan, _speculation
from llmbuild.serve.speculate import Candidate, Lookup, Pace, Speculation, counts
from tests.serve.test_engine import PROMPTS
from tests.support.serving import ADAPTIVE, CONTEXT, Bench, alone, request


@pytest.mark.parametrize(
    ("tokens", "most", "expected"),
    [
        ([1, 2, 3, 4, 9, 8, 7, 1, 2, 3, 4], 3, [9, 8, 7]),
        ([1, 2, 5, 1, 2, 6, 7, 8, 1, 2], 2, [6, 7]),  # the latest of two
        ([3, 1, 2, 5, 9, 1, 2, 6, 3, 1, 2], 1, [5]),  # a longer run counts more than a later one
        ([5, 6, 5, 6, 5], 4, [6, 5, 6, 5]),  # what repeats itself goes on
        ([7, 7, 7], 3, [7, 7, 7]),
        ([1, 2, 3, 4], 3, []),
        ([], 3, []),
        ([1, 2, 5, 1, 2], 0, []),
    ],
)
def test_what_followed_the_same_tokens_before_is_guessed(tokens: list[int], most: int, expected: list[int]) -> None:
    assert Lookup(tokens).drafts(most) == expected


def test_drafts_that_were_right_are_expected_to_be_right() -> None:
    good, bad = Lookup([1]), Lookup([1])
    before = good.rate
    for _ in range(20):
        good.judged(3, 3)
        bad.judged(0, 1)
    assert bad.rate < 0.1 < before < 0.9 < good.rate


def pace(seconds: dict[int, float]) -> Pace:
    """Return what steps took, by their rows."""
    made = Pace()
    for rows, taken in seconds.items():
        made.took(rows, taken)
    return made


FLAT, STEEP = dict.fromkeys(range(1, 9), 1.0), {n: float(n) for n in range(1, 9)}
KNEE = {n: 1.0 if n <= 3 else 9.0 for n in range(1, 9)}


@pytest.mark.parametrize(
    ("candidates", "seconds", "expected"),
    [
        ([Candidate(4, 0.6)], FLAT, [4]),
        ([Candidate(4, 0.6)], STEEP, [0]),
        ([Candidate(4, 0.6)], KNEE, [2]),
        ([Candidate(5, 0.9), Candidate(5, 0.5)], FLAT, [5, 1]),  # 8 rows in all: the likelier drafts come first
        ([Candidate(0, 0.9), Candidate(1, 0.5)], FLAT, [0, 1]),
        ([Candidate(4, 0.6)], {1: 1.0}, [4]),  # what was never tried is tried
        ([Candidate(4, 0.6)], {}, [0]),
    ],
)
def test_as_many_drafts_are_taken_as_pay(
    candidates: list[Candidate], seconds: dict[int, float], expected: list[int]
) -> None:
    assert counts(candidates, pace(seconds), 8) == expected


def test_a_slow_step_is_forgotten() -> None:
    made = pace({1: 1.0, 2: 50.0})
    assert made.seconds(2) == 50.0
    for _ in range(600):
        made.took(1, 1.0)
    assert made.seconds(2) == 1.0


def repeating(bench: Bench, period: int) -> None:
    """Let the device say what repeats itself, at each position, whatever was before."""
    bench.step.forced = {n: 3 + n % period for n in range(CONTEXT + 1)}


def answers(bench: Bench, made: list[Request]) -> list[Any]:
    """Return tokens, texts and ends of requests that run together."""
    for one in made:
        bench.engine.submit(one)
    bench.settle()
    return [
        (bench.tokens(one.id, i), bench.text(one.id, i), bench.ends(one.id, i))
        for one in made
        for i in range(one.params.n)
    ]


@pytest.mark.parametrize("policy", ADAPTIVE, ids=str)
@pytest.mark.parametrize("period", [0, 2, 5])
def test_answers_are_those_without_drafts(policy: Any, period: int) -> None:
    params: list[dict[str, Any]] = [
        {"max_tokens": 9},
        {"max_tokens": None, "ignore_eos": True},
        {"temperature": 1.5, "n": 2, "max_tokens": 12},
        {"logprobs": 2, "max_tokens": 1},
        {"stop": "b", "max_tokens": 12},
        {"frequency_penalty": 1.5, "max_tokens": 12},
    ]
    made = [request(f"r{n}", PROMPTS[n], n, **one) for n, one in enumerate(params)]
    plain, guessing = Bench(slots=3, scheduler=policy), Bench(slots=3, scheduler=policy, speculation=Speculation())
    for bench in (plain, guessing):
        if period:
            repeating(bench, period)
    assert answers(guessing, made) == answers(plain, made)
    assert plain.step.kept == 0
    if period:
        assert guessing.step.kept > 0 and guessing.step.steps < plain.step.steps
    else:
        assert answers(Bench(slots=3, speculation=Speculation()), made)[0] == alone(made[0])


def test_a_variant_of_one_row_at_a_time_refuses_to_guess() -> None:
    step = cast(PerSequenceStep, SimpleNamespace(drafts=False))
    with pytest.raises(InputError, match="m: speculation ngram needs a variant that computes several rows in one call"):
        _speculation("m", step, Plan(speculation="ngram"))


def test_a_sequence_of_guesses_that_are_right_takes_few_steps() -> None:
    bench = Bench(slots=1, speculation=Speculation())
    repeating(bench, 2)
    bench.submit("r", [3, 4, 3, 4], max_tokens=16, ignore_eos=True)
    bench.settle()
    assert len(bench.tokens("r")) == 16
    assert bench.step.steps < 8


def test_blocks_of_guessed_tokens_are_found_again_only_where_they_were_right() -> None:
    bench = Bench(slots=2, speculation=Speculation())
    repeating(bench, 3)
    bench.submit("r", [3, 4, 5, 3, 4], max_tokens=12, ignore_eos=True)
    bench.settle()
    bench.step.forced = {}
    bench.submit("again", [3, 4, 5, 3, 4, *bench.tokens("r")], max_tokens=4)  # the device compares what is there
    bench.settle()
    assert bench.step.kept > 0 and bench.step.found > 0
