"""Faults that engines of other servers had, held against ours: `docs/explanation/serving-faults.md` lists them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from llmbuild.serve.blocks import Blocks
from llmbuild.serve.engine import Limits
from llmbuild.serve.errors import Unavailable
from llmbuild.serve.events import Delta
from llmbuild.serve.request import Request
from llmbuild.serve.schedule.fcfs import Fcfs
from llmbuild.serve.schedule.isrtf import Isrtf
from llmbuild.serve.schedule.sarathi import Sarathi
from llmbuild.serve.schedule.state import Batch, Scheduler, State
from llmbuild.serve.speculate import Speculation
from llmbuild.serve.step import Output, Rows
from tests.support.serving import ADAPTIVE, CONTEXT, PAGE, Bench, FakeStep, alone, request

POLICIES: list[Scheduler] = [Fcfs(8), Sarathi(1, 1), Sarathi(5, 2), *ADAPTIVE]


def said(bench: Bench, made: Request, index: int = 0) -> tuple[list[int], str, list[str]]:
    """Return tokens, text and ends of a sequence."""
    return bench.tokens(made.id, index), bench.text(made.id, index), bench.ends(made.id, index)


def with_blocks(bench: Bench, count: int) -> Bench:
    """Leave a device so many blocks."""
    bench.step.tables.blocks = Blocks(count)
    return bench


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_two_prompts_that_do_not_fit_together_run_one_after_the_other(policy: Scheduler) -> None:
    """The second holds no block while the first runs, however small the pieces are in which prompts come."""
    bench = with_blocks(Bench(slots=2, scheduler=policy), 5)
    made = [request(name, [n + 1] * 12, max_tokens=4, ignore_eos=True) for n, name in enumerate("ab")]
    for one in made:
        bench.engine.submit(one)
    waited = 0
    while bench.engine.turn():
        waited += bench.engine.snapshot().waiting
        assert len(bench.step.taken) <= 1
    assert waited > 0
    assert [said(bench, one) for one in made] == [alone(one) for one in made]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_all_kinds_of_waiting_at_once_come_to_an_end(policy: Scheduler) -> None:
    """For a slot, for memory, for those of higher priority, for another tenant, behind a prompt that begins alike."""
    bench = with_blocks(Bench(slots=2, scheduler=policy), 7)
    common = [5, 6, 7, 8, 9]
    kinds: list[dict[str, Any]] = [
        {"prompt": [1] * 20, "max_tokens": 5},
        {"prompt": [2, 3], "max_tokens": 3, "priority": 5},
        {"prompt": [*common, 1], "max_tokens": 4},
        {"prompt": [*common, 2], "max_tokens": 4, "tenant": "another", "salt": b"another"},
        {"prompt": [*common, 3], "max_tokens": 4, "priority": -3},
        {"prompt": [4], "max_tokens": None, "n": 2, "ignore_eos": True},
        {"prompt": [9, 9], "max_tokens": 6, "temperature": 1.2},
    ]
    made = [request(f"r{n}", **kind) for n, kind in enumerate(kinds)]
    for one in made:
        bench.engine.submit(one)
    while bench.engine.turn():
        bench.clock.now += 1.0
        assert bench.engine.snapshot().idle_s < 5
    for one in made:
        for index in range(one.params.n):
            assert said(bench, one, index) == alone(one, index)
    assert bench.engine.snapshot().used == 0


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_sequences_with_one_beginning_never_wait_for_a_block_that_another_of_them_holds(policy: Scheduler) -> None:
    """Blocks for the beginning and one more of each slot, and one sequence more than that."""
    slots, common = 3, list(range(1, 1 + 2 * PAGE))
    bench = with_blocks(Bench(slots=slots, scheduler=policy), len(common) // PAGE + slots)
    first = request("first", [*common, 60], max_tokens=1)
    bench.engine.submit(first)
    bench.settle()
    made = [request(f"r{n}", [*common, 20 + n], max_tokens=PAGE, ignore_eos=True) for n in range(slots + 1)]
    for one in made:
        bench.engine.submit(one)
    bench.settle()
    assert [said(bench, one) for one in made] == [alone(one) for one in made]
    assert bench.step.found == len(common) * len(made)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_little_memory_changes_no_answer(policy: Scheduler) -> None:
    made = [
        request(f"r{n}", [1 + n % 3] * (5 + n), n, max_tokens=7, temperature=n % 2 * 1.3, n=1 + n % 2) for n in range(8)
    ]
    little, much = Bench(4, policy, contexts=1), Bench(4, policy, contexts=8)
    for bench in (little, much):
        for one in made:
            bench.engine.submit(one)
        bench.settle()
    assert little.step.steps > much.step.steps, "memory was short"
    for one in made:
        for index in range(one.params.n):
            assert said(little, one, index) == said(much, one, index)


def test_a_full_memory_ends_no_answer_but_the_one_at_the_end_of_its_context() -> None:
    bench = Bench(slots=4, contexts=2, scheduler=Fcfs(96))
    long = request("long", [1, 2], max_tokens=None, ignore_eos=True)
    others = [request(f"r{n}", [n + 3] * 4, max_tokens=5, ignore_eos=True) for n in range(3)]
    for one in (long, *others):
        bench.engine.submit(one)
    bench.engine.turn()
    assert bench.engine.snapshot().used == 1 and bench.engine.snapshot().running == 4
    bench.settle()
    assert [said(bench, one) for one in (long, *others)] == [alone(one) for one in (long, *others)]
    assert len(bench.tokens("long")) == CONTEXT - 1


@pytest.mark.parametrize("count", range(1, 9))
def test_prompts_that_come_at_once_are_all_answered(count: int) -> None:
    for policy in POLICIES:
        bench = Bench(slots=4, scheduler=policy)
        made = [request(f"r{n}", [n + 1, *range(1, 12)], max_tokens=3) for n in range(count)]
        for one in made:
            bench.engine.submit(one)
        bench.settle()
        assert [said(bench, one) for one in made] == [alone(one) for one in made]


# --- ends ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turns", [0, 1, 3])
def test_a_sequence_with_two_reasons_to_end_frees_its_slot_once(turns: int) -> None:
    bench = Bench(slots=2, scheduler=Sarathi(4, 1))
    bench.submit("r", [1] * 8, max_tokens=9, ignore_eos=True, deadline_s=5.0)
    for _ in range(turns):
        bench.engine.turn()
    held = list(bench.engine._running.values())
    bench.engine.cancel("r")
    bench.engine.cancel("r")
    bench.clock.now += 10  # and it is late
    bench.settle()
    assert bench.ends("r") == ["cancelled"]
    assert (sorted(bench.engine._free), bench.step.tables.blocks.free) == ([0, 1], bench.step.room)
    for one in held:
        with pytest.raises(AssertionError, match="ends twice"):
            bench.engine._give_up(one, "cancelled", "")
        assert sorted(bench.engine._free) == [0, 1]


def test_a_server_that_had_nothing_to_do_is_not_late_with_its_first_step() -> None:
    bench = Bench()
    for name in "ab":
        bench.clock.now += 500
        assert bench.engine.snapshot().idle_s == 0
        bench.submit(name, [1], max_tokens=2)
        assert bench.engine.snapshot().idle_s < 1
        bench.clock.now += 70
        bench.submit(f"{name} beside", [1], max_tokens=2)
        assert 70 <= bench.engine.snapshot().idle_s < 71, "what waits is not forgotten for one that comes later"
        bench.settle()


class Broken:
    """Expects of answers whatever was said; after so many it fails."""

    def __init__(self, good: int) -> None:
        self.left = good

    def predict(self, request: Request, tokens: int) -> float | None:
        self.left -= 1
        if self.left < 0:
            raise ValueError("no idea")
        return None

    def learn(self, request: Request, tokens: int) -> None:
        """Nothing is learnt."""


def test_a_fault_before_the_first_step_of_a_request_is_told_to_all() -> None:
    bench = Bench(slots=1)
    bench.engine._lengths = Broken(2)
    bench.submit("running", [1], max_tokens=9, ignore_eos=True)
    bench.submit("waiting", [1], max_tokens=9, ignore_eos=True)
    bench.engine.turn()
    for name in ("cause", "behind"):
        bench.submit(name, [2], max_tokens=9)
    assert bench.engine.turn() is False
    assert [bench.ends(name) for name in ("running", "waiting", "cause", "behind")] == [["engine"]] * 4
    with pytest.raises(Unavailable, match="no idea"):
        bench.submit("later", [1])


def test_a_bug_in_one_answer_ends_it_alone() -> None:
    bench = Bench(slots=3)
    made = [request(f"r{n}", [n + 1, 2], max_tokens=6, ignore_eos=True) for n in range(3)]
    for one in made:
        bench.engine.submit(one)
    bench.engine.turn()
    (bad,) = [one for one in bench.engine._running.values() if one.request.id == "r1"]

    def broken(token: int) -> str:
        raise IndexError("a secret of the prompt")

    bad.text.push = broken  # type: ignore[method-assign]
    bench.settle()
    assert [bench.ends(f"r{n}") for n in range(3)] == [["length"], ["engine"], ["length"]]
    assert getattr(bench.of("r1")[-1], "why", "") == "the server has made an error: IndexError"
    assert [said(bench, made[n]) for n in (0, 2)] == [alone(made[n]) for n in (0, 2)]
    assert bench.step.tables.blocks.free == bench.step.room and not bench.engine.snapshot().fault


# --- what runs and what is read --------------------------------------------------------------------------------------


def test_a_step_has_no_rows_but_those_of_its_sequences() -> None:
    """A device with one sequence of eight computes what one of one does."""
    batches: list[list[Rows]] = []
    bench = Bench(slots=8)
    bench.step._before = lambda batch: batches.append(list(batch))
    bench.submit("r", [3] * 7, max_tokens=5, ignore_eos=True)
    bench.settle()
    assert [[len(rows.tokens) for rows in batch] for batch in batches] == [[7], [1], [1], [1], [1]]


class Poisoned(FakeStep):
    """Its logits are valid until the next step, and no longer."""

    def run(self, batch: Sequence[Rows]) -> list[Output]:
        for one in getattr(self, "told", []):
            one.logits.fill(np.nan)
        made = super().run(batch)
        self.told = [one for each in made for one in (each, *each.drafts) if one.logits is not None]
        return made


def test_what_is_given_may_be_changed_and_what_is_told_may_be_overwritten() -> None:
    prompt, biases, ends, stops = [4, 5, 6], {7: 2.0}, [9], ["bcd"]
    more: dict[str, Any] = {"logit_bias": biases, "stop_token_ids": ends, "stop": stops}
    bench = Bench(slots=2)
    bench.engine._step = bench.step = Poisoned(2)
    made = bench.submit("r", prompt, 5, temperature=1.1, logprobs=3, max_tokens=9, ignore_eos=True, **more)
    bench.submit("beside", [1, 2], temperature=0.9, max_tokens=9, logprobs=1, frequency_penalty=0.5)
    wanted = alone(
        request(
            "r",
            [4, 5, 6],
            5,
            **{**more, "logit_bias": dict(biases)},
            temperature=1.1,
            logprobs=3,
            max_tokens=9,
            ignore_eos=True,
        )
    )
    prompt.clear()
    biases[7] = 100.0
    ends.append(made.prompt[0])
    stops.append("a")
    bench.settle()
    assert said(bench, made) == wanted
    values = [e.logprob.logprob for e in bench.events if isinstance(e, Delta) and e.logprob]
    assert values and np.isfinite(values).all()


def test_two_chats_that_alternate_find_their_own_beginnings() -> None:
    """Each turn of a chat begins with the one before; one chat never finds what only the other has said."""
    bench = Bench(slots=1)
    chats = {"a": [1, 2, 3, 4, 5], "b": [1, 2, 3, 4, 9]}
    told: list[int] = []
    for turn in range(3):
        for name, prompt in chats.items():
            made = bench.submit(f"{name}{turn}", prompt, max_tokens=3, ignore_eos=True)
            bench.settle()
            told.append(next(e.cached for e in bench.of(made.id) if isinstance(e, Delta)))
            assert said(bench, made) == alone(made)
            chats[name] = [*prompt, *bench.tokens(made.id), 7]
    assert told == [0, 4, 4, 4, 8, 8]


# --- draws, grammars and stops ---------------------------------------------------------------------------------------


def test_draws_go_on_as_they_would_after_a_pause() -> None:
    """A scheduler may leave a sequence out of steps; its draws are numbered, so none is repeated or lost."""
    paused: set[int] = set()
    policy = Isrtf(2, 1.0, 6, 1)

    def noted(state: State, now_s: float) -> Batch:
        batch = policy(state, now_s)
        left = {one.number for one in state.running if one.decoding} - {share.number for share in batch.shares}
        paused.update(left)
        return batch

    bench = Bench(slots=4, scheduler=noted)
    made = [request(f"r{n}", [n + 1, 5], 3, temperature=1.4, max_tokens=12 - 2 * n, ignore_eos=True) for n in range(4)]
    for one in made:
        bench.engine.submit(one)
        bench.engine.turn()
    bench.settle()
    assert paused
    assert [said(bench, one) for one in made] == [alone(one) for one in made]


@dataclass
class Cycle:
    """A grammar over the fake device's tokens: one after another of a cycle."""

    tokens: tuple[int, ...]
    at: int = 0

    def begin(self) -> Cycle:
        """Return the beginning of an answer."""
        return Cycle(self.tokens)

    def allowed(self) -> Any:
        """Return the next token alone."""
        return np.array([self.tokens[self.at % len(self.tokens)]])

    def tries(self, token: int) -> bool:
        """Go on if it is the next, and return whether it is."""
        right = token == self.tokens[self.at % len(self.tokens)]
        self.at += right
        return right

    def forced(self) -> list[int]:
        """Return the next tokens."""
        return [self.tokens[(self.at + n) % len(self.tokens)] for n in range(2)]

    def take(self, token: int) -> None:
        """Go on."""
        assert self.tries(token)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_answers_with_a_form_and_without_one_share_steps_in_any_order(policy: Scheduler) -> None:
    for speculation in (None, Speculation(lookup=False)):
        shared(Bench(slots=4, scheduler=policy, speculation=speculation))


def shared(bench: Bench) -> None:
    """Let answers with a form and without one run together, and hold each against itself alone."""
    free = [request(f"free{n}", [n + 1] * (n + 2), n, max_tokens=6, temperature=n % 2 * 1.0) for n in range(4)]
    for n, one in enumerate(free):
        bench.engine.submit(one)
        held = request(f"held{n}", [n + 7], n, max_tokens=7, temperature=(n + 1) % 2 * 1.0, ignore_eos=True)
        grammar: Any = Cycle((10 + n, 20 + n, 30 + n))
        bench.engine.submit(Request(held.id, held.prompt, held.params, held.seed, grammar=grammar))
    bench.settle()
    assert [said(bench, one) for one in free] == [alone(one) for one in free]
    for n in range(4):
        assert bench.tokens(f"held{n}") == [10 + n, 20 + n, 30 + n] * 2 + [10 + n]


def test_a_stop_string_that_is_split_at_any_byte_ends_an_answer_and_no_part_of_it_is_told() -> None:
    whole = "aé€😀"
    for begin in range(len(whole)):
        for end in range(begin + 1, len(whole) + 1):
            bench = Bench(slots=1)
            bench.step.forced = {n: n for n in range(1, 11)}  # a byte is a token
            bench.submit("r", [20], max_tokens=10, stop=[whole[begin:end]])
            bench.settle()
            assert (bench.text("r"), bench.ends("r")) == (whole[:begin], ["stop"])


def test_a_deadline_does_not_keep_what_waits_behind_it() -> None:
    """Sequences that have ended hold no place in the queue, whatever ended them."""
    bench = Bench(slots=1, limits=Limits(queue=3))
    for round_ in range(4):
        for n in range(3):
            bench.submit(f"r{round_}.{n}", [1], max_tokens=9, ignore_eos=True, deadline_s=1.0)
        bench.clock.now += 2
        bench.engine.turn()
        assert [bench.ends(f"r{round_}.{n}") for n in range(3)] == [["deadline"]] * 3
        assert bench.engine.snapshot().waiting == 0
