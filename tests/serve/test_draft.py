"""A drafter beside the device: answers are those without it, its cache keeps up, and it drafts only where it pays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbuild.cli.serve import SPECULATIONS
from llmbuild.errors import InputError
from llmbuild.serve.api.metrics import Metrics
from llmbuild.serve.budget import Need
from llmbuild.serve.draft import Drafter
from llmbuild.serve.draft_model import check_draft
from llmbuild.serve.engine import Limits
from llmbuild.serve.pace import Candidate, Pace, choose
from llmbuild.serve.request import Request
from llmbuild.serve.served import Plan
from llmbuild.serve.speculate import MOST_ROWS, NAMES
from llmbuild.serve.step import Rows
from tests.serve.test_engine import Counted
from tests.serve.test_preemption import each_alone, mixed, ran, tight
from tests.support.serving import ADAPTIVE, CONTEXT, Bench, Clock, FakeDraft, FakeStep, request

Errs = Callable[[Sequence[int]], bool]


def never(tokens: Sequence[int]) -> bool:
    return False


def often(tokens: Sequence[int]) -> bool:
    return sum(tokens) % 3 == 0


def always(tokens: Sequence[int]) -> bool:
    return True


def drafter(step: FakeStep, errs: Errs = never, context: int = CONTEXT, contexts: int = 0) -> Drafter:
    """Return a drafter that takes no time."""
    made = FakeDraft(step.slots, step, errs, contexts=contexts)
    made.context = context
    return Drafter(made, clock=lambda: 0.0)


def drafts_of(bench: Bench) -> FakeDraft:
    """Return the drafter's device."""
    assert bench.speculation is not None and bench.speculation._drafter is not None
    return cast(FakeDraft, bench.speculation._drafter._step)


def told(bench: Bench, made: Sequence[Request]) -> list[Any]:
    """Return all that is said of requests that run together; at the end nobody holds anything."""
    found = ran(bench, made)
    if bench.draft is not None:
        device = drafts_of(bench)
        device.tables.check()
        assert not device.taken and device.tables.blocks.free == device.room
    return found


KINDS: list[dict[str, Any]] = [
    {"max_tokens": 9},
    {"max_tokens": None, "ignore_eos": True},
    {"temperature": 1.5, "n": 2, "max_tokens": 12},
    {"logprobs": 2, "max_tokens": 1},
    {"stop": "b", "max_tokens": 12},
    {"frequency_penalty": 1.5, "max_tokens": 12},
]


@pytest.mark.parametrize("policy", ADAPTIVE)
@pytest.mark.parametrize("errs", [never, often, always])
def test_answers_are_those_without_a_drafter(policy: Any, errs: Errs) -> None:
    made = [request(f"r{n}", [n + 1, n + 2, 3], n, **kind) for n, kind in enumerate(KINDS)]
    plain, drafting = Bench(scheduler=policy), Bench(scheduler=policy, draft=partial(drafter, errs=errs))
    assert told(drafting, made) == told(plain, made)
    assert (drafting.step.kept > 0) == (errs is not always)
    assert drafts_of(drafting).steps > 0


@pytest.mark.parametrize("errs", [never, often])
def test_answers_that_lose_their_place_are_those_of_sequences_alone(errs: Errs) -> None:
    """Greedy and drawn answers, with and without a grammar; the drafter loses the place of a sequence with it."""
    bench = tight(draft=partial(drafter, errs=errs))
    assert told(bench, mixed()) == each_alone()
    assert bench.observer.losses > 3 and bench.step.kept > 0


def test_guesses_of_all_sequences_are_computed_in_the_same_steps() -> None:
    """Of three sequences that take four tokens a step, each level of drafts is one step of three rows."""
    bench = Bench(draft=drafter)
    for n in range(3):
        bench.submit(f"r{n}", [n + 1, 7], max_tokens=17, ignore_eos=True)
    bench.settle()
    assert [len(bench.tokens(f"r{n}")) for n in range(3)] == [17] * 3
    assert bench.step.steps <= 6 and set(drafts_of(bench).rows[1:]) <= {3, 6}


@pytest.mark.parametrize(("right", "missing"), [(0, 1), (1, 1), (2, 1), (3, 2)])
def test_its_cache_has_what_was_right_and_lacks_what_was_not(right: int, missing: int) -> None:
    """Of three drafts the last is in no cache: where all are right, it is missing beside the token behind it."""
    made = drafter(FakeStep(1))
    one = made.of([5, 6], b"")
    (drafts,) = made.draft([(one, 3)])
    for token in drafts[:right]:
        one.add(token)
    one.add((drafts[right] if right < 3 else 7) + 1)
    assert (one.missing, one.drafts(9)) == (missing, [])
    fresh = drafter(FakeStep(1))
    assert made.draft([(one, 2)]) == fresh.draft([(fresh.of(one.tokens, b""), 2)])


def test_guesses_that_no_step_has_taken_are_not_computed_again() -> None:
    made = drafter(FakeStep(1))
    one = made.of([5, 6], b"")
    (drafts,) = made.draft([(one, 4)])
    one.add(drafts[0])  # chosen without them
    assert (one.missing, tuple(one.drafts(9))) == (0, drafts[1:])
    for token in (*drafts[1:], 9):
        one.add(token)
    assert (one.missing, one.drafts(9)) == (2, [])


def test_a_drafter_finds_the_beginnings_of_prompts_again_but_not_those_of_other_salts() -> None:
    bench = Bench(slots=1, draft=drafter)
    prompt, device = list(range(1, 14)), drafts_of(bench)
    for name, salt, found in (("a", b"", 0), ("b", b"", 12), ("c", b"other", 0)):
        before = device.found
        bench.submit(name, prompt, max_tokens=6, ignore_eos=True, salt=salt)
        bench.settle()
        assert device.found - before == found
    assert bench.tokens("a") == bench.tokens("b")


def test_wrong_guesses_are_in_no_block_that_others_find() -> None:
    bench = Bench(slots=1, draft=partial(drafter, errs=often))
    bench.submit("a", [3, 4, 5], max_tokens=16, ignore_eos=True)
    bench.settle()
    said = bench.tokens("a")
    bench.submit("b", [3, 4, 5, *said], max_tokens=5, ignore_eos=True)  # the device compares what is there
    bench.settle()
    assert drafts_of(bench).found >= 8


def test_nothing_is_drafted_while_others_wait_or_where_the_batch_fills_the_rows() -> None:
    bench = Bench(slots=MOST_ROWS, limits=Limits(queue=64), draft=drafter)
    for n in range(MOST_ROWS + 4):
        bench.submit(f"r{n}", [n + 1, 2], max_tokens=6, ignore_eos=True)
    while bench.engine.snapshot().running + bench.engine.snapshot().waiting >= MOST_ROWS:
        assert drafts_of(bench).steps == 0
        bench.engine.turn()
    bench.settle()
    assert drafts_of(bench).steps > 0, "the last four leave rows free"


def timed(draft_s: float, row_s: float = 0.0, slots: int = 1) -> Bench:
    """Return an engine over a device whose steps take a second, and a drafter with steps of so many seconds."""
    clock = Clock()

    def wait(seconds: float, batch: Sequence[Rows]) -> None:
        clock.now += seconds + row_s * (sum(len(rows.tokens) for rows in batch) - len(batch))

    def made(step: FakeStep) -> Drafter:
        step._before = lambda batch: wait(1.0, ())
        return Drafter(FakeDraft(slots, step, before=partial(wait, draft_s)), clock)

    return Bench(slots=slots, clock=clock, draft=made, observer=Counted(), limits=Limits(32, 1e9))


@pytest.mark.parametrize(("draft_s", "wins"), [(0.1, True), (1.2, False)])
def test_it_drafts_only_where_its_own_time_pays(draft_s: float, wins: bool) -> None:
    bench = timed(draft_s)
    for n in range(8):
        bench.submit(f"r{n}", [n + 1, 2], max_tokens=12, ignore_eos=True)
        bench.settle()
    turns = bench.observer.turns
    spent = sum(turn.draft_s for turn in turns)
    assert spent == pytest.approx(draft_s * drafts_of(bench).steps, rel=1e-3)
    assert sum(turn.drafts for turn in turns[-24:]) > 0 if wins else drafts_of(bench).steps <= MOST_ROWS
    assert (spent + len(turns) < 8 * 12) == wins, "seconds of the device and the drafter, and those without it"


def test_a_drafter_that_was_slow_is_tried_again() -> None:
    bench = timed(9.0)
    device = drafts_of(bench)
    for n in range(40):
        bench.submit(f"r{n}", [n + 1, 2], max_tokens=20, ignore_eos=True)
        bench.settle()
    slow = device.steps
    assert MOST_ROWS < slow <= 2 * MOST_ROWS and bench.step.steps > 512
    device._before = lambda batch: None
    for n in range(40):
        bench.submit(f"s{n}", [n + 1, 3], max_tokens=20, ignore_eos=True)
        bench.settle()
    assert device.steps > slow + 40


def test_it_catches_up_with_a_prompt_where_the_answer_is_long_enough() -> None:
    """A prompt of 15 tokens takes 3 s; drafts save some half of an answer's seconds."""
    bench = timed(0.1, row_s=0.2)
    bench.submit("unknown", [9, *range(1, 15)], max_tokens=8, ignore_eos=True)
    bench.settle()
    assert max(drafts_of(bench).rows) > 14
    seen = []
    for name, most in (("short", 3), ("long", 9)):
        before = len(drafts_of(bench).rows)
        bench.submit(name, [ord(name[0]) - 90, *range(1, 15)], max_tokens=most, ignore_eos=True)
        bench.settle()
        seen.append(max(drafts_of(bench).rows[before:], default=0) > 14)
    assert seen == [False, True]


def test_steps_without_drafts_are_caught_up_with() -> None:
    bench = Bench(slots=2, draft=drafter)
    bench.submit("long", [1, 2], max_tokens=20, ignore_eos=True)
    for n in range(3):
        bench.submit(f"r{n}", [n + 5, 2], max_tokens=3, ignore_eos=True)
    while bench.engine.snapshot().waiting:
        bench.engine.turn()
    device = drafts_of(bench)
    assert device.steps == 0 and 4 < len(bench.tokens("long")) < 20
    bench.settle()
    assert max(device.rows) > 6 and bench.step.kept > 0 and not device.taken


@pytest.mark.parametrize("context", [1, 2, 9])
def test_a_drafter_of_a_shorter_context_drafts_as_far_as_it_goes(context: int) -> None:
    made = [request(f"r{n}", [n + 1, 2, 3], n, max_tokens=None, ignore_eos=True) for n in range(2)]
    bench = Bench(draft=partial(drafter, context=context))
    ends: list[int] = []
    drafts_of(bench)._before = lambda batch: ends.extend(rows.start + len(rows.tokens) for rows in batch)
    assert told(bench, made) == told(Bench(), made)
    assert max(ends, default=0) == (context if context > 3 else 0)


@st.composite
def loads(draw: st.DrawFn) -> tuple[list[Request], dict[int, str], dict[str, Any]]:
    """Requests, who is cancelled before which turn, and what the drafter is like."""
    count = draw(st.integers(1, 6))
    whole = st.fixed_dictionaries(
        {
            "max_tokens": st.one_of(st.none(), st.integers(1, 20)),
            "temperature": st.sampled_from([0, 0, 1.3]),
            "ignore_eos": st.booleans(),
        }
    )
    prompts = st.lists(st.integers(1, 3), min_size=1, max_size=18)
    made = [request(f"r{n}", draw(prompts), n, **draw(whole)) for n in range(count)]
    gone = draw(st.dictionaries(st.integers(0, 12), st.sampled_from([one.id for one in made]), max_size=3))
    errs = draw(st.sampled_from([never, often, always]))
    contexts, context = draw(st.integers(1, 3)), draw(st.sampled_from([CONTEXT, 11]))
    return made, gone, {"errs": errs, "contexts": contexts, "context": context}


@given(load=loads(), short=st.booleans())
@settings(max_examples=25)
def test_whoever_comes_and_goes_answers_are_those_alone(load: Any, short: bool) -> None:
    """Little memory of the device and of the drafter, prompts that begin alike, and requests that are cancelled."""
    made, gone, kind = load
    bench = tight(slots=3, draft=partial(drafter, **kind)) if short else Bench(draft=partial(drafter, **kind))
    for one in made:
        bench.engine.submit(one)
    turn = 0
    while bench.engine.turn() or turn < 14:
        turn += 1
        if turn in gone:
            bench.engine.cancel(gone[turn])
    device = drafts_of(bench)
    device.tables.check()
    assert not device.taken and device.tables.blocks.free == device.room
    for one in made:
        alone = Bench(slots=1)
        alone.engine.submit(one)
        alone.settle()
        said = bench.tokens(one.id)
        assert said == alone.tokens(one.id)[: len(said)]
        assert bench.ends(one.id) == alone.ends(one.id) or bench.ends(one.id) == ["cancelled"]


seconds = st.dictionaries(st.integers(1, 14), st.floats(1e-3, 10.0), min_size=1, max_size=8)
candidates = st.lists(st.builds(Candidate, st.integers(0, 6), st.floats(0.01, 0.99), st.integers(0, 5)), max_size=6)


def paced(taken: dict[int, float]) -> Pace:
    """Return what steps took, by their rows."""
    made = Pace()
    for rows, each in taken.items():
        made.took(rows, each)
    return made


@given(ones=candidates, target=seconds, draft=seconds)
@settings(max_examples=40)
def test_what_is_chosen_is_expected_to_be_faster_with_the_drafter_s_time_in_it(
    ones: list[Candidate], target: dict[int, float], draft: dict[int, float]
) -> None:
    pace, drafter_pace = paced({1: 1.0, **target}), paced({1: 0.1, **draft})
    found, rows = choose(ones, pace, 12, drafter_pace), len(ones)
    if not rows:
        assert found.counts == ()
        return
    base = rows / pace.seconds(rows)
    levels = [
        [
            one.first if level == 0 else 1
            for one, count in zip(ones, found.counts, strict=True)
            if one.first and count > level
        ]
        for level in range(max(found.counts))
    ]
    tokens = rows + sum(one.rate**n for one, count in zip(ones, found.counts, strict=True) for n in range(1, count + 1))
    taken = max(pace.seconds(rows + sum(found.counts)), pace.seconds(rows))
    taken += sum(drafter_pace.seconds(sum(level)) for level in levels if level)
    assert found.tokens_per_s == pytest.approx(tokens / taken)
    assert found.tokens_per_s > base if any(found.counts) else found.tokens_per_s == pytest.approx(base)
    assert found.tokens_per_s <= choose(ones, pace, 12).tokens_per_s * (1 + 1e-9)
    assert all(count <= one.drafts for one, count in zip(ones, found.counts, strict=True))


def test_drafts_and_their_seconds_are_metrics() -> None:
    metrics = Metrics()
    bench = timed(0.1)
    bench.engine._observer = metrics.observe("m")
    bench.submit("r", [1, 2], max_tokens=12, ignore_eos=True)
    bench.settle()
    lines = dict(line.rsplit(" ", 1) for line in metrics.text().decode().splitlines() if not line.startswith("#"))
    labels = '{engine="0",model_name="m"}'
    assert float(lines[f"vllm:spec_decode_num_accepted_tokens_total{labels}"]) == bench.step.kept > 0
    assert float(lines[f"llmbuild:draft_seconds_sum{labels}"]) == pytest.approx(0.1 * drafts_of(bench).steps, rel=1e-3)


def variant(tokenizer: str = "t", vocabulary: int = 64, page: int = 32) -> Any:
    """Return a model as the catalog tells it."""
    abi = {"context": 24, "vocabulary": vocabulary, "page": page, "kv": [], "eos_tokens": [0], "parameters": 9}
    return SimpleNamespace(row={"variant": "d" * 64, "model": "small", "tokenizer": tokenizer, "abi": abi})


@pytest.mark.parametrize(
    ("draft", "why"),
    [
        (variant(tokenizer="u"), "it has another tokenizer"),
        (variant(vocabulary=65), "it has another tokenizer"),
        (variant(page=0), "it computes one row at a time"),
    ],
)
def test_what_cannot_draft_is_refused(draft: Any, why: str) -> None:
    check_draft("big", variant(), variant())
    with pytest.raises(InputError, match=f"^big: variant {'d' * 12} of small cannot draft for it: {why}"):
        check_draft("big", variant(), draft)


def test_memory_is_counted_for_both_and_told() -> None:
    both = Need("big", 100_000_000, 3_000_000, True).beside(Need("dddd", 40_000_000, 1_000_000, True))
    assert both.total(2) == 148_000_000
    assert both.told(2) == "140 MB (measured) + 2 x 4.0 MB for keys and values, with draft dddd"


def test_half_of_the_choice_is_refused() -> None:
    assert SPECULATIONS == NAMES
    with pytest.raises(
        InputError, match="speculation draft needs a variant that drafts: name it as --draft, or `draft`"
    ):
        Plan(speculation="draft")
    with pytest.raises(InputError, match="a variant that drafts is for --speculation draft"):
        Plan(speculation="ngram", draft=variant())
