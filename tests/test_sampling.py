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
