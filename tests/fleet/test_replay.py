"""A replica alone: it takes what its load curve says, and what the server was measured to take besides."""

from __future__ import annotations

from dataclasses import replace
from operator import itemgetter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmbuild.fleet.capacity import OperatingPoint
from llmbuild.fleet.profiles.measured import step_of
from llmbuild.fleet.simulate.replay import replay
from llmbuild.fleet.simulate.trace import Asked
from llmbuild.serve import simulate as served
from llmbuild.serve.cores import Cores
from llmbuild.serve.schedule.fcfs import Fcfs
from llmbuild.spec.load_curve import LoadCurve, OwnTime, Work
from tests.support.curves import curve
from tests.support.fleets import node, profile

OWN = OwnTime(step_s=2e-4, row_s=1e-4, request_s=3e-3, end_s=2e-3)
REQUEST = st.tuples(st.floats(0, 0.3), st.integers(1, 400), st.integers(1, 30))
REQUESTS = st.lists(REQUEST, min_size=1, max_size=30, unique_by=itemgetter(0))


def point(known: LoadCurve, rows: int = 16) -> OperatingPoint:
    return OperatingPoint(replace(profile(rows=rows), step=step_of(known), kv_bytes_per_token=0.0), node(), rows)


def asked(*requests: tuple[float, int, int]) -> list[Asked]:
    return [Asked(i, at_s, 0, 0, prompt, output) for i, (at_s, prompt, output) in enumerate(sorted(requests))]


@given(REQUESTS, st.integers(1, 16))
def test_a_replica_is_the_server_s_own_simulation_of_the_curve(
    requests: list[tuple[float, int, int]], rows: int
) -> None:
    own = replace(OWN, request_s=0.0, end_s=0.0, device_factor=1.2, cold_factor=1.7, cold_s=0.05)
    known = replace(curve(), served=own)
    jobs = replay(point(known, rows), asked(*requests), Fcfs())
    host, cores = served.Host(rows, 1 << 20, 1, 1024), Cores(own)
    arrivals = [served.Arrival(*one) for one in sorted(requests)]
    other = served.simulate(arrivals, Fcfs(), host, known.served_s, cores=cores)
    assert [job.first_s for job in jobs] == pytest.approx([life.first_s for life in other.lives], rel=1e-6)
    assert [job.last_s for job in jobs] == pytest.approx([life.end_s for life in other.lives], rel=1e-6)


def test_a_request_alone_waits_for_the_server_and_its_prompt() -> None:
    known = replace(curve(), served=OWN)
    (job,) = replay(point(known), asked((1.0, 64, 3)), Fcfs())
    decodes = [known.served_s(Work.of([(start, 1)])) for start in (64, 65)]
    assert job.ttft_s == pytest.approx(OWN.request_s + known.served_s(Work.of([(0, 64)])))
    assert job.tpot_s == pytest.approx(sum(decodes) / 2)


def test_a_server_wakes_for_a_request_that_finds_it_idle_alone() -> None:
    known = replace(curve(), served=replace(OWN, wake_s=5e-3))
    plain = replace(curve(), served=OWN)
    begun = asked((0.0, 64, 2), (1e-3, 8, 1))
    both, alone = replay(point(known), begun, Fcfs()), replay(point(plain), begun, Fcfs())
    assert [one.first_s - other.first_s for one, other in zip(both, alone, strict=True)] == pytest.approx([5e-3] * 2)


def test_a_request_that_comes_makes_the_step_that_runs_longer() -> None:
    known = replace(curve(), served=OWN)
    alone, _ = replay(point(known), asked((0.0, 64, 2), (10.0, 8, 1)), Fcfs())
    early, _ = replay(point(known), asked((0.0, 64, 2), (1e-3, 8, 1)), Fcfs())
    assert early.first_s == pytest.approx(alone.first_s + OWN.request_s)


def test_what_follows_at_once_waits_for_the_end_of_what_was_before_it() -> None:
    known = replace(curve(), served=OWN)
    plain = replace(known, served=replace(OWN, end_s=0.0))
    begun = asked((0.0, 64, 1), (1e-3, 8, 1))
    (_, after), (_, without) = (replay(point(one), begun, Fcfs()) for one in (known, plain))
    assert after.first_s == pytest.approx(without.first_s + OWN.end_s)
    _, late = replay(point(known), asked((0.0, 64, 1), (10.0, 8, 1)), Fcfs())
    assert late.ttft_s == pytest.approx(OWN.request_s + known.served_s(Work.of([(0, 8)])))


def test_more_requests_than_the_queue_holds_are_rejected() -> None:
    jobs = replay(point(curve(), 1), asked(*[(0.0, 8, 2)] * 300), Fcfs())
    assert [sum(job.ended == end for job in jobs) for end in ("finished", "rejected")] == [257, 43]


def test_plans_count_what_a_request_takes_besides_its_tokens() -> None:
    known, more = replace(curve(), served=OWN), replace(curve(), served=replace(OWN, request_s=0.1))
    assert step_of(known).request_s == pytest.approx(OWN.request_s + OWN.end_s)
    assert step_of(more).times(2.0).request_s == step_of(more).request_s
    assert step_of(known).times(2.0).fit == known.fit.times(2.0)
