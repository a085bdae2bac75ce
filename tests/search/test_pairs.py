from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmbuild.search.pairs import LEAST, LOOKS, RANKED, RISK, TIE, interval, needed, order, place

logs = st.lists(st.floats(-0.5, 0.5), min_size=LEAST, max_size=60)
seconds = st.lists(st.tuples(st.floats(1e-4, 1.0), st.floats(1e-4, 1.0)), min_size=LEAST, max_size=40)
SWAPPED = {"less": "greater", "greater": "less", "tied": "tied", "undecided": "undecided"}


@given(seconds)
def test_swapping_the_two_swaps_the_answer(taken: list[tuple[float, float]]) -> None:
    mine, theirs = zip(*taken, strict=True)
    assert order(theirs, mine) == SWAPPED[order(mine, theirs)]


@given(st.lists(st.floats(1e-4, 1.0), min_size=LEAST, max_size=40))
def test_what_is_equal_in_every_round_is_tied(taken: list[float]) -> None:
    assert order(taken, taken) == "tied"


@given(seconds, st.floats(1.001, 100))
def test_a_unit_of_time_changes_nothing(taken: list[tuple[float, float]], unit: float) -> None:
    mine, theirs = zip(*taken, strict=True)
    low, high = interval([math.log(a / b) for a, b in taken])
    scaled = interval([math.log(a * unit / (b * unit)) for a, b in taken])
    assert scaled == pytest.approx((low, high), abs=1e-9)
    assert order(mine, theirs) == place(low, high)


@given(logs)
def test_an_interval_holds_the_median_of_its_pairs_averages(values: list[float]) -> None:
    low, high = interval(values)
    averages = sorted((a + b) / 2 for i, a in enumerate(values) for b in values[i:])
    middle = averages[len(averages) // 2]
    assert low - 1e-12 <= (middle if len(values) >= RANKED else sum(values) / len(values)) <= high + 1e-12


@given(logs, st.floats(-1, 1))
def test_a_shift_of_every_round_shifts_the_interval(values: list[float], by: float) -> None:
    assert interval([v + by for v in values]) == pytest.approx([end + by for end in interval(values)])


@given(st.lists(st.floats(-0.5, 0.5), min_size=RANKED, max_size=30))
def test_one_round_more_that_is_an_outlier_moves_the_interval_no_further_than_the_samples(values: list[float]) -> None:
    low, high = interval([*values, 1e6])
    assert min(values) <= low
    assert high <= (max(values) + 1e6) / 2 or high <= max(values)


def test_fewer_rounds_than_the_least_decide_nothing() -> None:
    assert order([1.0] * (LEAST - 1), [9.0] * (LEAST - 1)) == "undecided"


def test_what_is_nothing_in_every_round_is_tied_and_has_no_ratio_to_anything_else() -> None:
    assert [order([0.0] * 12, [0.0] * 12), order([0.0] * 12, [1.0] * 12)] == ["tied", "undecided"]


@given(seconds)
def test_as_many_rounds_are_needed_whichever_is_first_and_no_fewer_than_there_are(taken: list) -> None:
    mine, theirs = zip(*taken, strict=True)
    assert needed(mine, theirs) == pytest.approx(needed(theirs, mine))
    assert needed(mine, theirs) >= len(taken)


def test_rounds_that_only_one_of_them_ran_are_left_out() -> None:
    assert order([1.0] * 12 + [99.0] * 30, [1.0] * 12) == "tied"


def test_the_places_of_an_interval() -> None:
    tie = math.log1p(TIE)
    assert [place(-2 * tie, -1.1 * tie), place(1.1 * tie, 2 * tie)] == ["less", "greater"]
    assert [place(-tie, tie), place(-2 * tie, 0.0), place(0.0, 2 * tie)] == ["tied", "undecided", "undecided"]


@pytest.mark.parametrize("count", [LEAST, RANKED - 1, RANKED, 24, 48])
def test_equal_things_are_told_apart_no_more_often_than_the_risk_of_a_look(count: int) -> None:
    chance = random.Random(count)

    def heavy_tailed() -> float:
        return chance.gauss(0, 0.1) * (10 if chance.random() < 0.05 else 1)

    missed = 0
    for _ in range(3000):
        low, high = interval([heavy_tailed() for _ in range(count)])
        missed += not low <= 0 <= high
    expected = 3000 * RISK / LOOKS
    assert missed <= expected + 4 * math.sqrt(expected)


def test_a_difference_of_a_twentieth_is_found_in_calm_noise() -> None:
    chance = random.Random(1)
    found = 0
    for _ in range(200):
        mine = [1.00 * math.exp(chance.gauss(0, 0.03)) for _ in range(48)]
        theirs = [1.05 * math.exp(chance.gauss(0, 0.03)) for _ in range(48)]
        found += order(mine, theirs) == "less"
    assert found >= 190
