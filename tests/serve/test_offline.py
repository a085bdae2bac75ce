"""`llmbuild.serve.LLM`: prompts answered together are those answered alone, in their order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from llmbuild.errors import InputError
from llmbuild.runtime import load
from llmbuild.serve import LLM, SamplingParams
from tests.conftest import Project


@pytest.fixture(scope="module")
def llm(chatty: Project) -> Iterator[LLM]:
    with LLM("tiny", catalog=chatty.catalog, max_sequences=3) as found:
        yield found


TEXTS = ["def push", "self", "é", "items.append(item)", "a"]


def test_answers_are_the_loaders_in_the_order_of_the_prompts(llm: LLM, chatty: Project) -> None:
    said = llm.generate(TEXTS, SamplingParams(temperature=0, max_tokens=9))
    with load(chatty.catalog, "tiny") as model:
        assert [one.outputs[0].text for one in said] == ["".join(model.generate(text, 9)) for text in TEXTS]
        assert [one.prompt_token_ids for one in said] == [model.tokenizer.encode(text).ids for text in TEXTS]
        messages = [{"role": "user", "content": "ab"}]
        (chat,) = llm.chat(messages, SamplingParams(temperature=0, max_tokens=9))
        assert chat.outputs[0].text == "".join(model.chat(messages, 9))
    assert [one.prompt for one in said] == TEXTS
    assert all(one.finished and one.outputs[0].finish_reason in ("stop", "length") for one in said)
    assert llm.generate([one.prompt_token_ids for one in said], SamplingParams(temperature=0, max_tokens=9))[
        2
    ].outputs == (said[2].outputs)


def test_each_prompt_may_have_its_parameters(llm: LLM) -> None:
    each = [SamplingParams(max_tokens=n + 1, n=n + 1, seed=n, logprobs=n or None) for n in range(3)]
    said = llm.generate(TEXTS[:3], each)
    assert [[len(c.token_ids) for c in one.outputs] for one in said] == [[1], [2, 2], [3, 3, 3]]
    assert said[0].outputs[0].logprobs is None and said[0].outputs[0].cumulative_logprob is None
    last = said[2].outputs[1]
    assert last.logprobs is not None and last.cumulative_logprob is not None
    assert last.cumulative_logprob == pytest.approx(
        sum(one[token].logprob for one, token in zip(last.logprobs, last.token_ids, strict=True))
    )
    assert [sorted(v.rank for v in one.values() if v.rank) for one in last.logprobs] == [[1, 2]] * 3
    assert llm.generate(TEXTS[2], each[2])[0].outputs == said[2].outputs


WRONG: list[tuple[Any, Any, str]] = [
    (["a", ""], None, r"prompts\[1\]: the prompt is empty"),
    (["a", "a b " * 60], None, r"prompts\[1\]: the prompt has \d+ tokens"),
    (["a", [400]], None, r"prompts\[1\]: prompt: token 400 is outside"),
    (["a", 7], None, r"prompts\[1\] is a int; it must be a text"),
    (["a", "b"], [SamplingParams()], "1 items for 2 prompts"),
]


@pytest.mark.parametrize(("prompts", "params", "told"), WRONG)
def test_a_wrong_prompt_is_told_before_any_is_answered(llm: LLM, prompts: Any, params: Any, told: str) -> None:
    steps = llm._served.engine._arrived
    with pytest.raises(InputError, match=told):
        llm.generate(prompts, params)
    assert llm._served.engine._arrived == steps
    assert len(llm.generate("a", SamplingParams(max_tokens=2, ignore_eos=True))[0].outputs[0].token_ids) == 2
