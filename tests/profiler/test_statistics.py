"""Intervals and pairs of samples: what few samples say, and which samples of a race belong together."""

from __future__ import annotations

from random import Random
from typing import cast

from hypothesis import given
from hypothesis import strategies as st

from llmbuild.profiler import rounds
from llmbuild.profiler.live import Live
from llmbuild.profiler.noise import Shares
from llmbuild.profiler.protocol import Protocol
from llmbuild.profiler.statistics import few_of
from llmbuild.spec.workload import Workload


@given(st.lists(st.floats(1e-6, 1e3), min_size=2, max_size=5))
def test_a_few_samples_have_a_wide_interval(samples: list[float]) -> None:
    found = few_of(samples)
    assert found.low <= min(samples) <= found.median <= max(samples) <= found.high
    assert found.samples == tuple(samples)


class Visited:
    prompt = None


def test_equal_places_in_the_samples_of_a_race_are_pairs_also_where_few_rounds_were_calm() -> None:
    made = rounds.Rounds(Workload("chat", 128, 64, 192), Random(0), Protocol())
    stayed, left = (cast(Live, Visited()) for _ in range(2))
    made.taken = {stayed: {"tpot_s": [float(i) for i in range(24)]}, left: {"tpot_s": [float(i) for i in range(12)]}}
    made.shares = [Shares(0.0, 0.5 if i < 9 else 0.0) for i in range(24)]
    for one, other in ((stayed, left), (left, stayed)):
        assert made.samples(one, 5)["tpot_s"][:12] == made.samples(other, 5)["tpot_s"][:12]
    brief = cast(Live, Visited())
    made.taken[brief] = {"tpot_s": [float(i) for i in range(5)]}
    made.shares = [Shares(0.0, 0.5 if i == 2 else 0.0) for i in range(24)]
    assert made.pairs(stayed, brief, 5)["tpot_s"] == [(float(i),) * 2 for i in (0, 1, 3, 4)]
    assert len(made.samples(stayed, 5)["tpot_s"]) == 23, "who leaves first keeps no disturbed round for others"
