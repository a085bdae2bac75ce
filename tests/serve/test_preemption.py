"""Admission by what is expected, and sequences that lose their place and are computed again: their answers stay."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbuild.cli.serve import ADMISSIONS
from llmbuild.errors import InputError
from llmbuild.serve import admission
from llmbuild.serve.admission import EXPECTED, NAMES, WORST_CASE, Expected
from llmbuild.serve.api.metrics import Metrics
from llmbuild.serve.blocks import Blocks, Chain
from llmbuild.serve.engine import Engine
from llmbuild.serve.errors import RequestRefused
from llmbuild.serve.events import Delta, Event
from llmbuild.serve.offline import LLM
from llmbuild.serve.per_sequence import PerSequenceStep
from llmbuild.serve.request import Request
from llmbuild.serve.schedule.fcfs import Fcfs
from llmbuild.serve.schedule.sarathi import Sarathi
from llmbuild.serve.schedule.state import Scheduler
from llmbuild.serve.served import Plan, Settings, _admission
from llmbuild.serve.speculate import Speculation
from tests.serve.test_engine import Counted
from tests.serve.test_faults import POLICIES, Cycle
from tests.support.serving import CONTEXT, PAGE, Bench, FakeStep, request, text_of

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))

import admission as bench_script

KINDS: list[dict[str, Any]] = [
    {"ignore_eos": True},
    {"temperature": 1.4, "n": 2},
    {"logprobs": 3, "temperature": 0.7},
    {"frequency_penalty": 1.2, "presence_penalty": 0.5, "repetition_penalty": 1.3},
    {"min_tokens": 12, "temperature": 1.0},
    {"stop": ["bc", "é€"], "temperature": 1.3, "ignore_eos": True},
    {"logit_bias": {2: 8.0, 3: 8.0, 4: 8.0, 5: 8.0}, "temperature": 2.0, "ignore_eos": True},  # halves of characters
]
"""What an answer has of its own; none has `max_tokens`, so each may fill the context."""


WHOLE = Fcfs(96)


def mixed() -> list[Request]:
    """Return requests of all kinds, one of them with a grammar."""
    made = [request(f"r{n}", [n + 1, n + 2, n + 3], n, max_tokens=None, **kind) for n, kind in enumerate(KINDS)]
    held = request("held", [50, 51], 9, max_tokens=18, temperature=1.0, ignore_eos=True)
    return [*made, replace(held, grammar=cast(Any, Cycle((10, 20, 30, 40))))]


@cache
def each_alone() -> list[list[Event]]:
    """Return what is said of the sequences of these requests where each has an engine for itself."""
    return [events for one in mixed() for events in ran(Bench(slots=1), [one])]


def tight(policy: Scheduler = WHOLE, slots: int = 4, blocks: int = 7, **more: Any) -> Bench:
    """Return an engine with a block more than one context has, that admits by what is expected."""
    made = Bench(slots, policy, observer=Counted(), admission=EXPECTED, **more)
    made.step.tables.blocks = Blocks(blocks)
    return made


def ran(bench: Bench, made: Sequence[Request]) -> list[list[Event]]:
    """Return all that is said of each sequence."""
    for one in made:
        bench.engine.submit(one)
    bench.settle()
    bench.step.tables.check()
    assert bench.step.tables.blocks.free == bench.step.room
    return [bench.of(one.id, index) for one in made for index in range(one.params.n)]


def until_lost(bench: Bench) -> None:
    """Take turns until a sequence has lost its place."""
    while not bench.observer.losses:
        assert bench.engine.turn(), "memory was never short"


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_answers_that_are_computed_again_are_told_once_and_are_those_of_sequences_alone(policy: Scheduler) -> None:
    """Tokens, texts, log-probabilities and ends: each event, and nothing twice."""
    bench = tight(policy)
    found = ran(bench, mixed())
    assert bench.observer.losses > 3
    assert found == each_alone()


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("period", [2, 5])
def test_answers_with_guesses_are_the_same_where_memory_is_short(policy: Scheduler, period: int) -> None:
    bench, plain = tight(policy, speculation=Speculation()), Bench(slots=1)
    for one in (bench, plain):
        one.step.forced = {n: 3 + n % period for n in range(CONTEXT + 1)}
    made = [request(f"r{n}", [n + 9, *range(n)], max_tokens=CONTEXT - 2 * n, ignore_eos=True) for n in range(5)]
    made.append(mixed()[-1])  # tokens that a grammar forces are guessed too
    assert ran(bench, made) == ran(plain, made)
    assert bench.observer.losses > 0 and bench.step.kept > 0


def test_sequences_that_begin_alike_are_preempted_though_others_hold_their_blocks() -> None:
    """Blocks of the beginning that others refer to are neither freed nor counted against those that wait."""
    common = list(range(1, 1 + 2 * PAGE))
    made = [request(f"r{n}", [*common, 20 + n], n, max_tokens=14, temperature=1.0, ignore_eos=True) for n in range(5)]
    bench = tight(slots=5, blocks=9)
    ran(bench, [request("first", [*common, 60], max_tokens=1)])
    for one in made:
        bench.engine.submit(one)
    for _ in range(2):
        bench.engine.turn()
    assert bench.engine.snapshot().running == 3  # by all that each may take it would be one
    bench.settle()
    alone = [ran(Bench(slots=1), [one]) for one in made]
    told = [[replace(e, cached=0) for e in bench.of(one.id) if isinstance(e, Delta)] for one in made]
    assert [told] == [[one for (one,) in alone]]
    assert bench.observer.losses > 0


def test_the_first_is_computed_in_every_step_and_the_last_lose_their_place() -> None:
    bench = tight(slots=3)
    for name in "abc":
        bench.submit(name, [ord(name) - 90, 5], max_tokens=None, ignore_eos=True)
    ends = []
    while bench.engine.turn():
        if len(bench.tokens("a")) < CONTEXT - 1:
            assert len(bench.tokens("a")) == bench.step.steps
        ends += [name for name in "abc" if bench.ends(name) and name not in ends]
    assert ends == ["a", "b", "c"] and bench.observer.losses >= 2
    assert bench.step.steps < 3 * (CONTEXT - 1), "b and c ran beside others meanwhile"


def test_a_lower_priority_is_preempted_first_and_returns_to_its_place() -> None:
    bench = tight(slots=2)
    bench.submit("low", [1, 2], max_tokens=None, ignore_eos=True, priority=3)
    bench.submit("high", [3, 4], max_tokens=None, ignore_eos=True)
    bench.submit("lowest", [5, 6], max_tokens=None, ignore_eos=True, priority=9)
    until_lost(bench)
    assert [one.request.id for one in bench.engine._waiting] == ["low", "lowest"]
    assert bench.tokens("low") and bench.engine.snapshot().waiting == 2
    bench.settle()
    assert [bench.ends(name) for name in ("low", "high", "lowest")] == [["length"]] * 3
    first = [e.request for e in bench.events if isinstance(e, Delta) and e.finish]
    assert first == ["high", "low", "lowest"]


def test_what_was_computed_is_found_again_where_nobody_has_used_its_memory() -> None:
    bench = tight(slots=2)
    bench.submit("a", [1, 2], max_tokens=None, ignore_eos=True)
    bench.submit("b", [3, 4], max_tokens=None, ignore_eos=True)
    until_lost(bench)
    kept = len(bench.tokens("b"))
    bench.engine.cancel("a")
    bench.engine.turn()
    assert bench.step.found >= PAGE and len(bench.tokens("b")) == kept + 1
    bench.settle()
    assert (bench.ends("a"), bench.ends("b")) == (["cancelled"], ["length"])


@pytest.mark.parametrize("how", ["cancel", "deadline", "close"])
def test_a_preempted_sequence_ends_once_where_it_waits(how: str) -> None:
    bench = tight(slots=2)
    bench.submit("a", [1, 2], max_tokens=None, ignore_eos=True)
    bench.submit("b", [3, 4], max_tokens=None, ignore_eos=True, deadline_s=50.0)
    until_lost(bench)
    if how == "cancel":
        bench.engine.cancel("b")
    elif how == "deadline":
        bench.clock.now += 60
    else:
        bench.engine.close()
        bench.engine.run()
    bench.settle()
    assert bench.ends("b") == [{"cancel": "cancelled", "deadline": "deadline", "close": "closed"}[how]]
    (lived,) = [one for one in bench.observer.lives if one.prompt_tokens == 2 and one.reason == "abort"][-1:]
    assert lived.admitted_s is not None and lived.tokens == len(bench.tokens("b"))
    assert bench.engine.snapshot().waiting == bench.engine.snapshot().running == 0
    assert bench.step.tables.blocks.free == bench.step.room


def test_a_server_that_ends_finishes_what_was_preempted() -> None:
    said: list[Event] = []
    step = FakeStep(3, contexts=1)
    counted = Counted()
    engine = Engine(step, Fcfs(), text_of, said.extend, observer=counted, admission=Expected(step.tables))
    for n in range(3):
        engine.submit(request(f"r{n}", [n + 1, 2], max_tokens=None, ignore_eos=True))
    engine.start()
    assert engine.drain(20)
    engine.close()
    finished = [event.request for event in said if isinstance(event, Delta) and event.finish]
    assert sorted(finished) == ["r0", "r1", "r2"] and counted.losses > 0
    assert len(said) == 3 * (CONTEXT - 1)


def test_a_prompt_that_is_preempted_before_its_first_token_is_told_of_as_new() -> None:
    bench = tight(Sarathi(2, 1), slots=2, blocks=9)
    bench.submit("a", [1] * 3, max_tokens=None, ignore_eos=True)
    made = bench.submit("b", list(range(1, 21)), max_tokens=2, ignore_eos=True)
    until_lost(bench)
    assert (bench.tokens("b"), bench.step.found) == ([], 0)
    bench.settle()
    assert bench.step.found > 0, "its own beginning was there"
    assert bench.of("b") == ran(Bench(slots=1), [made])[0]  # `cached` is 0: no other had computed it


# --- who is admitted -------------------------------------------------------------------------------------------------


def test_more_run_at_a_time_than_by_the_worst_case() -> None:
    steps, running = {}, {}
    for name in NAMES:
        bench = Bench(slots=7, contexts=2, scheduler=Fcfs(96), observer=Counted(), admission=name)
        for n in range(7):
            bench.submit(f"r{n}", [n + 1, 7], max_tokens=None, stop_token_ids=list(range(0, 64, 4)))
        bench.settle()
        running[name], steps[name] = bench.observer.turns[0].sequences, bench.step.steps
    assert running == {WORST_CASE: 2, EXPECTED: 6}  # six blocks of twelve each, or two
    assert steps[EXPECTED] < steps[WORST_CASE]


def test_what_answers_before_had_is_expected_of_the_next() -> None:
    bench = tight(slots=8, blocks=13)
    for n in range(8):
        bench.submit(f"known{n}", [n + 1, 7], max_tokens=11, ignore_eos=True)
        bench.settle()
    for n in range(8):
        bench.submit(f"r{n}", [n + 20, 7], max_tokens=None, ignore_eos=True)
    bench.engine.turn()
    assert bench.engine.snapshot().running == 4  # 2 + 11 - 1 positions are three blocks each, and one stays free
    bench.settle()
    assert [bench.ends(f"r{n}") for n in range(8)] == [["length"]] * 8


def test_what_answers_before_had_is_told_to_those_that_wait_already() -> None:
    bench = tight(slots=1, blocks=6)
    for n in range(10):
        bench.submit(f"r{n}", [n + 1], max_tokens=5, ignore_eos=True)
    while len([one for one in bench.events if getattr(one, "finish", None)]) < 8:
        bench.engine.turn()
    assert [one.predicted for one in bench.engine._waiting] == [5.0] * len(bench.engine._waiting) != []


def test_only_what_can_never_fit_is_refused() -> None:
    bench = tight(blocks=3)
    with pytest.raises(RequestRefused, match="take up to 4 blocks of memory; this server has 3") as told:
        bench.submit("over", [1] * 5, max_tokens=9)
    assert told.value.param == "max_tokens"
    made = [request(f"r{n}", [n + 1] * 5, max_tokens=8, ignore_eos=True) for n in range(3)]
    assert ran(bench, made) == [events for one in made for events in ran(Bench(slots=1), [one])]


def test_memory_that_is_taken_is_told_and_not_what_is_expected() -> None:
    bench = tight(slots=2, blocks=10)
    bench.submit("r", [1, 2, 3], max_tokens=None, ignore_eos=True)
    bench.engine.turn()
    assert bench.engine.snapshot().used == pytest.approx(0.1)
    for _ in range(2):
        bench.engine.turn()
    assert bench.engine.snapshot().used == pytest.approx(0.2)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=4), st.integers(1, 9))
def test_blocks_that_others_hold_are_counted_by_their_references(texts: list[tuple[int, int]], length: int) -> None:
    blocks, names = Blocks(40), Chain(1, b"").add(range(9))
    held = []
    for kept, given_back in texts:
        mine = [*blocks.take(names[:kept])]
        mine += [blocks.new() for _ in names[len(mine) : kept]]
        for block, name in zip(mine, names, strict=False):
            blocks.name(block, name)
        if given_back > 4:
            blocks.give(mine)
        else:
            held.append(mine)
    asked = names[:length]
    free = blocks.free
    beside = blocks.beside(asked)
    found = blocks.take(asked)
    assert free - blocks.free == len(found) - beside
    blocks.check([*held, found])


# --- what is told and how it is asked for ----------------------------------------------------------------------------


def test_preemptions_are_counted_by_vllms_name_and_prompts_once() -> None:
    metrics = Metrics()
    observer = metrics.observe("m")
    bench = Bench(slots=3, contexts=1, scheduler=Fcfs(96), observer=observer, admission=EXPECTED)
    lost: list[str] = []
    preempt = bench.engine._preempt
    bench.engine._preempt = lambda one: (lost.append(one.request.id), preempt(one))[1]  # type: ignore[method-assign]
    for n in range(3):
        bench.submit(f"r{n}", [n + 1, 2], max_tokens=None, ignore_eos=True)
    bench.settle()
    told = metrics.text().decode()
    labels = '{engine="0",model_name="m"}'
    assert lost and f"vllm:num_preemptions_total{labels} {float(len(lost))}" in told
    assert f"vllm:prefix_cache_queries_total{labels} 6.0" in told
    assert f"vllm:generation_tokens_total{labels} {3 * (CONTEXT - 1):.1f}" in told


def test_a_variant_with_a_cache_for_each_sequence_refuses_what_gains_nothing() -> None:
    step = cast(PerSequenceStep, SimpleNamespace())
    told = "m: admission expected needs a variant whose sequences share a cache in blocks: one with kernel=own"
    with pytest.raises(InputError, match=told):
        _admission("m", step, Plan(admission=EXPECTED))
    assert isinstance(_admission("m", step, Plan()), admission.WorstCase)


def test_the_names_are_those_of_the_command_and_of_each_model() -> None:
    assert ADMISSIONS == NAMES
    asked = Settings(admission=EXPECTED, plans={"a": Plan()})
    assert (asked.of("a").admission, asked.of("b").admission) == (WORST_CASE, EXPECTED)
    with pytest.raises(InputError, match="admission 'best' is unknown: worst-case or expected"):
        LLM("m", admission="best")


def test_the_comparison_of_admissions_answers_the_same_in_fewer_steps(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--contexts 1 --context 256 --requests 24 --sequences 6 --prompt 4 --output 60 --json"
    bench_script.main(words.split())
    worst, expected, unknown = json.loads(capsys.readouterr().out)
    assert (worst["admission"], worst["sequences"], worst["preempted"], worst["again"]) == (WORST_CASE, 1.0, 0, 0)
    assert unknown["preempted"] > 0 and unknown["again"] > 0
    assert expected["steps"] < worst["steps"] / 1.5 and expected["seconds"] < worst["seconds"]
