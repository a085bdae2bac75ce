"""Rates that a server holds: the simulated clock against what can be computed by hand, and the search for the rate."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmbuild.errors import InputError
from llmbuild.serve.capacity import Lengths, Server, capacity, outcome, parse_lengths, parse_rate, roughly
from llmbuild.serve.engine import Limits
from llmbuild.serve.own_time import measured
from llmbuild.serve.schedule.fcfs import Fcfs
from llmbuild.serve.schedule.sarathi import Sarathi
from llmbuild.serve.schedule.state import Scheduler
from llmbuild.serve.schedule.vtc import Vtc
from llmbuild.serve.simulate import Arrival, Host, simulate
from llmbuild.spec.load_curve import Work
from llmbuild.spec.slo import Bound
from tests.support.curves import curve
from tests.support.serving import CONTEXT, PAGE, Bench

HOST = Host(slots=8, blocks=8 * 32, page=32, context=1024)
SERVER = Server(curve(), HOST, Fcfs(), "fcfs")


def test_one_request_takes_its_prompt_and_its_tokens() -> None:
    run = simulate([Arrival(1.0, 10, 3)], Fcfs(), HOST, lambda work: 0.5 if work.prompts else 0.25)
    (life,) = run.lives
    assert (life.first_s, life.end_s, life.tokens, run.steps) == (1.5, 2.0, 3, 3)
    assert (life.ttft_s, life.tpot_s, life.e2e_s) == (0.5, 0.25, 1.0)


def test_positions_of_decodes_grow_with_the_answer() -> None:
    works: list[Work] = []
    simulate([Arrival(0.0, 10, 4)], Sarathi(budget=6), HOST, lambda work: works.append(work) or 1.0)  # type: ignore[func-returns-value]
    assert works == [Work.of([p]) for p in ((0, 6), (6, 4), (10, 1), (11, 1), (12, 1))]


def test_a_request_that_never_fits_is_refused() -> None:
    with pytest.raises(ValueError, match=r"1024 \+ 900 tokens does not fit"):
        simulate([Arrival(0.0, 1024, 900)], Fcfs(), replace(HOST, blocks=31), lambda work: 1.0)


@given(st.lists(st.tuples(st.floats(0, 5), st.integers(1, 20), st.integers(1, 4)), min_size=1, max_size=20), st.data())
def test_the_simulated_server_runs_the_steps_that_the_engine_runs(
    asked: list[tuple[float, int, int]], data: st.DataObject
) -> None:
    scheduler: Scheduler = data.draw(st.sampled_from([Fcfs(8), Sarathi(6, 1), Vtc(6, 1)]))
    arrivals = [Arrival(0.0, prompt, output) for _, prompt, output in asked]
    contexts = data.draw(st.integers(1, 3))
    bench = Bench(slots=3, scheduler=scheduler, contexts=contexts, limits=Limits(queue=64))
    bench.step.shares = False
    ran: list[Work] = []
    bench.step._before = lambda batch: ran.append(Work.of((rows.start, len(rows.tokens)) for rows in batch))
    for i, one in enumerate(arrivals):
        prompt = [1 + (i * 7 + j) % 60 for j in range(one.prompt)]
        bench.submit(str(i), prompt, max_tokens=one.output, ignore_eos=True)
    bench.settle()
    works: list[Work] = []
    host = Host(3, contexts * -(-CONTEXT // PAGE), PAGE, CONTEXT)
    run = simulate(arrivals, scheduler, host, lambda work: works.append(work) or 1.0)  # type: ignore[func-returns-value]
    assert works == ran
    assert [life.tokens for life in run.lives] == [one.output for one in arrivals]


def test_percentiles_are_of_requests_and_a_queue_that_grows_is_told() -> None:
    calm, flooded = outcome(SERVER, 0.01, Lengths()), outcome(SERVER, 500.0, Lengths())
    assert calm.steady and not flooded.steady
    assert calm.values["ttft_s_p99"] < 1.0 < flooded.values["ttft_s_p99"]
    assert calm.values["ttft_s_p50"] <= calm.values["ttft_s_p99"]
    assert flooded.misses([]) == ["the queue grows without end"]


def test_the_highest_rate_is_held_and_a_little_more_is_not() -> None:
    bounds = (Bound("ttft_s_p99", "<=", 1.0), Bound("tpot_s_p99", "<=", 0.2))
    found = capacity(SERVER, Lengths(64, 16), bounds)
    assert found.outcome is not None and found.outcome.misses(bounds) == []
    assert outcome(SERVER, found.rate * 1.05, Lengths(64, 16), bounds).misses(bounds) != []
    assert 0 < found.sure < found.rate


def test_what_is_not_held_by_a_request_alone_is_held_at_no_rate() -> None:
    found = capacity(SERVER, Lengths(512, 16), (Bound("ttft_s_p99", "<=", 1e-3),))
    assert (found.rate, found.sure, found.outcome) == (0.0, 0.0, None)


def test_faster_steps_hold_more() -> None:
    bounds = (Bound("ttft_s_p99", "<=", 1.0),)
    rates = [roughly(replace(SERVER, slower=by), Lengths(64, 16), bounds) for by in (2.0, 1.0)]
    assert rates[0] * 1.5 < rates[1]


@given(st.integers(0, 10_000))
def test_lengths_fit_in_the_context(seed: int) -> None:
    prompt, output = Lengths(900, 900).drawn(random.Random(seed), 1024)
    assert prompt >= 1 and output >= 1 and prompt + output <= 1024


@pytest.mark.parametrize("text", ["", "5", "0:5", "a:b", "-1:4", "1:2:3", "99999999:1"])
def test_lengths_that_cannot_be_read_are_told(text: str) -> None:
    with pytest.raises(InputError, match="--lengths"):
        parse_lengths(text)


def test_rates_are_requests_per_second() -> None:
    assert (parse_rate("5/s"), parse_rate("0.5")) == (5.0, 0.5)
    for wrong in ("", "0/s", "-1", "nan", "inf/s", "5/m"):
        with pytest.raises(InputError, match="--rate"):
            parse_rate(wrong)


def test_the_engine_s_own_time_is_some_microseconds_a_sequence() -> None:
    found = measured()
    assert set(found) == {"turn_s", "row_s"}
    assert all(0 <= value < 0.01 and math.isfinite(value) for value in found.values())
    assert sum(found.values()) > 1e-6
