"""`llmbuild serve` as it is used: the command, a built model, and the client library of OpenAI."""

from __future__ import annotations

import json
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from llmbuild.runtime import load
from llmbuild.runtime.model import Model
from tests.conftest import Project, llmbuild, project_in
from tests.support.server import Running, command

KEY = "sk-0123456789abcdef"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text(f"{KEY}\n")
    return path


@pytest.fixture(scope="module")
def server(chatty: Project, keys: Path) -> Iterator[Running]:
    with command("tiny", "-C", chatty.catalog, "--memory", "1GB", "--api-keys", keys) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")
def model(chatty: Project) -> Iterator[Model]:
    with load(chatty.catalog, "tiny") as found:
        yield found


def test_a_completion_streams_what_the_loader_generates(client: openai.OpenAI, model: Model) -> None:
    said = client.completions.create(model="tiny", prompt="def push", max_tokens=12, temperature=0, stream=True)
    chunks = list(said)
    assert "".join(c.choices[0].text for c in chunks) == "".join(model.generate("def push", 12))
    assert [c.choices[0].finish_reason for c in chunks][-1] == "length"
    whole = client.completions.create(model="tiny", prompt="def push", max_tokens=12, temperature=0)
    assert whole.choices[0].text == "".join(model.generate("def push", 12))
    assert whole.usage is not None and whole.usage.completion_tokens == 12


def test_a_chat_streams_what_the_loader_answers(client: openai.OpenAI, model: Model) -> None:
    asked = [{"role": "system", "content": "s"}, {"role": "user", "content": "ab"}]
    answer = "".join(model.chat(asked, 9))
    with client.chat.completions.stream(
        model="tiny",
        messages=asked,  # type: ignore[arg-type]
        temperature=0,
        max_completion_tokens=9,
        logprobs=True,
        top_logprobs=2,
        stream_options={"include_usage": True},
    ) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        last = stream.current_completion_snapshot
    assert (text, last.choices[0].message.content, last.choices[0].finish_reason) == (answer, answer, "length")
    prompt = len(model.encode_chat(asked).tokens)
    assert last.usage and (last.usage.prompt_tokens, last.usage.completion_tokens) == (prompt, 9)
    assert last.choices[0].logprobs and len(last.choices[0].logprobs.content or []) == 9
    assert last.system_fingerprint == str(model.row["variant"])[:12]


def test_several_choices_of_a_stream_are_put_together(client: openai.OpenAI) -> None:
    options = {"model": "tiny", "messages": [{"role": "user", "content": "ab"}], "n": 3, "seed": 5, "max_tokens": 6}
    plain = client.chat.completions.create(**options)  # type: ignore[call-overload]
    with client.chat.completions.stream(**options) as stream:
        assert [event for event in stream if event.type == "content.delta"]
        streamed = stream.current_completion_snapshot
    assert [c.message.content for c in streamed.choices] == [c.message.content for c in plain.choices]
    assert len({c.message.content for c in plain.choices}) == 3


def test_an_answer_that_must_be_json_begins_as_json(client: openai.OpenAI) -> None:
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "ab"}], "temperature": 0}
    free = client.chat.completions.create(**asked)  # type: ignore[call-overload]
    held = client.chat.completions.create(**asked, response_format={"type": "json_object"})  # type: ignore[call-overload]
    assert not free.choices[0].message.content.startswith("{")
    assert held.choices[0].message.content.startswith("{")
    with pytest.raises(openai.BadRequestError, match="is not supported") as told:
        client.chat.completions.create(  # type: ignore[call-overload]
            **asked, response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "odd"}}}
        )
    assert told.value.param == "response_format"


def test_errors_are_the_clients_own(client: openai.OpenAI, server: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="the context of this model is 32 tokens") as told:
        client.completions.create(model="tiny", prompt="a b c d " * 40)
    assert (told.value.code, told.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(openai.NotFoundError, match="not served here: tiny"):
        client.completions.create(model="gpt", prompt="a")
    with pytest.raises(openai.BadRequestError, match="no such field"):
        client.completions.create(model="tiny", prompt="a", extra_body={"guided": 1})
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="another-key-01234567", max_retries=0) as other,
        pytest.raises(openai.AuthenticationError),
    ):
        other.models.list()
    assert [one.id for one in client.models.list()] == ["tiny"]


def test_one_at_a_time_and_all_at_once_are_the_same(client: openai.OpenAI) -> None:
    prompts = [f"def f{n}(self, a{n})" for n in range(12)]

    def ask(prompt: str, found: dict[str, str]) -> None:
        said = client.completions.create(model="tiny", prompt=prompt, max_tokens=10, temperature=0)
        found[prompt] = said.choices[0].text

    alone: dict[str, str] = {}
    together: dict[str, str] = {}
    for prompt in prompts:
        ask(prompt, alone)
    threads = [threading.Thread(target=ask, args=(prompt, together)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert together == alone


def test_what_was_begun_is_finished_at_the_end_and_the_choice_is_told(chatty: Project) -> None:
    with command("tiny", "-C", chatty.catalog, "--slo", "tpot_s<=10", "--max-sequences", "2") as found:
        with httpx.stream(
            "POST",
            f"{found.url}/v1/chat/completions",
            json={"model": "tiny", "messages": [{"role": "user", "content": "a"}], "stream": True, "ignore_eos": True},
            timeout=60,
        ) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            assert found.stop() == 0
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    told = "".join(found.log)
    assert "asked: tpot_s<=10; best tpot_s" in told and "chosen" in told
    assert "up to 2 sequences at a time, in" in told and "of 32 tokens at most" in told and "(measured)" in told
    assert "every answer was finished" in told


def test_ctrl_c_ends_an_idle_server(chatty: Project) -> None:
    with command("tiny", "-C", chatty.catalog) as found:
        assert httpx.get(f"{found.url}/ready").json() == {"status": "ready", "models": ["tiny"]}
        assert found.stop(signal.SIGINT) == 0


def test_two_models_answer_in_one_server(chatty: Project, client: openai.OpenAI, tmp_path: Path) -> None:
    shutil.copytree(chatty.folder, tmp_path / "both")
    both = project_in(tmp_path / "both")
    both.recipe.write_text(
        both.recipe.read_text().replace("name: tiny", "name: other").replace("trials: 3", "trials: 1")
    )
    done = llmbuild("build", both.recipe, "-C", both.catalog)
    assert done.returncode == 0, done.stderr
    with (
        command("tiny", "other", "-C", both.catalog, "--memory", "1GB") as found,
        openai.OpenAI(base_url=f"{found.url}/v1", api_key="none", max_retries=0) as two,
    ):
        assert [one.id for one in two.models.list()] == ["tiny", "other"]
        texts = {
            name: two.completions.create(model=name, prompt="def", max_tokens=9, temperature=0).choices[0].text
            for name in ("tiny", "other")
        }
        wanted = client.completions.create(model="tiny", prompt="def", max_tokens=9, temperature=0).choices[0].text
        assert (texts["tiny"], len(texts["other"]) > 0) == (wanted, True)
        assert found.stop() == 0
    told = llmbuild("serve", "tiny", "tiny", "-C", chatty.catalog)
    assert (told.returncode, "a model is named twice" in told.stderr) == (2, True)


BAD: list[tuple[list[str], int, str]] = [
    (["none"], 2, "no variant of none"),
    (["tiny", "--slo", "tpot_s<=1e-12"], 3, "no variant of tiny meets"),
    (["tiny", "--memory", "1MB"], 2, "1 MB do not hold one sequence"),
    (["tiny", "--memory", "lots"], 2, "--memory 'lots': not a size"),
    (["tiny", "--host", "192.0.2.1", "--port", "0"], 2, "cannot be listened on"),
    (["tiny", "--host", "no.such.host.invalid"], 2, "name an address of this host"),
    (["tiny", "--api-keys", "none"], 2, "none: No such file"),
    (["tiny", "--scheduler", "lifo"], 2, "'lifo' is not one of"),
]


@pytest.mark.parametrize(("arguments", "code", "told"), BAD, ids=lambda v: str(v)[:40])
def test_what_cannot_be_served_is_told(chatty: Project, arguments: list[str], code: int, told: str) -> None:
    done = llmbuild("serve", *arguments, "-C", chatty.catalog)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert told in done.stderr


def test_a_port_that_is_taken_is_told(server: Running, chatty: Project) -> None:
    port = server.url.rpartition(":")[2]
    done = llmbuild("serve", "tiny", "-C", chatty.catalog, "--port", port)
    assert (done.returncode, "Address already in use" in done.stderr) == (2, True), done.stderr
