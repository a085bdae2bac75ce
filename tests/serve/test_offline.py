"""`llmbuild.serve.LLM`: prompts answered together are those answered alone, in their order."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from llmbuild.cli.main import main
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


def test_a_variants_answers_train_a_predictor_that_changes_no_answer(llm: LLM, chatty: Project, tmp_path: Path) -> None:
    """36 lengths are known; the variant answers the other four prompts, one of them a chat."""
    known = [{"prompt": f"def f{i}", "output_tokens": 3 + 9 * (i % 2), "group": str(i % 6)} for i in range(36)]
    asked = [{"prompt": "self"}, {"prompt": "a"}, {"prompt": "ab"}, {"messages": [{"role": "user", "content": "ab"}]}]
    (tmp_path / "prompts").write_text("".join(json.dumps(one) + "\n" for one in (*known, *asked)))
    assert llm.pick.chosen is not None
    variant = str(llm.pick.chosen["variant"])
    words = ["profile", variant, "-C", str(chatty.catalog), "--answers", str(tmp_path / "prompts"), "--max-tokens", "4"]
    more = ["-o", str(tmp_path / "lengths"), "--held-out", str(tmp_path / "held"), "--json"]
    done = CliRunner().invoke(main, [*words, *more])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    assert {"constant", "trained", "trained on other groups"} <= {row["predictor"] for row in rows}
    held = json.loads((tmp_path / "held").read_text())
    assert (held["model"], held["variant"], held["answers"], held["max_tokens"]) == ("tiny", variant, 40, 12)
    assert [row["output"] for row in held["rows"][:4]] == [3, 12, 3, 12]
    assert all(row["output"] <= 4 for row in held["rows"][36:])
    params = SamplingParams(temperature=0, max_tokens=9)
    files = {"scheduler": "isrtf", "predictor": tmp_path / "lengths"}
    with LLM("tiny", catalog=chatty.catalog, variant=variant, max_sequences=3, **files) as found:  # type: ignore[arg-type]
        assert [one.outputs for one in found.generate(TEXTS, params)] == [
            one.outputs for one in llm.generate(TEXTS, params)
        ]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("v", "--answers", "none.jsonl"), "--answers needs -o FILE"),
        (("v", "w", "--answers", "p", "-o", "f"), "--answers takes one VARIANT"),
        (("r.yaml", "--answers", "p", "-o", "f"), "--answers takes one VARIANT"),
        (("v", "--answers", "p", "-o", "f", "--load"), "--answers is neither with --load nor with --on"),
        (("v", "-o", "f"), "--output, --held-out and --max-tokens are for --answers"),
        (("v", "--answers", "none.jsonl", "-o", "f"), "none.jsonl: No such file"),
    ],
)
def test_what_trains_no_predictor_is_told(words: tuple[str, ...], told: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["profile", *words, "-C", str(tmp_path)])
    assert done.exit_code == 2 and told in done.output, done.output
