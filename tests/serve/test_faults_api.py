"""Faults that APIs of other servers had, held against ours: `docs/explanation/serving-faults.md` lists them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletionChunk

from llmbuild.serve.api import asked
from llmbuild.serve.api.asked import Asked
from llmbuild.serve.api.bridge import Bridge, Numbered
from llmbuild.serve.api.errors import ApiError, of_exception
from llmbuild.serve.api.fields import parsed
from llmbuild.serve.api.keys import Keys
from llmbuild.serve.api.metrics import Metrics
from llmbuild.serve.api.replies import Replies, parts
from llmbuild.serve.events import Delta, Finish, Logprob
from llmbuild.serve.tools import Tools
from tests.serve.test_api import CHAT, TEXT, chat, events, gated, text
from tests.serve.test_tools import HERMES_TOOLS, OSLO, ROME, WEATHER
from tests.support.scripted import HERMES, PLAIN, Scripted, tokenizer
from tests.support.server import Letters, Local, local
from tests.support.serving import CONTEXT, PAGE, WORDS, request


@pytest.fixture(scope="module")
def server() -> Iterator[Local]:
    with local() as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Local) -> Iterator[httpx.Client]:
    with server.client() as found:
        yield found


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer(tmp_path_factory.mktemp("letters"))


# --- prompts ---------------------------------------------------------------------------------------------------------


def cached(response: httpx.Response) -> int:
    return int(response.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_two_chats_that_alternate_are_told_what_was_there_and_say_the_same(client: httpx.Client) -> None:
    bodies = [chat(messages=[{"role": "user", "content": word * 3}], max_tokens=4) for word in ("abcd", "bcde")]
    cold = [client.post(CHAT, json=body) for body in bodies]
    warm = [client.post(CHAT, json=body) for body in bodies]
    assert [cached(one) for one in cold] == [0, 0]
    assert [cached(one) for one in warm] == [(len("abcd") * 3 - 1) // PAGE * PAGE] * 2
    assert [one.json()["choices"] for one in warm] == [one.json()["choices"] for one in cold]
    assert cold[0].json()["choices"] != cold[1].json()["choices"]


def test_keys_share_no_beginnings(tmp_path: Path) -> None:
    names = [f"key-of-client-{n}-0123" for n in range(2)]
    (tmp_path / "keys").write_text("\n".join(names))
    with local(keys=Keys.read(tmp_path / "keys")) as server, server.client() as client:
        found = [
            cached(client.post(TEXT, json=text(prompt="abcdefgh"), headers={"authorization": f"Bearer {names[n]}"}))
            for n in (0, 1, 0, 1)
        ]
    assert found == [0, 0, PAGE, PAGE]


@pytest.mark.parametrize("length", [1, CONTEXT - 1, CONTEXT, CONTEXT + 1, CONTEXT + 2, 5 * CONTEXT])
def test_a_prompt_is_counted_whole_or_refused(client: httpx.Client, length: int) -> None:
    told = client.post("/tokenize", json={"model": "fake", "prompt": "a" * length}).json()["count"]
    assert told == length
    for path, body in (
        (TEXT, text(prompt="a" * length)),
        (CHAT, chat(messages=[{"role": "user", "content": "a" * length}])),
    ):
        found = client.post(path, json={**body, "max_tokens": 1})
        if length <= CONTEXT:
            assert found.json()["usage"]["prompt_tokens"] == length
        else:
            assert (found.status_code, found.json()["error"]["code"]) == (400, "context_length_exceeded")


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_log_probabilities_of_prompts_are_refused_by_name(client: httpx.Client, path: str) -> None:
    found = client.post(path, json={**(chat() if path == CHAT else text()), "prompt_logprobs": 1})
    assert (found.status_code, found.json()["error"]["param"]) == (400, "prompt_logprobs")


# --- schemas ---------------------------------------------------------------------------------------------------------

BAD: list[Any] = [
    {"type": "nothing"},
    {"$ref": "#/none"},
    {"$ref": "#"},
    {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    {"type": "string", "pattern": "(?=a)"},
    {"type": "string", "pattern": "("},
    {"enum": []},
    {"type": "integer", "minimum": 5, "maximum": 1},
    {"properties": {"a": 7}},
]


def formed(schema: object, **more: Any) -> dict[str, Any]:
    """Return a chat whose answer must match a schema."""
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    return chat(response_format=form, **more)


def test_schemas_that_are_none_are_refused_before_the_engine_while_others_stream(letters: Path) -> None:
    inside, gate, wait = gated()
    says = "a long answer that goes on"
    with local(make=partial(Scripted, letters, PLAIN, says)) as server, server.client() as client:
        step: Any = server.state.models["fake"].step
        whole, said = step.run, list[httpx.Response]()
        step.run = lambda batch: (wait(batch), whole(batch))[1]
        thread = threading.Thread(target=lambda: said.append(client.post(CHAT, json=chat(stream=True))))
        thread.start()
        assert inside.wait(20)
        found = [client.post(CHAT, json=formed(schema)) for schema in BAD]
        assert [(one.status_code, one.json()["error"]["param"]) for one in found] == [(400, "response_format")] * len(
            BAD
        )
        assert server.engine._arrived == 1
        gate.release(1000)
        thread.join(20)
        chunks = events(said[0])
        assert chunks[-1] == "[DONE]"
        assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1]) == says


def test_answers_with_schemas_and_without_alternate(letters: Path) -> None:
    """No request leaves a form behind for the next, whether it was refused or answered."""
    with local(make=partial(Scripted, letters, PLAIN, "no")) as server, server.client() as client:
        kinds = {"5": formed({"const": 5}), '"left"': formed({"enum": ["left"]}), "no": chat(), "": formed(BAD[0])}
        for wanted in ("", "no", "5", "", '"left"', "no", "5", '"left"', "5", "no"):
            found = client.post(CHAT, json=kinds[wanted])
            if wanted:
                assert found.json()["choices"][0]["message"]["content"] == wanted
            else:
                assert found.status_code == 400


TEXTS = st.sampled_from(["", "a", "\ud800", "function", "user", "tool", "{", "string", "object"]) | st.text(max_size=3)
NUMBERS = st.integers() | st.floats(allow_nan=False) | st.sampled_from([10**9, 5_000_000, 10**40, 1e300])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)
WORDS_OF_SCHEMAS = "type properties items enum const pattern anyOf $ref minLength maxItems required minimum x-guidance"
SCHEMAS = st.dictionaries(st.sampled_from(WORDS_OF_SCHEMAS.split()), JSON, max_size=3)
NAMES = (
    "messages tools tool_choice response_format stop stop_token_ids logit_bias n max_tokens max_completion_tokens "
    "temperature top_p top_k min_p seed logprobs top_logprobs stream stream_options user priority slo_class deadline_s "
    "parallel_tool_calls min_tokens ignore_eos presence_penalty frequency_penalty repetition_penalty model"
).split()
MESSAGES = st.lists(
    st.dictionaries(st.sampled_from("role content name tool_calls tool_call_id".split()), JSON), max_size=2
)
FIELDS = st.one_of(
    st.tuples(st.sampled_from(NAMES) | TEXTS, JSON),
    st.tuples(st.just("messages"), MESSAGES),
    SCHEMAS.map(lambda one: ("response_format", {"type": "json_schema", "json_schema": {"schema": one}})),
    SCHEMAS.map(lambda one: ("tools", [{"type": "function", "function": {"name": "f", "parameters": one}}])),
    st.tuples(st.just("tool_choice"), st.sampled_from(["required", "auto"])),
)


@pytest.fixture(scope="module")
def model(letters: Path) -> Scripted:
    return Scripted(letters, HERMES, "x", Bridge(lambda call: call()), Metrics())


def refusal(model: Any, body: dict[str, Any]) -> ApiError | None:
    """Return what a client is told of a body; None where it is taken."""
    try:
        made = asked.chat(parsed(json.dumps(body).encode()), {"fake": model}, "name")
        for one in made.requests:
            model.engine.check(one)
    except Exception as error:  # noqa: BLE001 - as the routes do
        return of_exception(error)
    return None


@settings(max_examples=150)
@given(st.lists(FIELDS, max_size=3))
def test_any_body_is_taken_or_refused_in_words_that_can_be_sent(model: Any, fields: list[tuple[str, Any]]) -> None:
    told = refusal(model, {"model": "fake", "messages": [{"role": "user", "content": "a"}], **dict(fields)})
    assert told is None or told.status in (400, 404)
    assert told is None or json.dumps(told.body, ensure_ascii=False).encode()


# --- streams ---------------------------------------------------------------------------------------------------------


def came(*texts: str, choice: int = 0) -> list[Numbered]:
    """Return the events of one choice, a token for each text, the last of which ends it."""
    tokens = [(12 + n + 8 * choice, one, None if n + 1 < len(texts) else Finish("stop")) for n, one in enumerate(texts)]
    return [
        (choice, Delta("r", choice, token, one, Logprob(token, -float(token), ((token, -float(token)),)), finish))
        for token, one, finish in tokens
    ]


def replies(tools: Tools | None = None, is_chat: bool = True, **params: Any) -> Replies:
    served: Any = SimpleNamespace(name="fake", variant="f" * 64, tokenizer=Letters())
    made = request("r", [1], logprobs=1, **params)
    return Replies(Asked(served, (made,), is_chat, True, False, "", tools), "chatcmpl-1", 5)


def chunks_of(data: bytes) -> list[Any]:
    return [json.loads(one.removeprefix(b"data: ")) for one in data.split(b"\n\n") if one]


def test_chunks_of_several_tokens_have_the_log_probabilities_of_each() -> None:
    """A slow client gets what came since the last chunk as one, of all choices."""
    together = [each for pair in zip(came("a", "", "bc", "d"), came(*"wxyz", choice=1), strict=True) for each in pair]
    made, state = replies(n=2), ChatCompletionStreamState()
    data = made.opening() + made.chunks(parts(together[:4])) + made.chunks(parts(together[4:]))
    for chunk in chunks_of(data):
        state.handle_chunk(ChatCompletionChunk.model_validate(chunk))
    found = state.get_final_completion().choices
    assert [one.message.content for one in found] == ["abcd", "wxyz"]
    for n, one in enumerate(found):
        assert one.logprobs is not None
        told = [(entry.token, entry.logprob) for entry in one.logprobs.content or []]
        assert told == [(WORDS[token], -float(token)) for token in range(12 + 8 * n, 16 + 8 * n)]
    legacy = replies(is_chat=False)
    (chunk,) = chunks_of(legacy.chunks(parts(came("a", "b", "c"))))
    logprobs = chunk["choices"][0]["logprobs"]
    assert (logprobs["tokens"], logprobs["text_offset"]) == (WORDS[12:15], [0, 1, 2])


def test_calls_that_come_in_one_chunk_have_each_their_place() -> None:
    made, state = replies(HERMES_TOOLS), ChatCompletionStreamState()
    chunks = chunks_of(made.opening() + made.chunks(parts(came("I look.", OSLO + ROME[:20], ROME[20:], ""))))
    told = [part for chunk in chunks for part in chunk["choices"][0]["delta"].get("tool_calls", [])]
    assert [part["index"] for part in told] == [0, 0, 1, 1]
    for chunk in chunks:
        state.handle_chunk(ChatCompletionChunk.model_validate(chunk))
    (found,) = state.get_final_completion().choices
    assert (found.message.content, found.finish_reason) == ("I look.", "tool_calls")
    calls = [call for call in found.message.tool_calls or [] if call.type == "function"]
    assert [call.function.name for call in calls] == [WEATHER["function"]["name"]] * 2  # type: ignore[index]
    assert [json.loads(call.function.arguments)["city"] for call in calls] == ["Oslo", "Rome"]
    assert found.logprobs is not None and len(found.logprobs.content or []) == 4
