"""Schedulers: what every batch of theirs must hold, over states that hypothesis draws."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmbuild.cli.serve import SCHEDULERS
from llmbuild.errors import InputError
from llmbuild.serve.schedule.fcfs import Fcfs
from llmbuild.serve.schedule.named import NAMES, scheduler
from llmbuild.serve.schedule.sarathi import Sarathi
from llmbuild.serve.schedule.state import Entry, Share, State


@st.composite
def states(draw: st.DrawFn) -> State:
    """Draw a state: sequences that decode, begun prompts, and those that wait."""
    kinds = draw(st.lists(st.one_of(st.just(0), st.integers(1, 40)), max_size=6))
    running = [Entry(n, rest or 1, not rest, float(n)) for n, rest in enumerate(kinds)]
    lengths = draw(st.lists(st.integers(1, 40), max_size=6))
    waiting = [Entry(len(kinds) + n, rest, False, float(n)) for n, rest in enumerate(lengths)]
    return State(tuple(running), tuple(waiting), draw(st.integers(0 if running else 1, 5)))


POLICIES = [Fcfs(16), Fcfs(1), Sarathi(16, 1), Sarathi(16, 6), Sarathi(2, 4), Sarathi(1, 1)]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@given(state=states())
def test_what_every_batch_holds(policy: Fcfs | Sarathi, state: State) -> None:
    batch = policy(state, 0.0)
    entries = {one.number: one for one in (*state.running, *state.waiting)}
    numbers = [share.number for share in batch.shares]
    assert len(set(numbers)) == len(numbers)
    assert all(0 < share.tokens <= entries[share.number].pending for share in batch.shares)
    assert bool(batch.shares) == bool(entries)
    assert {one.number for one in state.running if one.decoding} <= set(numbers)
    admitted = [n for n in numbers if n in {one.number for one in state.waiting}]
    assert admitted == [one.number for one in state.waiting[: len(admitted)]]
    assert len(admitted) <= state.free
    assert policy(state, 0.0) == batch


@given(states())
def test_whole_prompts_are_never_cut(state: State) -> None:
    pending = {one.number: one.pending for one in (*state.running, *state.waiting)}
    assert all(share.tokens == pending[share.number] for share in Fcfs(16)(state, 0.0).shares)


@pytest.mark.parametrize("policy", [p for p in POLICIES if isinstance(p, Sarathi)], ids=str)
@given(state=states())
def test_pieces_are_of_the_budget_and_cut_where_they_may_be(policy: Sarathi, state: State) -> None:
    entries = {one.number: one for one in (*state.running, *state.waiting)}
    prompts = [share for share in policy(state, 0.0).shares if not entries[share.number].decoding]
    decodes = sum(one.decoding for one in state.running)
    spent = sum(share.tokens for share in prompts)
    assert spent + decodes <= max(policy.budget, decodes + policy.cut)
    for share in prompts:
        assert share.tokens == entries[share.number].pending or share.tokens % policy.cut == 0
    first = [one.number for one in state.running if not one.decoding] + [one.number for one in state.waiting]
    if any(not one.decoding for one in state.running) or (state.waiting and state.free):
        assert prompts[0].number == first[0]  # the first in line always gets on


def test_a_long_prompt_does_not_wait_for_ever() -> None:
    decoding = tuple(Entry(n, 1, True, 0.0) for n in range(8))
    state = State((*decoding, Entry(9, 30, False, 0.0)), (), 0)
    assert Sarathi(4, 6)(state, 0.0).shares[-1] == Share(9, 6)
    assert Fcfs(4)(State(decoding, (Entry(9, 30, False, 0.0),), 1), 0.0).shares[-1] == Share(9, 30)


def test_the_command_names_the_schedulers_that_there_are() -> None:
    assert SCHEDULERS == NAMES
    assert scheduler("sarathi", 6, "m") == Sarathi(cut=6)
    with pytest.raises(InputError, match=r"the variant of m computes other bits for .* in pieces: take fcfs"):
        scheduler("sarathi", 0, "m")
    with pytest.raises(InputError, match="no scheduler lifo"):
        scheduler("lifo", 1, "m")
