"""A step of one call for all rows: outputs are those of a call for each sequence, and of the loader, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmbuild.errors import InputError
from llmbuild.runtime import load, reader
from llmbuild.runtime.model import Model
from llmbuild.serve import LLM, budget, speculate
from llmbuild.serve.draft import Drafter
from llmbuild.serve.engine import Engine
from llmbuild.serve.pace import Pace, choose
from llmbuild.serve.per_sequence import PerSequenceStep
from llmbuild.serve.ragged import RaggedStep
from llmbuild.serve.request import Request, SamplingParams
from llmbuild.serve.sequence import Sequence
from llmbuild.serve.served import Settings, abi_of, opened
from llmbuild.serve.step import Output, Rows
from tests.conftest import RECIPE, Project, llmbuild, shared
from tests.serve.test_exact import PROMPTS, answered, tokens
from tests.support.machines import HOST

pytestmark = pytest.mark.skipif("avx2" not in HOST, reason="this CPU has not AVX2, which the kernels need here")
FORMATS = {"int8": "k8v4", "f16": "f16"}
"""Weight formats, and what the cache is kept in."""
CONTEXT = 112


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory, project: Project) -> Path:
    """A catalog with a variant of our kernels in each format."""

    def make(folder: Path) -> None:
        folder.mkdir()
        recipe, text = folder / "longer.yaml", RECIPE.format(model=project.model, text=project.folder / "heldout.txt")
        recipe.write_text(text.replace("context: 32", f"context: {CONTEXT}"))
        for form, kept in FORMATS.items():
            choices = {"kernel": "own", "layout": "packed", "weight_format": form, "kv_dtype": kept}
            pinned = [part for knob, value in choices.items() for part in ("--set", f"{knob}={value}")]
            done = llmbuild("build", recipe, "-C", folder / "catalog", *pinned, "--trials", "2", "--until", "compile")
            assert done.returncode == 0, done.stderr

    return shared(tmp_path_factory, "ragged", make) / "catalog"


@pytest.fixture(params=FORMATS)
def model(request: pytest.FixtureRequest, catalog: Path) -> Iterator[Model]:
    rows = [row for row in reader.variants(catalog, "tiny", everything=True) if row["point"]["kernel"] == "own"]
    (name,) = (row["variant"] for row in rows if row["point"]["weight_format"] == request.param)
    with load(catalog, "tiny", variant=name) as found:
        yield found


class Calls:
    """Counts the calls of a session's `step`, and their rows."""

    def __init__(self, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[int] = []
        whole = model.session.step

        def step(tokens: Any, *more: Any) -> Any:
            self.rows.append(len(tokens))
            return whole(tokens, *more)

        monkeypatch.setattr(model.session, "step", step)


def same(ours: list[Output], theirs: list[Output]) -> bool:
    """Return whether outputs are alike in every bit."""
    return all(
        one.token == other.token and np.array_equal(_logits(one), _logits(other))
        for one, other in zip(ours, theirs, strict=True)
    )


def _logits(output: Output) -> Any:
    assert output.logits is not None
    return output.logits


def test_outputs_are_those_of_a_call_for_each_sequence(model: Model) -> None:
    """Slots are reused, prompts cut anywhere, and sequences of all lengths go on together."""
    drawn, slots = np.random.default_rng(11), 5
    one, each = RaggedStep(model.session, slots), PerSequenceStep(model.session, slots)
    at, mixed = [0] * slots, set()
    for _ in range(60):
        batch = []
        for slot in drawn.permutation(slots)[: drawn.integers(1, slots, endpoint=True)].tolist():
            if at[slot] == one.context or drawn.random() < 0.05:
                one.end(slot)
                at[slot] = one.begin(slot, [], (), b"")
            count = min(int(drawn.choice([1, 1, 1, 2, 5, 49])), one.context - at[slot])
            batch.append(Rows(slot, drawn.integers(0, one.vocabulary, count).tolist(), at[slot], True))
            at[slot] += count
        mixed.add((len(batch) > 1, any(len(rows.tokens) > 1 for rows in batch)))
        assert same(one.run(batch), each.run(batch))
        one.tables.check()
    assert len(mixed) == 4
    one.close()
    each.close()


@pytest.mark.parametrize("scheduler", ["fcfs", "sarathi"])
def test_answers_of_a_mix_are_those_of_the_loader(
    model: Model, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(model, monkeypatch)
    greedy = SamplingParams(temperature=0, max_tokens=12)
    requests = [Request(f"r{n}", tuple(prompt), greedy, 0) for n, prompt in enumerate(PROMPTS)]
    said = answered(model, Settings(max_sequences=4, scheduler=scheduler), requests)
    wanted = [list(model.tokens(prompt, 12)) for prompt in PROMPTS]
    assert [tokens(said[f"r{n}"]) for n in range(len(PROMPTS))] == wanted
    assert len(calls.rows) < sum(map(len, wanted)) / 2 and 4 in calls.rows, "sequences share calls"


def test_a_call_has_rows_of_tokens_alone_and_has_read_its_inputs_when_it_returns(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three sequences of eight slots: nothing fills the others, and what a call was given may be overwritten."""
    whole, rows = model.session.step, list[int]()

    def step(*given: Any) -> Any:
        rows.append(len(given[0]))
        said = whole(*given)
        for array in given[:4]:
            array.fill(-1)
        return said

    monkeypatch.setattr(model.session, "step", step)
    greedy = SamplingParams(temperature=0, max_tokens=12)
    requests = [Request(f"r{n}", tuple(prompt), greedy, 0) for n, prompt in enumerate(PROMPTS[:3])]
    said = [tokens(events) for events in answered(model, Settings(max_sequences=8), requests).values()]
    assert said == [list(model.tokens(prompt, 12)) for prompt in PROMPTS[:3]]
    assert sum(rows) == sum(len(prompt) + len(one) - 1 for prompt, one in zip(PROMPTS, said, strict=False))


def test_outputs_behind_drafts_are_those_of_a_call_for_each_token(model: Model) -> None:
    drawn = np.random.default_rng(5)
    texts = [drawn.integers(0, 300, count).tolist() for count in (9, 40)]
    drafts = [drawn.integers(0, 300, count).tolist() for count in (4, 1)]
    one, each = RaggedStep(model.session, 2), PerSequenceStep(model.session, 2)
    for step in (one, each):
        step.run([Rows(slot, text, 0, False) for slot, text in enumerate(texts)])
    guessed = [Rows(slot, [7], len(text), True, drafts[slot]) for slot, text in enumerate(texts)]
    found = [[made, *made.drafts] for made in one.run(guessed)]
    for slot, (text, guesses) in enumerate(zip(texts, drafts, strict=True)):
        for at, token in enumerate((7, *guesses)):
            assert same([replace(found[slot][at], drafts=())], each.run([Rows(slot, [token], len(text) + at, True)]))
    one.keep(0, drafts[0][:2])  # the others are forgotten
    each.run([Rows(0, [7, *drafts[0][:2]], 9, False)])
    assert same(one.run([Rows(0, [5], 12, True)]), each.run([Rows(0, [5], 12, True)]))
    one.close()
    each.close()


def test_guessed_tokens_change_no_answer(model: Model) -> None:
    hot = SamplingParams(temperature=0.7, max_tokens=24, ignore_eos=True, seed=3)
    greedy = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    prompts = [(*prompt, *prompt) for prompt in PROMPTS[:4]]
    requests = [Request(f"r{n}", prompt, (hot, greedy)[n % 2], n) for n, prompt in enumerate(prompts)]
    plain = answered(model, Settings(max_sequences=4), requests)
    assert answered(model, Settings(max_sequences=4, speculation="ngram"), requests) == plain


def test_a_variant_that_drafts_for_another_changes_no_answer(catalog: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In f16 for int8, as if its steps took no time: prompts are caught up with, and most drafts are right."""
    kept = list[RaggedStep]()

    def keep(step: RaggedStep, slot: int, tokens: Any) -> None:
        kept.append(step)
        step.tables.computed(slot, tokens)

    rows = [row for row in reader.variants(catalog, "tiny", everything=True) if row["point"]["kernel"] == "own"]
    names = {row["point"]["weight_format"]: row["variant"] for row in rows}
    hot = SamplingParams(temperature=0.7, max_tokens=24, ignore_eos=True, seed=3)
    greedy = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    prompts, params = [[5], [1, 2], [9] * 32, list(range(40, 71)), [7, 8, 9]], [greedy, hot, greedy, hot, greedy]
    with LLM("tiny", catalog=catalog, variant=names["int8"], max_sequences=3) as plain:
        wanted = [one.outputs[0].token_ids for one in plain.generate(prompts, params)]
    monkeypatch.setattr(RaggedStep, "keep", keep)
    monkeypatch.setattr(Pace, "seconds", lambda pace, rows: 1.0)
    monkeypatch.setattr(Drafter, "costs", lambda drafter, rows: 0.0)
    monkeypatch.setattr(speculate, "choose", lambda ones, pace, most, drafter: choose(ones, pace, most))
    more: dict[str, Any] = {"speculation": "draft", "draft": names["f16"], "max_sequences": 3}
    with LLM("tiny", catalog=catalog, variant=names["int8"], **more) as drafting:
        told = drafting._served.told()
        assert [one.outputs[0].token_ids for one in drafting.generate(prompts, params)] == wanted
        assert kept.count(drafting._served.step) > 20, "drafts were right"  # type: ignore[arg-type]
    assert len({id(step) for step in kept}) == 2, "the drafter keeps them too"
    assert f"with draft {names['f16'][:12]}" in told


def test_answers_that_lose_their_place_are_those_alone(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for one context, and four sequences that each fill it: what is computed again has the bits that it had."""
    lost, preempt = list[int](), Engine._preempt

    def counted(engine: Engine, one: Sequence) -> None:
        lost.append(one.number)
        preempt(engine, one)

    monkeypatch.setattr(Engine, "_preempt", counted)
    hot = SamplingParams(temperature=0.8, max_tokens=None, ignore_eos=True, logprobs=2)
    greedy = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    requests = [Request(f"r{n}", tuple(range(9 + n, 15 + n)), (hot, greedy)[n % 2], n) for n in range(4)]
    memory = budget.need("tiny", model.row, abi_of(model), 4).total(1)
    tight = answered(model, Settings(memory, max_sequences=4, admission="expected"), requests)
    assert lost and 1 not in lost
    for one in requests:
        (alone,) = answered(model, Settings(max_sequences=1), [one]).values()
        assert tight[one.id] == alone and len(alone) == CONTEXT - 5


def test_draws_of_a_mix_are_those_alone(model: Model) -> None:
    hot = SamplingParams(temperature=2.0, top_p=0.9, frequency_penalty=0.5, max_tokens=8, logprobs=3)
    requests = [Request(f"r{n}", tuple(prompt), hot, n) for n, prompt in enumerate(PROMPTS)]
    mixed = answered(model, Settings(max_sequences=4), requests)
    for one in requests:
        (alone,) = answered(model, Settings(max_sequences=1), [one]).values()
        assert mixed[one.id] == alone


def test_prompts_that_begin_alike_say_the_same_hot_and_cold(model: Model) -> None:
    drawn = np.random.default_rng(2)
    common, page = drawn.integers(0, 300, 70).tolist(), model.session.abi.page
    params = SamplingParams(temperature=1.0, max_tokens=6, logprobs=3)
    prompts = [(*common, *drawn.integers(0, 300, n).tolist()) for n in (0, 1, 9, 26)]
    requests = [Request(f"r{n}", prompt, params, n) for n, prompt in enumerate(prompts)]
    one_by_one = answered(model, Settings(max_sequences=1), requests)
    assert [said[0].cached for said in one_by_one.values()] == [0] + [70 // page * page] * 3
    for one in requests:
        (alone,) = answered(model, Settings(max_sequences=1), [one]).values()
        assert [replace(event, cached=0) for event in one_by_one[one.id]] == alone


def test_it_is_the_step_where_the_artifact_has_one(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    (served,) = opened([model], Settings(max_sequences=2), lambda events: None, {})
    assert isinstance(served.step, RaggedStep) and "in one call" in served.told()
    served.step.close()
    monkeypatch.setattr(model.session, "abi", replace(model.session.abi, page=0))
    (served,) = opened([model], Settings(max_sequences=2), lambda events: None, {})
    assert isinstance(served.step, PerSequenceStep) and "in a call each" in served.told()
    served.step.close()
    with pytest.raises(InputError, match="has no `step`"):
        RaggedStep(model.session, 1)


def test_rows_that_are_not_there_are_refused(model: Model) -> None:
    session, page = model.session, model.session.abi.page
    blocks = -(-session.abi.context // page)
    with session.shared_cache(blocks) as cache:

        def step(token: int = 1, position: int = 0, read: int = 0, tables: int = blocks) -> None:
            where = np.array([position, 2, *range(tables)])
            session.step(np.array([token]), np.array([position]), where, np.array([read]), cache)

        step()
        with pytest.raises(InputError, match="outside the vocabulary"):
            step(token=session.abi.vocabulary)
        with pytest.raises(InputError, match="outside a context"):
            step(position=session.abi.context)
        with pytest.raises(InputError, match="is not one of the 1"):
            step(read=1)
        with pytest.raises(InputError, match="a step needs rows"):
            step(tables=0)
    with pytest.raises(InputError, match="blocks is 0"), session.shared_cache(0):
        pass
