"""Tools: what OpenAI's client is told of the calls in answers, whatever the form and however the text is cut."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmbuild.serve.tools import BEGIN, END, Call, Parser, Tool, Tools, form_of
from tests.support.scripted import HERMES, LLAMA3, PLAIN, Scripted, tokenizer
from tests.support.server import local

CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Says it.", "parameters": CITY}}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "maxProperties": 0}}}
ASKED: Any = [{"role": "user", "content": "what is it like in Oslo?"}]
OSLO = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
ROME = OSLO.replace("Oslo", "Rome")
HERMES_TOOLS = Tools("hermes", (Tool("weather", CITY), Tool("clock", {"type": "object"})))


@pytest.fixture(scope="module", params=[(), (BEGIN, END)], ids=["tags of text", "tags that are tokens"])
def vocabulary(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer(tmp_path_factory.mktemp("tokens"), request.param)


@contextmanager
def served(path: Path, says: str, template: str = HERMES) -> Iterator[tuple[openai.OpenAI, Scripted]]:
    """Serve a model that says something, and return a client of it."""
    with local(make=partial(Scripted, path, template, says)) as found:
        served_: Any = found.state.models["fake"]
        with openai.OpenAI(base_url=f"{found.url}/v1", api_key="none", max_retries=0) as client:
            yield client, served_


def asked(client: openai.OpenAI, **more: Any) -> Any:
    return client.chat.completions.create(
        model="fake", messages=ASKED, temperature=0, max_tokens=200, tools=[WEATHER, CLOCK], **more
    )


def streamed(client: openai.OpenAI, **more: Any) -> Any:
    """Return what the client's own helper makes of a stream."""
    with client.chat.completions.stream(
        model="fake", messages=ASKED, temperature=0, max_tokens=200, tools=[WEATHER, CLOCK], **more
    ) as stream:
        return stream.get_final_completion()


def calls(completion: Any) -> list[tuple[str, Any]]:
    found = completion.choices[0].message.tool_calls or []
    assert len({call.id for call in found}) == len(found) and all(call.type == "function" for call in found)
    return [(call.function.name, json.loads(call.function.arguments)) for call in found]


@pytest.mark.parametrize("ask", [asked, streamed])
def test_a_call_is_a_call_whether_it_is_streamed_or_not(vocabulary: Path, ask: Any) -> None:
    with served(vocabulary, f"I look.{OSLO}\n{ROME}") as (client, model):
        told = ask(client)
        assert calls(told) == [("weather", {"city": "Oslo"}), ("weather", {"city": "Rome"})]
        assert told.choices[0].finish_reason == "tool_calls"
        assert (told.choices[0].message.content or "").strip() == "I look."
        assert '{"type": "function", "function": {"name": "weather", "description": "Says it."' in model.prompt()


def test_a_stream_begins_each_call_with_its_name_and_goes_on_with_arguments(tmp_path: Path) -> None:
    with served(tokenizer(tmp_path), f"{OSLO}\n{ROME}") as (client, _):
        deltas = [choice.delta for chunk in asked(client, stream=True) for choice in chunk.choices]
        parts = [part for delta in deltas for part in delta.tool_calls or []]
        assert [part.index for part in parts] == [0, 0, 1, 1]
        assert [(part.id is not None, part.function.name) for part in parts[::2]] == [(True, "weather")] * 2
        assert [part.function.arguments for part in parts] == ["", '{"city": "Oslo"}', "", '{"city": "Rome"}']


@pytest.mark.parametrize("ask", [asked, streamed])
def test_an_answer_without_a_call_is_text(tmp_path: Path, ask: Any) -> None:
    with served(tokenizer(tmp_path), "a < b, {it} is <tool") as (client, _):
        told = ask(client)
        assert (told.choices[0].message.content, calls(told)) == ("a < b, {it} is <tool", [])
        assert told.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("ask", [asked, streamed])
@pytest.mark.parametrize("template", [HERMES, LLAMA3])
def test_a_call_that_is_required_comes_whatever_the_model_prefers(vocabulary: Path, ask: Any, template: str) -> None:
    with served(vocabulary, "no, I would rather chat about something else", template) as (client, _):
        for choice, names in (("required", {"weather", "clock"}), ({"function": {"name": "weather"}}, {"weather"})):
            chosen = choice if isinstance(choice, str) else {"type": "function", **choice}
            told = ask(client, tool_choice=chosen, parallel_tool_calls=False)
            ((name, arguments),) = calls(told)
            assert name in names and told.choices[0].finish_reason == "tool_calls"
            assert name == "clock" or arguments["city"] in ("Oslo", "Rome")


@pytest.mark.parametrize("ask", [asked, streamed])
def test_llama_s_calls_are_json_in_place_of_a_text(tmp_path: Path, ask: Any) -> None:
    with served(tokenizer(tmp_path), '{"name": "weather", "parameters": {"city": "Rome"}}', LLAMA3) as (client, _):
        told = ask(client)
        assert calls(told) == [("weather", {"city": "Rome"})]
        assert told.choices[0].finish_reason == "tool_calls"
    with served(tokenizer(tmp_path), '{"name": "nobody", "parameters": {}}', LLAMA3) as (client, _):
        told = ask(client)
        assert (told.choices[0].message.content, calls(told)) == ('{"name": "nobody", "parameters": {}}', [])


def test_a_call_that_is_cut_off_is_text_and_no_call(tmp_path: Path) -> None:
    with served(tokenizer(tmp_path), OSLO) as (client, _):
        told = client.chat.completions.create(
            model="fake",
            messages=ASKED,
            temperature=0,
            max_tokens=20,
            tools=[WEATHER],  # type: ignore[list-item]
        )
        assert told.choices[0].finish_reason == "length"
        assert OSLO.startswith(told.choices[0].message.content or "?") and calls(told) == []


def test_none_shows_the_model_no_tools(tmp_path: Path) -> None:
    with served(tokenizer(tmp_path), OSLO) as (client, model):
        told = asked(client, tool_choice="none")
        assert (told.choices[0].message.content, calls(told)) == (OSLO, [])
        assert "weather" not in model.prompt()


def test_calls_and_results_of_before_are_in_the_prompt(tmp_path: Path) -> None:
    with served(tokenizer(tmp_path), "It rains.") as (client, model):
        made = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
        told = client.chat.completions.create(
            model="fake",
            messages=[
                *ASKED,
                {"role": "assistant", "content": None, "tool_calls": [made]},  # type: ignore[list-item]
                {"role": "tool", "tool_call_id": "c1", "content": "rain <|im_end|>"},
            ],
            tools=[WEATHER],  # type: ignore[list-item]
            temperature=0,
        )
        assert told.choices[0].message.content == "It rains."
        prompt = model.prompt()
        assert '"name": "weather", "arguments": {"city": "Oslo"}' in prompt and "rain <|im_end|>" in prompt
        ends = model.step.prompts[-1].count(model.step.ends[0])
        assert ends == 4  # system, user, assistant and tool: that of the result is text


WRONG: list[tuple[Any, str]] = [
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tools": [WEATHER, WEATHER]}, "tools"),
    ({"tools": [{"type": "code_interpreter"}]}, "tools[0].type"),
    ({"tools": "weather"}, "tools"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": "maybe"}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [WEATHER], "response_format": {"type": "json_object"}}, "response_format"),
    ({"tools": [WEATHER], "min_tokens": 3, "tool_choice": "required"}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "nonsense"}}}]}, "tools"),
]


def test_what_is_wrong_with_tools_is_told_by_the_field(tmp_path: Path) -> None:
    with served(tokenizer(tmp_path), "x") as (client, _):
        for more, param in WRONG:
            with pytest.raises(openai.BadRequestError) as told:
                client.post("/chat/completions", body={"model": "fake", "messages": ASKED, **more}, cast_to=object)
            assert told.value.param == param


def test_a_model_whose_template_takes_no_tools_refuses_them(tmp_path: Path) -> None:
    with (
        served(tokenizer(tmp_path), "x", PLAIN) as (client, _),
        pytest.raises(openai.BadRequestError, match="the chat template of fake takes none that this server can read"),
    ):
        asked(client)


def test_the_form_is_that_of_the_template() -> None:
    assert [form_of(one) for one in (HERMES, LLAMA3, PLAIN)] == ["hermes", "llama3", None]


TEXTS = st.lists(
    st.sampled_from([OSLO, ROME, BEGIN, END, "<tool", "_call>", "text", "\n", '{"name": 1}', "<", "é"]), max_size=8
)


@given(TEXTS, st.data())
def test_a_stream_says_what_the_whole_says_wherever_it_is_cut(parts: list[str], data: st.DataObject) -> None:
    text, whole, pieces = "".join(parts), Parser(HERMES_TOOLS), Parser(HERMES_TOOLS)
    said = whole.push(text) + whole.end()
    found, rest = "", text
    while rest:
        count = data.draw(st.integers(1, len(rest)))
        found, rest = found + pieces.push(rest[:count]), rest[count:]
    assert (found + pieces.end(), pieces.calls) == (said, whole.calls)


@given(st.text(alphabet="<tol_ca>/{}ab\n", max_size=40))
def test_a_text_without_a_call_is_lost_nowhere(text: str) -> None:
    parser = Parser(HERMES_TOOLS)
    assert parser.push(text) + parser.end() == text and parser.calls == []


def test_a_second_call_is_text_where_one_is_asked_for() -> None:
    parser = Parser(Tools("hermes", HERMES_TOOLS.offered, several=False))
    said = parser.push(OSLO + ROME) + parser.end()
    assert (said, parser.calls) == (ROME, [Call("weather", '{"city": "Oslo"}')])
