"""The engine over a device that is a function of tokens: ends, stops, refusals, faults, and a machine of invariants."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llmbuild.serve.admission import EXPECTED, WORST_CASE
from llmbuild.serve.engine import Engine, Limits
from llmbuild.serve.errors import QueueFull, RequestRefused, Unavailable
from llmbuild.serve.events import Delta, Ended, Event
from llmbuild.serve.observe import Lived, Observer, Turned
from llmbuild.serve.request import Request
from llmbuild.serve.schedule.fcfs import Fcfs
from llmbuild.serve.schedule.sarathi import Sarathi
from llmbuild.serve.schedule.state import Batch, Scheduler
from llmbuild.serve.sequence import Sequence
from llmbuild.serve.speculate import Speculation
from llmbuild.serve.step import Output
from tests.support.serving import (
    ADAPTIVE,
    CONTEXT,
    END,
    VOCABULARY,
    Bench,
    FakeStep,
    alone,
    logits_of,
    request,
    text_of,
)


def greedy(prompt: list[int], count: int) -> list[int]:
    """Return the most likely tokens, up to an end."""
    found: list[int] = []
    while len(found) < count and END not in found and len(prompt) + len(found) <= CONTEXT:
        found.append(int(logits_of([*prompt, *found]).argmax()))
    return found


PROMPTS = [[n + 1, 2 * n + 3, *range(1, n)] for n in range(8)]


@pytest.mark.parametrize("policy", [Fcfs(8), Fcfs(1), Sarathi(5, 1), Sarathi(6, 3), *ADAPTIVE])
def test_sequences_of_a_mix_are_those_that_they_are_alone(policy: Scheduler) -> None:
    bench = Bench(slots=3, scheduler=policy)
    for n, prompt in enumerate(PROMPTS):
        bench.submit(f"r{n}", prompt, max_tokens=9)
    bench.settle()
    assert [bench.tokens(f"r{n}") for n in range(8)] == [greedy(prompt, 9) for prompt in PROMPTS]
    assert bench.step.steps < sum(len(greedy(prompt, 9)) for prompt in PROMPTS)  # several ran in one step


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.5, "n": 3},
        {"temperature": 1.0, "top_k": 5, "top_p": 0.8, "min_p": 0.02, "n": 2},
        {"presence_penalty": 1.0, "frequency_penalty": 0.7, "repetition_penalty": 1.4},
        {"logit_bias": {5: 100, 6: -100}, "min_tokens": 3},
        {"temperature": 2.0, "logprobs": 3},
    ],
    ids=str,
)
def test_draws_do_not_depend_on_what_runs_beside(params: dict[str, Any]) -> None:
    made = [request(f"r{n}", prompt, 3, max_tokens=8, **params) for n, prompt in enumerate(PROMPTS)]
    bench = Bench(slots=4, scheduler=Sarathi(6, 1))
    for one in reversed(made):
        bench.engine.submit(one)
    bench.settle()
    for one in made:
        for index in range(one.params.n):
            found = bench.tokens(one.id, index), bench.text(one.id, index), bench.ends(one.id, index)
            assert found == alone(one, index)


def test_choices_of_one_request_differ_and_seeds_repeat() -> None:
    bench = Bench()
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        bench.submit(name, [4, 5], seed=seed, temperature=3.0, n=4, max_tokens=6, ignore_eos=True)
    bench.settle()
    said = {name: [bench.tokens(name, i) for i in range(4)] for name in "abc"}
    assert said["a"] == said["b"] != said["c"]
    assert len({tuple(one) for one in said["a"]}) == 4


@pytest.mark.parametrize("length", [CONTEXT - 2, CONTEXT - 1, CONTEXT])
def test_the_context_ends_an_answer_and_says_length(length: int) -> None:
    bench = Bench()
    bench.submit("r", [7] * length, max_tokens=None, ignore_eos=True)
    bench.settle()
    assert (len(bench.tokens("r")), bench.ends("r")) == (CONTEXT - length + 1, ["length"])


def test_a_prompt_that_can_never_fit_is_refused_and_the_next_one_answered() -> None:
    bench = Bench()
    with pytest.raises(RequestRefused, match=f"the prompt has {CONTEXT + 1} tokens; the context") as told:
        bench.submit("long", [1] * (CONTEXT + 1))
    assert (told.value.code, told.value.param) == ("context_length_exceeded", "prompt")
    bench.submit("next", [1], max_tokens=2)
    bench.settle()
    assert bench.ends("next") == ["length"]


@pytest.mark.parametrize(
    ("params", "prompt", "param"),
    [
        ({}, [], "prompt"),
        ({}, [VOCABULARY], "prompt"),
        ({"stop_token_ids": [VOCABULARY]}, [1], "stop_token_ids"),
        ({"logit_bias": {VOCABULARY: 1}}, [1], "logit_bias"),
        ({"n": 33}, [1], "n"),
    ],
)
def test_what_names_no_token_of_the_model_is_refused(params: Any, prompt: list[int], param: str) -> None:
    with pytest.raises(RequestRefused) as told:
        Bench().submit("r", prompt, **params)
    assert told.value.param == param


def test_a_full_queue_says_when_to_come_again_and_takes_what_fits() -> None:
    bench = Bench(slots=1, limits=Limits(queue=3))
    for name in "ab":
        bench.submit(name, [1], max_tokens=3)
    with pytest.raises(QueueFull) as told:
        bench.submit("c", [1], n=2)
    assert told.value.retry_after_s >= 1
    bench.submit("d", [1])
    with pytest.raises(QueueFull):
        bench.submit("e", [1])
    bench.engine.turn()  # the first has a slot now
    bench.submit("f", [1])
    bench.settle()
    assert [len(bench.ends(name)) for name in "abcdef"] == [1, 1, 0, 1, 0, 1]


def test_end_tokens_stop_tokens_and_ignored_ones() -> None:
    prompt = next([n, m] for n in range(1, 60) for m in range(1, 60) if END in greedy([n, m], 12))
    tokens = greedy(prompt, 12)
    bench = Bench()
    bench.submit("end", prompt, max_tokens=15)
    bench.submit("ignored", prompt, max_tokens=15, ignore_eos=True)
    bench.submit("token", prompt, max_tokens=15, stop_token_ids=[tokens[0]])
    bench.submit("later", prompt, max_tokens=15, min_tokens=len(tokens))
    bench.settle()
    assert (bench.tokens("end"), bench.ends("end")) == (tokens, ["stop"])
    assert len(bench.tokens("ignored")) == 15
    last = bench.of("token")[-1]
    assert isinstance(last, Delta) and last.finish and (last.text, last.finish.stop_reason) == ("", tokens[0])
    assert len(bench.tokens("later")) >= len(tokens) and END not in bench.tokens("later")[: len(tokens)]


def test_stop_strings_across_tokens_are_never_told() -> None:
    whole = Bench()
    whole.submit("r", [9, 3], max_tokens=14, temperature=1.0, seed=5, ignore_eos=True)
    whole.settle()
    text = whole.text("r")
    for begin in range(len(text) - 3):
        stop = text[begin : begin + 3]
        if stop.strip("\ufffd") != stop:
            continue
        bench = Bench()
        bench.submit("r", [9, 3], max_tokens=14, temperature=1.0, seed=5, ignore_eos=True, stop=[stop, "never"])
        bench.settle()
        assert bench.text("r") == text[: text.find(stop)]
        told = bench.of("r")[-1]
        assert (
            isinstance(told, Delta) and told.finish and (told.finish.reason, told.finish.stop_reason) == ("stop", stop)
        )


@pytest.mark.parametrize("most", range(1, 11))
def test_characters_are_told_whole_wherever_an_answer_ends(most: int) -> None:
    bench = Bench(slots=1)
    bench.step.forced = {n: n for n in range(1, 11)}  # the bytes of a text, a token each
    bench.submit("r", [20], max_tokens=most)
    bench.settle()
    pieces = [e.text for e in bench.of("r") if isinstance(e, Delta)]
    data = "aé€😀".encode()[:most]
    assert "".join(pieces) == data.decode(errors="replace")
    assert not any("\ufffd" in piece for piece in pieces[:-1])


@pytest.mark.parametrize("state", ["queued", "prefill", "decode", "ended"])
def test_a_cancelled_request_frees_its_slot_before_the_next_step(state: str) -> None:
    bench = Bench(slots=1, scheduler=Sarathi(2, 1))
    if state == "queued":
        bench.submit("first", [1, 2], max_tokens=20, ignore_eos=True)
    bench.submit("r", [1] * 8, max_tokens=5, ignore_eos=True)
    for _ in range({"queued": 2, "prefill": 2, "decode": 6, "ended": 12}[state]):
        bench.engine.turn()
    assert bool(bench.tokens("r")) == (state in ("decode", "ended"))
    bench.engine.cancel("r")
    bench.submit("next", [3], max_tokens=1)
    if state != "queued":
        bench.engine.turn()
        assert bench.ends("next") == ["length"]
    bench.settle()
    assert bench.ends("r") == (["length"] if state == "ended" else ["cancelled"])
    assert bench.ends("next") == ["length"]
    assert bench.engine.snapshot().running == bench.engine.snapshot().waiting == 0


def test_deadlines_end_what_runs_and_what_waits() -> None:
    bench = Bench(slots=1, limits=Limits(deadline_s=50.0))
    bench.submit("own", [1], max_tokens=20, ignore_eos=True, deadline_s=5.0)
    bench.submit("general", [1], max_tokens=20, ignore_eos=True)
    bench.submit("longer", [1], max_tokens=20, ignore_eos=True, deadline_s=500.0)
    bench.engine.turn()
    bench.clock.now += 6
    bench.engine.turn()
    assert [bench.ends(name) for name in ("own", "general", "longer")] == [["deadline"], [], []]
    bench.clock.now += 50
    bench.engine.turn()
    assert [bench.ends(name) for name in ("general", "longer")] == [["deadline"], ["deadline"]]
    told = bench.of("own")[-1]
    assert isinstance(told, Ended) and told.why == "the answer took longer than 5 s"


def test_a_row_of_no_numbers_ends_its_own_sequence_alone() -> None:
    bench = Bench(slots=2)
    bench.submit("bad", [1, 2], temperature=1.0, max_tokens=6, ignore_eos=True)
    bench.submit("good", [1, 2, 3], temperature=1.0, max_tokens=6, ignore_eos=True)
    real = bench.step._one

    def poisoned(rows: Any) -> Output:
        made = real(rows)
        broken = bench.step.held[rows.slot][:3] != [1, 2, 3]
        return Output(made.token, made.logits * float("nan") if broken and made.logits is not None else made.logits)

    bench.step._one = poisoned  # type: ignore[method-assign]
    bench.settle()
    assert (bench.ends("bad"), bench.ends("good")) == (["engine"], ["length"])


@pytest.mark.parametrize("where", ["step", "scheduler", "empty"])
def test_a_fault_of_the_engine_is_told_to_all_and_it_takes_no_more(where: str) -> None:
    bench = Bench(slots=2)
    for name in "abc":
        bench.submit(name, [1, 2], max_tokens=9, ignore_eos=True)
    bench.engine.turn()

    def broken(*_: object) -> Any:
        if where == "empty":
            return Batch()
        raise RuntimeError("the device is gone")

    if where == "step":
        bench.step._before = broken
    else:
        bench.engine._scheduler = broken
    assert bench.engine.turn() is False
    assert [bench.ends(name) for name in "abc"] == [["engine"]] * 3
    with pytest.raises(Unavailable, match="the engine has failed: RuntimeError"):
        bench.submit("d", [1])
    found = bench.engine.snapshot()
    assert (found.running, found.waiting, found.open, bool(found.fault)) == (0, 0, False, True)
    assert len(bench.engine._free) == 2


def test_a_thread_drains_then_closes_and_what_is_left_is_told() -> None:
    said: list[Event] = []
    step = FakeStep(1, before=lambda batch: time.sleep(0.002))
    engine = Engine(step, Fcfs(), text_of, said.extend)
    engine.start()
    engine.submit(request("short", [1], max_tokens=3, ignore_eos=True))
    assert engine.drain(20)
    with pytest.raises(Unavailable, match="shutting down"):
        engine.submit(request("late", [1]))
    assert [e.token for e in said if isinstance(e, Delta)] == greedy([1], 3) or len(said) == 3
    engine.close()
    other: list[Event] = []
    begun = threading.Event()
    engine = Engine(
        FakeStep(1, before=lambda batch: (begun.set(), time.sleep(0.005))[1]), Fcfs(), text_of, other.extend
    )
    engine.start()
    for name in "ab":
        engine.submit(request(name, [1], max_tokens=20, ignore_eos=True))
    assert begun.wait(20)
    assert not engine.drain(0)
    engine.close()
    assert sorted(e.request for e in other if isinstance(e, Ended) and e.fault == "closed") == ["a", "b"]


class Counted(Observer):
    """Counts what it is told."""

    def __init__(self) -> None:
        self.lives: list[Lived] = []
        self.turns: list[Turned] = []
        self.firsts = self.gaps = self.losses = 0

    def preempted(self) -> None:
        self.losses += 1

    def turned(self, turn: Turned) -> None:
        self.turns.append(turn)

    def first(self, seconds: float) -> None:
        self.firsts += 1

    def gap(self, seconds: float) -> None:
        assert seconds >= 0  # 0 behind a guess that was right
        self.gaps += 1

    def lived(self, sequence: Lived) -> None:
        times = (sequence.arrival_s, sequence.admitted_s, sequence.first_s, sequence.last_s, sequence.ended_s)
        known = [t for t in times if t is not None]
        assert known == sorted(known)
        self.lives.append(sequence)


class Machine(RuleBasedStateMachine):
    """Any order of arrivals, cancellations, late answers and steps."""

    admission = WORST_CASE

    def lengths(self, prompt: int, most: int | None) -> tuple[int, int | None]:
        """Return the tokens of a prompt, and of an answer at most."""
        return prompt, most

    @initialize(
        slots=st.integers(1, 4),
        policy=st.sampled_from([Fcfs(8), Fcfs(1), Sarathi(4, 1), Sarathi(6, 3), Sarathi(1, 2), *ADAPTIVE]),
        queue=st.integers(1, 8),
        contexts=st.integers(1, 4),
        guesses=st.booleans(),
    )
    def begin(self, slots: int, policy: Scheduler, queue: int, contexts: int, guesses: bool) -> None:
        """Make an engine, in which nobody is preempted for a later one."""
        self.counted = Counted()
        if self.admission == EXPECTED:
            slots, queue, contexts = slots + 1, 8, 1
        more: dict[str, Any] = {"speculation": Speculation() if guesses else None, "admission": self.admission}
        self.bench = Bench(slots, policy, Limits(queue, 1000.0), 1, self.counted, contexts, **more)
        engine, self.lost = self.bench.engine, 0
        preempt = engine._preempt

        def watched(last: Sequence) -> None:
            assert all(one.order < last.order for one in engine._running.values() if one is not last)
            assert len(engine._running) > 1
            self.lost += 1
            preempt(last)

        engine._preempt = watched  # type: ignore[method-assign]
        self.taken: dict[str, Request] = {}
        self.cancelled: set[str] = set()
        self.refused = 0

    @rule(
        length=st.integers(1, CONTEXT),
        most=st.sampled_from([*range(1, 7), None]),
        n=st.integers(1, 3),
        heat=st.sampled_from([0, 0, 1.5]),
        late=st.sampled_from([None, None, 2.0]),
        more=st.sampled_from([{}, {"logprobs": 2}, {"stop": "b"}, {"frequency_penalty": 1.5}, {"ignore_eos": True}]),
        text=st.integers(1, 3),
        whose=st.sampled_from([b"", b"", b"another"]),
        priority=st.sampled_from([0, 0, 0, -1, 2]),
    )
    def arrive(
        self,
        length: int,
        most: int | None,
        n: int,
        heat: float,
        late: float | None,
        more: dict[str, Any],
        text: int,
        whose: bytes,
        priority: int,
    ) -> None:
        """Submit a request."""
        name = f"r{len(self.taken) + self.refused}"
        length, most = self.lengths(length, most)
        prompt = [1 + (text * 7 + k * 5) % 60 for k in range(length)]  # of a few texts: many begin alike
        more = {**more, "deadline_s": late, "salt": whose, "tenant": str(whose), "priority": priority}
        made = request(name, prompt, length, max_tokens=most, n=n, temperature=heat, **more)
        waiting = self.bench.engine.snapshot().waiting
        try:
            self.bench.engine.submit(made)
        except (QueueFull, RequestRefused):
            self.refused += 1
            assert waiting + n > self.bench.limits.queue
        else:
            self.taken[name] = made

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        """Cancel a request, ended or not."""
        name = data.draw(st.sampled_from(sorted(self.taken)))
        self.cancelled.add(name)
        self.bench.engine.cancel(name)

    @rule()
    def turn(self) -> None:
        """Take a turn; afterwards no cancelled request holds anything."""
        self.bench.engine.turn()
        held = {one.request.id for one in (*self.bench.engine._running.values(), *self.bench.engine._waiting)}
        assert not held & self.cancelled

    @rule(seconds=st.sampled_from([0.5, 3.0]))
    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self.bench.clock.now += seconds

    @invariant()
    def nothing_leaks(self) -> None:
        """Every slot is free or has one owner, and every count is right."""
        engine = self.bench.engine
        owned = [one.slot for one in engine._running.values()]
        assert sorted([*engine._free, *owned]) == list(range(self.bench.slots))
        assert all(one.slot is None and not one.ended for one in engine._waiting)
        found = engine.snapshot()
        assert found.running == len(engine._running)
        tables = self.bench.step.tables
        tables.check()
        assert self.bench.step.taken == set(owned)
        assert owned or tables.blocks.free == tables.blocks.count
        reserved = sum(one.most for one in engine._running.values())
        if self.bench.admission == WORST_CASE:
            assert found.used == reserved / tables.blocks.count <= 1 and not self.lost
        else:
            assert found.used == 1 - tables.blocks.free / tables.blocks.count
        assert found.waiting == len(engine._waiting) + len(engine._inbox.arrivals)
        assert len(engine._deadlines) <= 64 + 4 * (len(engine._running) + len(engine._waiting))
        orders = [one.order for one in engine._waiting]
        assert orders == sorted(orders)  # by priority, then in the order of arrival
        assert sum(engine._accounts._active.values()) == len(engine._running) + len(engine._waiting)

    def teardown(self) -> None:
        """Run to the end: every sequence has ended once, and said what it says alone."""
        if not hasattr(self, "bench"):
            return
        self.bench.settle()
        engine = self.bench.engine
        assert (sorted(engine._free), engine._by_request) == (list(range(self.bench.slots)), {})
        sequences = [(made, i) for made in self.taken.values() for i in range(made.params.n)]
        for made, index in sequences:
            (end,) = self.bench.ends(made.id, index)
            tokens, text, ends = alone(made, index)
            said = self.bench.tokens(made.id, index)
            if end in ("stop", "length"):
                assert (said, self.bench.text(made.id, index), [end]) == (tokens, text, ends)
            else:
                assert end in ("cancelled", "deadline") and said == tokens[: len(said)]
        assert len(self.counted.lives) == len(sequences)
        assert self.counted.losses == self.lost
        spoken = sum(one.tokens for one in self.counted.lives)
        assert spoken == sum(t.tokens for t in self.counted.turns) == self.counted.firsts + self.counted.gaps


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=40)


class ExpectingMachine(Machine):
    """The same by what is expected, with little memory and answers that take more of it than they are expected to."""

    admission = EXPECTED

    def lengths(self, prompt: int, most: int | None) -> tuple[int, int | None]:
        """Return shorter prompts, and longer answers."""
        return 1 + prompt % 7, None if most is None else 4 * most


TestExpectingMachine = ExpectingMachine.TestCase
TestExpectingMachine.settings = settings(max_examples=15, stateful_step_count=40)


class LongMachine(Machine):
    """The same in more than 10,000 steps."""


class LongExpectingMachine(ExpectingMachine):
    """The same in more than 10,000 steps."""


TestLongExpectingMachine = pytest.mark.exhaustive(LongExpectingMachine.TestCase)
TestLongExpectingMachine.settings = settings(max_examples=240, stateful_step_count=50)


TestLongMachine = pytest.mark.exhaustive(LongMachine.TestCase)
TestLongMachine.settings = settings(max_examples=240, stateful_step_count=50)
