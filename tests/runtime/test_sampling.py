from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from llmbuild.errors import InputError
from llmbuild.runtime.sampling import Sampler, Sampling

logits = arrays(np.float32, st.integers(1, 40), elements=st.floats(-50, 50, width=32))


@given(logits, st.integers(1, 5))
def test_top_k_draws_only_from_the_k_most_likely(row: np.ndarray, k: int) -> None:
    token = Sampler(Sampling(temperature=1.0, top_k=k)).choose(row)
    assert (row > row[token]).sum() < k


@given(logits, st.floats(0.01, 1.0))
def test_top_p_never_draws_a_token_outside_the_nucleus(row: np.ndarray, share: float) -> None:
    token = Sampler(Sampling(temperature=1.0, top_p=share)).choose(row)
    weights = np.exp(row.astype(np.float64) - row.max())
    weights /= weights.sum()
    assert weights[weights > weights[token]].sum() <= share + 1e-9  # logits that differ may weigh the same


@given(logits, st.integers(0, 9))
def test_the_same_seed_draws_the_same(row: np.ndarray, seed: int) -> None:
    first, second = (Sampler(Sampling(temperature=0.7, seed=seed)) for _ in range(2))
    assert [first.choose(row) for _ in range(5)] == [second.choose(row) for _ in range(5)]


def test_draws_follow_the_softmax() -> None:
    row = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    sampler = Sampler(Sampling(temperature=1.0))
    counts = np.bincount([sampler.choose(row) for _ in range(4000)], minlength=3) / 4000
    assert counts == pytest.approx([0.5, 0.3, 0.2], abs=0.03)


def test_a_cold_draw_is_greedy() -> None:
    row = np.array([1.0, 3.0, 2.0], np.float32)
    assert {Sampler(Sampling(temperature=1e-3, seed=s)).choose(row) for s in range(20)} == {1}


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}])
def test_what_makes_no_sense_is_refused(bad: dict) -> None:
    with pytest.raises(InputError):
        Sampling(**bad)


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": "hot"},
        {"temperature": None},
        {"temperature": True},
        {"top_k": 1.5},
        {"top_k": "all"},
        {"top_p": [0.5]},
        {"top_p": float("nan")},
        {"seed": -1},
        {"seed": 1.0},
        {"seed": 2**64},
        {"seeds": 1},
    ],
)
def test_what_is_no_sampling_is_told_by_name(bad: dict) -> None:
    with pytest.raises(InputError, match=next(iter(bad))):
        Sampling.of(bad)


@pytest.mark.parametrize("row", [[1.0, 2.0], np.zeros((1, 2), np.float32), np.zeros(0, np.float32), np.zeros(2, int)])
def test_what_are_no_logits_is_refused(row: object) -> None:
    with pytest.raises(InputError, match="logits must be a row"):
        Sampler(Sampling(temperature=1.0)).choose(row)


@pytest.mark.parametrize("worst", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_told(worst: float) -> None:
    with pytest.raises(InputError, match="nothing can be drawn"):
        Sampler(Sampling(temperature=1.0)).choose(np.array([0.0, worst, 1.0], np.float32))


@given(logits, st.sampled_from([1e-320, 1e-45, 1e300]), st.integers(0, 9))
def test_any_finite_temperature_draws_a_token(row: np.ndarray, temperature: float, seed: int) -> None:
    token = Sampler(Sampling(temperature=temperature, seed=seed)).choose(row)
    assert float(row.max()) - float(row[token]) <= 1000 * temperature  # what is less likely has probability 0


@given(st.integers(0, 5), st.integers(0, 5), st.integers(0, 5), st.integers(0, 5))
def test_sequences_of_any_seeds_draw_apart(seed: int, other: int, first: int, second: int) -> None:
    row = np.zeros(1000, np.float32)
    draws = [Sampler(Sampling(temperature=1.0, seed=s), n) for s, n in ((seed, first), (other, second))]
    one, two = ([sampler.choose(row) for _ in range(8)] for sampler in draws)
    assert (one == two) == ((seed, first) == (other, second))


def test_the_first_sequence_draws_what_it_draws_alone() -> None:
    row, hot = np.zeros(1000, np.float32), Sampling(temperature=1.0, seed=3)
    one, two = Sampler(hot), np.random.default_rng(3)
    assert [one.choose(row) for _ in range(3)] == [
        int(two.choice(np.arange(1000), p=np.full(1000, 1e-3))) for _ in "abc"
    ]
