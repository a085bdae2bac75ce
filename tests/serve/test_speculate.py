"""Guessed tokens: what is looked up, how many are worth a step, and that answers are those without them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from llmbuild.errors import InputError
from llmbuild.serve.engine import Limits
from llmbuild.serve.guesses import Lookup
from llmbuild.serve.pace import Candidate, Pace, choose
from llmbuild.serve.per_sequence import PerSequenceStep
from llmbuild.serve.request import Request
from llmbuild.serve.schedule.fcfs import Fcfs
from llmbuild.serve.served import Plan, _speculation
from llmbuild.serve.speculate import Asked, Speculation
from tests.serve.test_engine import PROMPTS, Counted
from tests.support.serving import ADAPTIVE, CONTEXT, END, VOCABULARY, Bench, alone, logits_of, request


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
    assert list(choose(candidates, pace(seconds), 8).counts) == expected


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


@pytest.mark.parametrize("policy", ADAPTIVE)
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


class Scripted:
    """A grammar whose tokens are given; where None is, any but the end may follow, and after them the end."""

    def __init__(self, tokens: list[int | None]) -> None:
        self.tokens = tokens

    def begin(self) -> Scripted:
        return Scripted(list(self.tokens))

    def _may(self, token: int) -> bool:
        wanted = self.tokens[0] if self.tokens else END
        return token == wanted or (wanted is None and token != END)

    def tries(self, token: int) -> bool:
        may = self._may(token)
        if may:
            self.take(token)
        return may

    def allowed(self) -> Any:
        return np.array([token for token in range(VOCABULARY) if self._may(token)])

    def take(self, token: int) -> None:
        assert self._may(token)
        self.tokens = self.tokens[1:]

    def forced(self) -> list[int]:
        found = []
        for token in self.tokens:
            if token is None:
                break
            found.append(token)
        return found


@pytest.mark.parametrize("heat", [0, 1.4])
@pytest.mark.parametrize("lookup", [False, True])
def test_tokens_that_a_grammar_forces_are_computed_ahead_and_change_no_answer(heat: float, lookup: bool) -> None:
    script = [7, 8, 9, 10, None, 11, 12, 13, None, None, 14, 15]
    plain = Bench(slots=2)
    guessing = Bench(slots=2, speculation=Speculation(lookup))
    made = [
        replace(request("held", [5, 6], 3, temperature=heat), grammar=cast(Any, Scripted(list(script)))),
        request("free", [5, 7], 4, temperature=heat, max_tokens=4, ignore_eos=True),
    ]
    assert answers(guessing, made) == answers(plain, made)
    assert plain.tokens("held")[:4] == script[:4]
    assert guessing.step.kept >= (5 if heat else 6)
    assert guessing.step.steps < plain.step.steps


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


class Told(Speculation):
    """Guesses of texts that are known: so many tokens that are right, and behind them so many that are wrong."""

    def __init__(self, texts: list[list[int]], right: int, wrong: int) -> None:
        super().__init__()
        self.texts, self.right, self.wrong = texts, right, wrong

    def drafts(self, asked: Sequence[Asked]) -> list[tuple[int, ...]]:
        return [self._of(cast(Lookup, one.guesses)._tokens, one.most) for one in asked]

    def _of(self, known: list[int], most: int) -> tuple[int, ...]:
        text = next((text for text in self.texts if text[: len(known)] == known), known)
        rest = [*text[len(known) :], 0]
        found = rest[: min(self.right, len(rest) - 1)]
        return (*found, *[(rest[len(found)] + 1) % VOCABULARY] * self.wrong)[:most]


@pytest.mark.parametrize("heat", [0, 1.4])
@pytest.mark.parametrize(("right", "wrong"), [(0, 1), (0, 3), (1, 0), (1, 1), (2, 1)])
def test_guesses_change_no_answer_wherever_the_first_wrong_one_is(heat: float, right: int, wrong: int) -> None:
    made = [request(f"r{n}", [n + 1, 3], n, max_tokens=8, temperature=heat, ignore_eos=n < 2) for n in range(3)]
    plain, counted = Bench(slots=3), Counted()
    wanted = answers(plain, made)
    texts = [[*one.prompt, *plain.tokens(one.id)] for one in made]
    bench = Bench(slots=3, observer=counted, speculation=Told(texts, right, wrong))
    assert answers(bench, made) == wanted
    tried, kept = sum(turn.drafts for turn in counted.turns), sum(turn.right for turn in counted.turns)
    assert tried > 0 and kept == bench.step.kept
    assert (kept > 0) == (right > 0) and (kept < tried or not wrong)


@pytest.mark.parametrize("guess", [None, 9, 8])
def test_draws_behind_guesses_have_the_probabilities_of_the_model(guess: int | None) -> None:
    """768 draws of the token behind a guess that is right (9), behind one that is wrong, and behind none."""
    counts, kept = np.zeros(VOCABULARY), 0
    for seed in range(12):
        told = None if guess is None else Told([[20, 7, guess, 0]], 1, 0)
        bench = Bench(slots=64, limits=Limits(queue=64), scheduler=Fcfs(512), speculation=told)
        bench.step.forced = {1: 7, 2: 9}
        made = bench.submit("r", [20], seed, n=64, max_tokens=3, temperature=1.5, top_k=8, ignore_eos=True)
        bench.settle()
        said = [bench.tokens(made.id, i) for i in range(64)]
        assert all(one[:2] == [7, 9] for one in said)
        np.add.at(counts, [one[2] for one in said], 1)
        kept += bench.step.kept
    row = logits_of([20, 7, 9]).astype(np.float64)
    best = np.argsort(-row)[:8]
    wanted = np.exp(row[best] / 1.5)
    wanted *= 768 / wanted.sum()
    assert counts[best].sum() == 768
    assert ((counts[best] - wanted) ** 2 / wanted).sum() < 24.3  # chi-squared of 7 degrees of freedom at 0.1 %
    assert kept == (768 if guess == 9 else 0)
