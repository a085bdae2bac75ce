"""Blocks that sequences share: names, references, what is used again first; and prompts that begin alike."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmbuild.serve.blocks import Blocks, Chain, Tables
from llmbuild.serve.errors import RequestRefused
from llmbuild.serve.events import Delta
from llmbuild.serve.schedule.sarathi import Sarathi
from tests.support.serving import CONTEXT, PAGE, Bench, alone

PROMPT = [5, 9, 2, 7, 7, 1, 3, 8, 4, 6]


@given(st.lists(st.integers(0, 9), max_size=30), st.data())
def test_names_depend_on_all_tokens_before_and_on_the_salt_alone(tokens: list[int], data: st.DataObject) -> None:
    whole = Chain(4, b"a").add(tokens)
    assert len(whole) == len(set(whole)) == len(tokens) // 4
    pieces, chain, at = [], Chain(4, b"a"), 0
    while at < len(tokens):
        step = data.draw(st.integers(1, 9))
        pieces += chain.add(tokens[at : at + step])
        at += step
    assert tuple(pieces) == whole
    assert not set(whole) & set(Chain(4, b"b").add(tokens))
    if tokens:
        place = data.draw(st.integers(0, len(tokens) - 1))
        other = Chain(4, b"a").add([*tokens[:place], tokens[place] + 1, *tokens[place + 1 :]])
        assert other[: place // 4] == whole[: place // 4]
        assert not set(other[place // 4 :]) & set(whole)


def test_what_is_longest_unused_is_used_first_and_the_end_of_a_text_before_its_beginning() -> None:
    blocks, names = Blocks(4), Chain(1, b"").add([1, 2, 3])
    held = [blocks.new() for _ in names]
    for block, name in zip(held, names, strict=True):
        blocks.name(block, name)
    blocks.give(held)
    assert (blocks.free, blocks.known(names)) == (4, 3)
    unnamed = blocks.new()
    assert unnamed not in held
    blocks.give([unnamed])
    assert blocks.new() == unnamed, "one without a name is used before those that may be found again"
    assert [blocks.new(), blocks.known(names)] == [held[2], 2]
    assert blocks.take(names) == held[:2]
    assert blocks.free == 0
    with pytest.raises(RuntimeError, match="none of 4 blocks is free"):
        blocks.new()
    blocks.check([held, [unnamed]])
    blocks.give(held[:1])
    with pytest.raises(AssertionError, match="given back twice"):
        blocks.give(held[:1])
    with pytest.raises(AssertionError, match="references"):
        blocks.check([held])


def test_one_of_two_alike_keeps_the_name() -> None:
    blocks, (name,) = Blocks(2), Chain(1, b"").add([1])
    first, second = blocks.new(), blocks.new()
    blocks.name(first, name)
    blocks.name(second, name)
    blocks.give([second])
    assert blocks.take((name,)) == [first]
    assert blocks.new() == second and blocks.known((name,)) == 1


def test_slots_never_wait_for_a_block() -> None:
    """All slots hold all they can, beside whatever was named before."""
    tables = Tables(3, 10, 4, 3)
    for turn in range(5):
        for slot in range(3):
            assert tables.begin(slot, [turn, slot], (), b"") == 0
            tables.grow(slot, 10)
            tables.computed(slot, range(turn, turn + 10))
        assert len(set(tables.array.ravel().tolist())) == 9 and tables.blocks.free == 0
        tables.check()
        for slot in range(3):
            tables.end(slot)
    tables.grow(1, 1)
    with pytest.raises(AssertionError, match="slot 1 is taken"):
        tables.begin(1, PROMPT, (), b"")


def test_sequences_are_admitted_while_all_that_they_may_take_is_there() -> None:
    """Two contexts of six blocks: short sequences are more than two, and none ever waits for a block."""
    bench = Bench(slots=5, contexts=2, scheduler=Sarathi(96, 1))
    for n in range(5):
        bench.submit(f"short{n}", PROMPT[: 2 + n], max_tokens=5, ignore_eos=True)  # twelve blocks
    bench.submit("long", PROMPT, ignore_eos=True, max_tokens=None)
    bench.submit("behind", PROMPT[:2], max_tokens=2, ignore_eos=True)
    bench.engine.turn()
    assert sorted(one.request.id for one in bench.engine._running.values()) == [f"short{n}" for n in range(5)]
    while "short0" in {one.request.id for one in bench.engine._running.values()}:
        bench.engine.turn()
    bench.settle()
    assert bench.ends("long") == ["length"] == bench.ends("behind")
    assert len(bench.tokens("long")) == CONTEXT - len(PROMPT) + 1
    assert bench.engine.snapshot().used == 0


def test_what_can_never_fit_is_refused_and_the_next_is_answered() -> None:
    """Blocks for less than a context: a request that fits exactly is answered, one of a token more is not."""
    bench = Bench(slots=2, contexts=1)
    bench.step.tables.blocks = Blocks(3)
    exact = 3 * PAGE
    with pytest.raises(RequestRefused, match="take up to 4 blocks of memory; this server has 3") as told:
        bench.submit("over", PROMPT, max_tokens=exact - len(PROMPT) + 2)
    assert told.value.param == "max_tokens"
    bench.submit("exact", PROMPT, max_tokens=exact - len(PROMPT) + 1, ignore_eos=True)
    bench.submit("next", PROMPT[:3], max_tokens=2, ignore_eos=True)
    bench.settle()
    assert bench.ends("exact") == bench.ends("next") == ["length"]


@pytest.mark.parametrize("rest", [[], [11], [11, 12, 13, 14, 15]])
def test_a_prompt_that_begins_like_another_is_not_computed_again_and_says_the_same(rest: list[int]) -> None:
    for policy in (Sarathi(3, 1), Sarathi(96, 1)):
        bench = Bench(scheduler=policy)
        cold = bench.submit("cold", PROMPT, max_tokens=6, ignore_eos=True, temperature=1.0, logprobs=2)
        bench.settle()
        assert bench.step.found == 0
        hot = bench.submit("hot", [*PROMPT, *rest], 1, max_tokens=6, ignore_eos=True, temperature=1.0, logprobs=2)
        bench.settle()
        expected = len(PROMPT) // PAGE * PAGE
        assert bench.step.found == expected
        assert [e.cached for e in bench.of("hot") if isinstance(e, Delta)] == [expected, 0, 0, 0, 0, 0]
        for one in (cold, hot):
            assert (bench.tokens(one.id), bench.text(one.id), bench.ends(one.id)) == alone(one)


def test_an_answer_is_the_beginning_of_the_next_prompt() -> None:
    bench = Bench()
    bench.submit("first", PROMPT, max_tokens=8, ignore_eos=True)
    bench.settle()
    bench.submit("next", [*PROMPT, *bench.tokens("first"), 3], max_tokens=1)
    bench.settle()
    assert bench.step.found == (len(PROMPT) + 7) // PAGE * PAGE, "all but the last token were computed"


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    bench = Bench()
    for turn, name in enumerate("abc"):
        bench.submit(name, PROMPT[: 2 * PAGE], max_tokens=1)
        bench.settle()
        assert bench.step.found == turn * PAGE


def test_prompts_of_others_are_not_found() -> None:
    bench = Bench()
    for n, salt in enumerate((b"a", b"b", b"a")):
        bench.submit(f"r{n}", PROMPT, max_tokens=1, salt=salt)
        bench.settle()
        assert bench.step.found == (2 * PAGE if n == 2 else 0)


def test_a_running_sequence_shares_what_it_has_computed() -> None:
    bench = Bench(slots=2)
    bench.submit("long", PROMPT, max_tokens=9, ignore_eos=True)
    bench.engine.turn()
    beside = bench.submit("beside", [*PROMPT[:PAGE], 1, 1, 1], max_tokens=9, ignore_eos=True)
    bench.engine.turn()
    assert bench.step.found == PAGE and len(bench.step.taken) == 2
    bench.engine.cancel("long")
    bench.settle()
    assert bench.tokens("beside") == alone(beside)[0]
