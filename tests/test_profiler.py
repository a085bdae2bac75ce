from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmbuild.errors import InputError
from llmbuild.profiler import statistics
from llmbuild.profiler.heldout import read_text
from llmbuild.profiler.noise import Snapshot, verdict
from llmbuild.profiler.worker import log_softmax
from llmbuild.spec.recipe import Quality

positive = st.floats(1e-6, 1e3)


@given(st.lists(positive, min_size=1, max_size=30))
def test_a_median_lies_in_its_interval_and_the_interval_in_the_samples(samples: list[float]) -> None:
    r = statistics.median_of(samples)
    assert min(samples) <= r.low <= r.median <= r.high <= max(samples)
    assert r.samples == tuple(samples)


@given(st.lists(positive, min_size=1, max_size=20), st.floats(0.1, 10))
def test_a_paired_ratio_finds_a_constant_factor_exactly_whatever_the_drift(drift: list[float], factor: float) -> None:
    r = statistics.paired_ratio([x * factor for x in drift], drift)
    assert [r.low, r.median, r.high] == pytest.approx([factor] * 3)


def test_equal_samples_give_equal_intervals() -> None:
    assert statistics.median_of([1.0, 2.0, 4.0]) == statistics.median_of([1.0, 2.0, 4.0])


def test_no_samples_and_unpaired_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="no samples"):
        statistics.median_of([])
    with pytest.raises(ValueError, match="equal, positive length"):
        statistics.paired_ratio([1.0], [1.0, 2.0])


def test_stolen_time_is_called_noise() -> None:
    assert "stolen" in verdict(Snapshot(0, 0), Snapshot(10, 100), 64)
    assert verdict(Snapshot(0, 0), Snapshot(1, 100), 64) == ""


def test_log_softmax_is_normalized_and_takes_large_logits() -> None:
    rows = log_softmax(np.array([[1e4, 0.0, -1e4], [1.0, 2.0, 3.0]], np.float32))
    assert np.exp(rows).sum(-1) == pytest.approx([1.0, 1.0])


def test_a_held_out_module_that_is_not_there_is_told() -> None:
    with pytest.raises(InputError, match="no module 'nonesuch'"):
        read_text(Quality(stdlib=("nonesuch",)))
    assert "def heappush" in read_text(Quality(stdlib=("heapq",)))
