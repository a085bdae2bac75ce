"""Kinds of work that are timed in turn on a machine whose speed drifts."""

from __future__ import annotations

import random
from statistics import median

import pytest

from llmbuild.profiler.drift import levelled

KINDS = {name: 0.001 * 1.3**i for i, name in enumerate("abcdefghijklmnop")}


def visits(drift: float, noise: float, rounds: int, seed: int) -> list[list[tuple[str, float]]]:
    """Return stretches of eight visits; the machine's speed walks at random, a step for each stretch."""
    drawn, slow, found = random.Random(seed), 1.0, list[list[tuple[str, float]]]()
    for _ in range(rounds):
        order = drawn.sample(list(KINDS), len(KINDS))
        for half in (order[:8], order[8:]):
            slow *= 1 + drawn.uniform(-drift, drift)
            found.append([(kind, KINDS[kind] * slow * (1 + drawn.gauss(0, noise))) for kind in half])
    return found


def worst(taken: dict[str, list[float]]) -> float:
    """Return the largest error of a kind's median, when the kinds are scaled alike."""
    ratios = {kind: median(seconds) / KINDS[kind] for kind, seconds in taken.items()}
    level = median(ratios.values())
    return max(abs(ratio / level - 1) for ratio in ratios.values())


def by_kind(stretches: list[list[tuple[str, float]]]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for kind, seconds in (one for stretch in stretches for one in stretch):
        found.setdefault(kind, []).append(seconds)
    return found


@pytest.mark.parametrize("seed", range(5))
def test_what_all_kinds_have_in_common_is_the_machine_s_and_is_taken_out(seed: int) -> None:
    taken, slow = levelled(visits(0.3, 0, 5, seed))
    assert worst(taken) < 1e-3
    assert (len(slow), median(slow)) == (10, pytest.approx(1, rel=0.1))


def test_errors_of_kinds_become_smaller_on_a_machine_that_drifts_and_no_larger_on_one_that_does_not() -> None:
    def errors(drift: float) -> tuple[float, float]:
        runs = [visits(drift, 0.02, 5, seed) for seed in range(20)]
        return median(worst(levelled(run)[0]) for run in runs), median(worst(by_kind(run)) for run in runs)

    level, plain = errors(0.3)
    assert level < plain / 4
    level, plain = errors(0)
    assert level < 1.2 * plain


def test_on_a_steady_machine_seconds_stay_as_they_are() -> None:
    run = visits(0, 0, 3, 0)
    taken, slow = levelled(run)
    assert slow == pytest.approx((1,) * 6)
    assert {kind: pytest.approx(seconds) for kind, seconds in taken.items()} == by_kind(run)
