"""A real variant that is served: its tokens are those of the loader, bit for bit, and its memory is what was said."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Event as Flag
from typing import Any

import numpy as np
import pytest

from llmbuild.errors import InputError
from llmbuild.kernels.kept import keys_and_values
from llmbuild.runtime import load, reader
from llmbuild.runtime.model import Model
from llmbuild.serve import budget
from llmbuild.serve.events import Delta, Event
from llmbuild.serve.per_sequence import PerSequenceStep
from llmbuild.serve.request import Request, SamplingParams
from llmbuild.serve.served import Served, Settings, abi_of, opened
from llmbuild.serve.step import Rows
from llmbuild.spec.program import TensorType
from tests.conftest import Project

PROMPTS = [[7, 8, 9], [11] * 9, [5], list(range(40, 71)), [300, 2, 1, 0, 4], [9] * 32, [1, 2], [3] * 20]


@pytest.fixture(scope="module")
def model(built: Project) -> Iterator[Model]:
    with load(built.catalog, "tiny") as found:
        yield found


def answered(model: Model, settings: Settings, requests: list[Request]) -> dict[str, list[Any]]:
    """Return what an engine says to requests that come together."""
    said: dict[str, list[Any]] = {one.id: [] for one in requests}
    left, done = {one.id for one in requests}, Flag()

    def outlet(events: Any) -> None:
        for event in events:
            said[event.request].append(event)
            if not isinstance(event, Delta) or event.finish:
                left.discard(event.request)
        if not left:
            done.set()

    (served,) = opened([model], settings, outlet, {})
    try:
        for one in requests:
            served.engine.submit(one)
        served.engine.start()
        assert done.wait(120)
    finally:
        served.engine.close()
        served.step.close()
    return said


def tokens(events: list[Event]) -> list[int]:
    return [event.token for event in events if isinstance(event, Delta)]


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_greedy_tokens_of_a_mix_are_those_of_the_loader(model: Model, slots: int) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=12)
    requests = [Request(f"r{n}", tuple(prompt), greedy, 0) for n, prompt in enumerate(PROMPTS)]
    said = answered(model, Settings(max_sequences=slots), requests)
    assert [tokens(said[f"r{n}"]) for n in range(len(PROMPTS))] == [list(model.tokens(p, 12)) for p in PROMPTS]


def test_log_probabilities_and_draws_of_a_mix_are_those_alone(model: Model) -> None:
    hot = SamplingParams(temperature=2.0, top_p=0.9, frequency_penalty=0.5, max_tokens=8, logprobs=3)
    requests = [Request(f"r{n}", tuple(prompt), hot, n) for n, prompt in enumerate(PROMPTS)]
    mixed = answered(model, Settings(max_sequences=4), requests)
    for one in requests:
        (alone,) = answered(model, Settings(max_sequences=1), [one]).values()
        assert mixed[one.id] == alone
    assert len({tuple(tokens(events)) for events in mixed.values()}) > 4


def test_texts_are_those_of_the_loader(model: Model, built: Project) -> None:
    texts = ["def push", "é", "self.items"]
    prompts = [tuple(model.tokenizer.encode(text).ids) for text in texts]
    greedy = SamplingParams(temperature=0, max_tokens=10, stop=["x"])
    said = answered(model, Settings(), [Request(text, p, greedy, 0) for text, p in zip(texts, prompts, strict=True)])
    for text in texts:
        assert "".join(e.text for e in said[text]) == "".join(model.generate(text, 10, stop=["x"]))


def variants(project: Project) -> list[str]:
    return sorted(
        {row["variant"] for row in reader.variants(project.catalog, "tiny", everything=True) if row["artifact"]}
    )


def test_where_a_prompt_may_be_cut_is_found_and_holds(built: Project) -> None:
    """Whatever the kernels of a variant do: a multiple that was found changes no bit of other prompts either."""
    cuts = {}
    for name in variants(built):
        with load(built.catalog, "tiny", variant=name) as model:
            step = PerSequenceStep(model.session, 2)
            step.probe()
            cuts[name] = step.cut
            if step.cut:
                drawn = np.random.default_rng(5).integers(0, step.vocabulary, 29).tolist()
                (whole,) = step.run([Rows(0, drawn, 0, True)])
                assert whole.logits is not None
                kept = whole.logits.copy()
                at = step.cut * 2
                step.run([Rows(1, drawn[:at], 0, False)])
                (rest,) = step.run([Rows(1, drawn[at:], at, True)])
                assert rest.logits is not None and (rest.logits == kept).all()
            step.close()
    assert len(cuts) >= 2


def test_chunked_prompts_give_the_tokens_of_whole_ones(built: Project) -> None:
    for name in variants(built):
        with load(built.catalog, "tiny", variant=name) as model:
            requests = [Request(str(n), tuple(p), SamplingParams(temperature=0), 0) for n, p in enumerate(PROMPTS)]
            step = PerSequenceStep(model.session, 1)
            step.probe()
            step.close()
            chunked = Settings(scheduler="sarathi", max_sequences=3)
            if not step.cut and not model.session.abi.page:
                with pytest.raises(InputError, match="computes other bits for a prompt in pieces"):
                    answered(model, chunked, requests)
                continue
            said = answered(model, chunked, requests)
            assert [tokens(said[str(n)]) for n in range(len(PROMPTS))] == [list(model.tokens(p, 16)) for p in PROMPTS]


def test_sequences_are_as_many_as_fit(model: Model) -> None:
    abi = replace(abi_of(model), page=0)
    need = budget.need("tiny", model.row, abi, 16)
    held = sum(np.zeros(kind.shape, kind.dtype).nbytes for kind in model.session.abi.kv)
    assert need.sequence_bytes == held + 4 * model.session.abi.vocabulary
    paged = budget.need("tiny", model.row, replace(abi, page=24), 16)  # whole blocks: 48 positions for 32
    assert paged.sequence_bytes == held * 48 // 32
    assert paged.fixed_bytes == need.fixed_bytes + 16 * 4 * abi.vocabulary
    for kind, position in (("f16", 256), ("int8", 2 * 68), ("k8v4", 68 + 36), ("int4", 2 * 36)):  # a head of 64
        kv = tuple(TensorType((32, 3, kept.elements), kept.dtype) for kept in keys_and_values(kind, 64))
        assert budget.cache_bytes(replace(abi, kv=kv, context=32)) == 32 * 3 * position
    for count in (1, 2, 5):
        assert budget.sequences([need], need.total(count), [16]) == [count]
        assert budget.sequences([need], need.total(count + 1) - 1, [16]) == [count]
    assert budget.sequences([need, need], 2 * need.fixed_bytes + 7 * need.sequence_bytes, [3, 3]) == [3, 3]
    assert budget.sequences([need, need], 2 * need.fixed_bytes + 5 * need.sequence_bytes, [16, 16]) == [3, 2]
    fits = -(-need.total(1) // 1_000_000)
    with pytest.raises(InputError, match=f"give {fits}MB or more"):
        budget.sequences([need], need.total(1) - 1, [16])
    with pytest.raises(InputError, match="this host gives"):
        budget.memory(1 << 60)


def test_an_unmeasured_variant_is_estimated(model: Model) -> None:
    row = {**model.row, "peak_memory_bytes": None}
    need = budget.need("tiny", row, abi_of(model), 16)  # type: ignore[arg-type]
    assert not need.measured and "estimated" in need.told(2)
    assert need.fixed_bytes > (model.row["parameter_bytes"] or 0)


def test_a_variant_of_several_sequences_is_refused(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.session, "abi", replace(model.session.abi, batch=2))
    with pytest.raises(InputError, match="answers 2 sequences in each call"):
        PerSequenceStep(model.session, 1)


def test_a_refused_prompt_of_a_chat_names_its_field(model: Model) -> None:
    (served,) = opened([model], Settings(max_sequences=1), lambda events: None, {})
    try:
        with pytest.raises(InputError, match="has no chat template") as told:
            served.chat([{"role": "user", "content": "a"}])
        assert getattr(told.value, "param", "") == "messages"
        with pytest.raises(InputError, match="is empty"):
            served.text("")
    finally:
        served.step.close()
    assert isinstance(served, Served)


def test_the_floor_is_light(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = "import sys, llmbuild.serve; llmbuild.serve.SamplingParams(); print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    heavy = "torch sqlalchemy optuna click iree starlette uvicorn prometheus_client anyio jinja2".split()
    assert [name for name in heavy if name in done.stdout.split()] == []
