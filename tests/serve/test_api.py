"""The API through a real server on the loopback, over a device that the test steers."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx
import pytest

from llmbuild.serve.api.http import LARGEST_BODY
from llmbuild.serve.api.server import _drained
from llmbuild.serve.engine import Limits
from llmbuild.serve.step import Rows
from tests.support.server import Local, local
from tests.support.serving import CONTEXT

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def server() -> Iterator[Local]:
    with local() as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Local) -> Iterator[httpx.Client]:
    with server.client() as found:
        yield found


def chat(**more: Any) -> dict[str, Any]:
    return {"model": "fake", "messages": [{"role": "user", "content": "hej"}], "temperature": 0, **more}


def text(**more: Any) -> dict[str, Any]:
    return {"model": "fake", "prompt": "hej", "temperature": 0, **more}


def events(response: httpx.Response) -> list[Any]:
    """Return the events of a stream, the last of which ends it."""
    lines = [line for line in response.text.split("\n\n") if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines)
    data = [line.removeprefix("data: ") for line in lines]
    return [json.loads(one) if one != "[DONE]" else one for one in data]


def settled(server: Local, seconds: float = 1.0) -> bool:
    """Return whether the engine has nothing to do within some seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = server.engine.snapshot()
        if not found.running and not found.waiting:
            return True
        time.sleep(0.005)
    return False


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("more", [{}, {"n": 3, "temperature": 1.5, "seed": 4}, {"stop": ["a", "b", "c"]}], ids=str)
def test_a_stream_says_what_a_plain_answer_says(client: httpx.Client, path: str, more: dict[str, Any]) -> None:
    body = {**(chat() if path == CHAT else text()), "max_tokens": 12, **more}
    plain = client.post(path, json=body).json()
    stream = events(client.post(path, json={**body, "stream": True, "stream_options": {"include_usage": True}}))
    assert stream[-1] == "[DONE]"
    chunks, last = stream[:-2], stream[-2]
    assert (last["choices"], last["usage"]) == ([], plain["usage"])
    assert all(chunk["usage"] is None for chunk in chunks)
    assert len({(c["id"], c["created"], c["model"], c["object"]) for c in stream[:-1]}) == 1
    for choice in plain["choices"]:
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        if path == CHAT:
            assert mine[0]["delta"] == {"role": "assistant", "content": ""}
            assert mine[-1]["delta"] == {}
            assert "".join(c["delta"].get("content", "") for c in mine) == choice["message"]["content"]
        else:
            assert "".join(c["text"] for c in mine) == choice["text"]
        assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]
    order = [c["index"] for chunk in chunks for c in chunk["choices"]]
    assert list(dict.fromkeys(order)) == list(range(len(plain["choices"]))) or path == TEXT


def test_usage_comes_only_where_it_is_asked_for_and_counts_a_prompt_once(client: httpx.Client) -> None:
    found = events(client.post(CHAT, json=chat(stream=True, max_tokens=3)))
    assert not any("usage" in chunk for chunk in found[:-1])
    usage = client.post(TEXT, json=text(n=4, max_tokens=2, ignore_eos=True)).json()["usage"]
    assert usage == {
        "prompt_tokens": 3,
        "completion_tokens": 8,
        "total_tokens": 11,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_many_prompts_are_choices_in_their_order(client: httpx.Client) -> None:
    prompts = ["a", "bc", "def"]
    whole = client.post(TEXT, json=text(prompt=prompts, max_tokens=4, n=2)).json()
    assert [c["index"] for c in whole["choices"]] == list(range(6))
    for i, prompt in enumerate(prompts):
        (one,) = client.post(TEXT, json=text(prompt=prompt, max_tokens=4)).json()["choices"]
        assert {c["text"] for c in whole["choices"][2 * i : 2 * i + 2]} == {one["text"]}
    assert whole["usage"]["prompt_tokens"] == 6
    ids = [client.post("/tokenize", json={"model": "fake", "prompt": p}).json()["tokens"] for p in prompts]
    assert client.post(TEXT, json=text(prompt=ids, max_tokens=4, n=2)).json()["choices"] == whole["choices"]
    assert (
        client.post(TEXT, json=text(prompt=ids[0], max_tokens=4)).json()["choices"][0]["text"]
        == (whole["choices"][0]["text"])
    )


def test_log_probabilities_have_an_entry_for_each_token(client: httpx.Client) -> None:
    body = chat(max_tokens=6, logprobs=True, top_logprobs=2, ignore_eos=True)
    plain = client.post(CHAT, json=body).json()["choices"][0]["logprobs"]["content"]
    assert len(plain) == 6
    assert all(one["top_logprobs"][0]["token"] == one["token"] and len(one["top_logprobs"]) == 2 for one in plain)
    stream = events(client.post(CHAT, json={**body, "stream": True}))[:-1]
    told = [one for c in stream if c["choices"][0]["logprobs"] for one in c["choices"][0]["logprobs"]["content"]]
    assert told == plain
    alone = client.post(CHAT, json=chat(max_tokens=2, logprobs=True)).json()["choices"][0]["logprobs"]["content"]
    assert [one["top_logprobs"] for one in alone] == [[]] * len(alone)
    legacy = client.post(TEXT, json=text(max_tokens=4, logprobs=0, ignore_eos=True)).json()["choices"][0]["logprobs"]
    assert {name: len(values) for name, values in legacy.items()} == dict.fromkeys(legacy, 4)
    assert client.post(TEXT, json=text(max_tokens=4)).json()["choices"][0]["logprobs"] is None


def test_a_chat_goes_on_to_the_end_of_the_context_and_a_completion_for_16_tokens(client: httpx.Client) -> None:
    found = [client.post(p, json=b).json() for p, b in ((CHAT, chat(ignore_eos=True)), (TEXT, text(ignore_eos=True)))]
    assert [one["usage"]["completion_tokens"] for one in found] == [CONTEXT - 3 + 1, 16]
    assert [one["choices"][0]["finish_reason"] for one in found] == ["length", "length"]
    short = client.post(CHAT, json=chat(max_tokens=9, max_completion_tokens=2, ignore_eos=True)).json()
    assert short["usage"]["completion_tokens"] == 2


REFUSED: list[tuple[str, dict[str, Any], int, str | None, str]] = [
    (CHAT, {"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools", "takes none"),
    (CHAT, {"response_format": {"type": "xml"}}, 400, "response_format", "text, json_object or json_schema"),
    (CHAT, {"best_off": 3}, 400, "best_off", "no such field"),
    (CHAT, {"messages": []}, 400, "messages", "at least one message"),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "messages[0].content", "missing"),
    (CHAT, {"messages": [{"role": "function", "content": "a"}]}, 400, "messages[0].role", "takes system"),
    (CHAT, {"messages": [{"role": "tool", "content": "a"}]}, 400, "messages[0].tool_call_id", "is missing"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, None, "takes text alone"),
    (CHAT, {"messages": [{"role": "user", "content": "a", "x": 1}]}, 400, "messages[0].x", "no such field"),
    (CHAT, {"top_logprobs": 2}, 400, "top_logprobs", "needs logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 10**9}, 400, "top_logprobs", "0 to 20"),
    (CHAT, {"n": 5_000_000}, 400, "n", "1 to 128"),
    (CHAT, {"stream_options": {"include_usage": True}}, 400, "stream_options", "stream: true"),
    (CHAT, {"stream": True, "stream_options": {"x": 1}}, 400, "stream_options.x", "no such field"),
    (CHAT, {"temperature": "hot"}, 400, "temperature", "must be a number"),
    (CHAT, {"model": "other"}, 404, "model", "not served here: fake"),
    (CHAT, {"model": None}, 400, "model", "missing"),
    (TEXT, {"echo": True}, 400, "echo", "not supported"),
    (TEXT, {"best_of": 2}, 400, "best_of", "not supported"),
    (TEXT, {"logprobs": 6}, 400, "logprobs", "0 to 5"),
    (TEXT, {"prompt": ""}, 400, "prompt", "is empty"),
    (TEXT, {"prompt": [[]]}, 400, "prompt", "is empty"),
    (TEXT, {"prompt": [1, "a"]}, 400, None, "must be an integer"),
    (TEXT, {"prompt": 7}, 400, "prompt", "must be a text"),
    (TEXT, {"prompt": [64]}, 400, "prompt", "outside the vocabulary of 64"),
    (TEXT, {"prompt": [10**40]}, 400, None, "prompt[0]"),
    (TEXT, {"prompt": "x" * (CONTEXT + 1)}, 400, "prompt", f"the context of this model is {CONTEXT} tokens"),
    (TEXT, {"deadline_s": 0}, 400, "deadline_s", "above 0"),
]


@pytest.mark.parametrize(("path", "more", "status", "param", "told"), REFUSED, ids=lambda v: str(v)[:40])
def test_what_is_refused_is_named(
    client: httpx.Client, path: str, more: dict[str, Any], status: int, param: str | None, told: str
) -> None:
    found = client.post(path, json={**(chat() if path == CHAT else text()), **more})
    error = found.json()["error"]
    assert (found.status_code, set(error)) == (status, {"message", "type", "param", "code"})
    assert told in error["message"]
    assert param is None or error["param"] == param
    if "context" in told:
        assert error["code"] == "context_length_exceeded"
    assert client.post(TEXT, json=text(max_tokens=1)).status_code == 200


def test_what_asks_for_what_is_done_anyway_is_taken(client: httpx.Client) -> None:
    more = {"tools": [], "response_format": {"type": "text"}, "store": False, "user": "me", "seed": None, "n": None}
    assert client.post(CHAT, json=chat(max_tokens=1, **more)).status_code == 200
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "ej"}]
    roles = [{"role": "developer", "content": ""}, {"role": "assistant", "content": None}]
    body = chat(max_tokens=4)
    other = {**body, "messages": [*roles, {"role": "user", "content": parts}]}
    assert client.post(CHAT, json=body).json()["choices"] == client.post(CHAT, json=other).json()["choices"]


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "not JSON"),
        (b"[1]", "must be a JSON object"),
        (b'{"model": NaN}', "NaN is no JSON"),
        (b'{"top_p": 1e400}', "1e400 is not finite"),
        (b'{"\\ud800": 1}', "U+D800 alone"),
        (b'{"user": "\xed\xa0\x80"}', "not JSON"),
        (b"\xff", "not JSON"),
        (b'{"a":' + b"[" * 20000, "not JSON"),
        (b'{"a":' + b"[" * 100 + b"]" * 100 + b"}", "nested deeper"),
    ],
)
def test_a_body_that_is_none_is_refused(client: httpx.Client, data: bytes, told: str) -> None:
    found = client.post(CHAT, content=data)
    assert found.status_code == 400
    assert told in found.json()["error"]["message"]


def test_a_body_over_the_limit_is_refused(client: httpx.Client) -> None:
    found = client.post(TEXT, content=b" " * (LARGEST_BODY + 1))
    assert (found.status_code, found.json()["error"]["code"]) == (413, "body_too_large")


def test_paths_and_methods_that_are_not_there(client: httpx.Client) -> None:
    found = [client.get("/v1/none"), client.get(CHAT), client.post("/v1/models")]
    assert [one.status_code for one in found] == [404, 405, 405]
    assert all(one.json()["error"]["type"] == "invalid_request_error" for one in found)


def test_models_tokens_and_texts(client: httpx.Client) -> None:
    (listed,) = client.get("/v1/models").json()["data"]
    assert client.get("/v1/models/fake").json() == listed
    assert (listed["id"], listed["max_model_len"]) == ("fake", CONTEXT)
    assert client.get("/v1/models/other").status_code == 404
    found = client.post("/tokenize", json={"model": "fake", "prompt": "abc"}).json()
    assert (found["count"], found["max_model_len"]) == (3, CONTEXT)
    back = client.post("/detokenize", json={"model": "fake", "tokens": found["tokens"]})
    assert back.json() == {"prompt": "abc"}
    other = client.post("/tokenize", json={"model": "fake", "messages": [{"role": "user", "content": "abc"}]})
    assert other.json() == found
    assert client.post("/detokenize", json={"model": "fake", "tokens": [1], "x": 2}).status_code == 400


def test_metrics_count_what_was_answered(client: httpx.Client) -> None:
    def values() -> dict[str, float]:
        lines = [line for line in client.get("/metrics").text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    labels = '{engine="0",model_name="fake"}'
    before = values()
    client.post(TEXT, json=text(max_tokens=5, ignore_eos=True, n=2))
    after = values()

    def grown(name: str, more: str = labels) -> float:
        return after[f"vllm:{name}{more}"] - before.get(f"vllm:{name}{more}", 0)

    assert grown("generation_tokens_total") == 10
    assert grown("prompt_tokens_total") == 6
    assert grown("request_success_total", '{engine="0",finished_reason="length",model_name="fake"}') == 2
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_decode_time_seconds"):
        assert grown(f"{name}_count") == 2
    assert grown("inter_token_latency_seconds_count") == 8
    assert grown("request_params_max_tokens_sum") == 5
    assert (after[f"vllm:num_requests_running{labels}"], after[f"vllm:num_requests_waiting{labels}"]) == (0, 0)


def test_the_log_has_no_prompt_and_the_request_has_an_id(server: Local, client: httpx.Client) -> None:
    found = client.post(TEXT, json=text(prompt="zyx", max_tokens=2, user="a b\nc"), headers={"x-request-id": "my.id"})
    assert found.headers["x-request-id"] == "my.id"
    (line,) = [one for one in server.log if "id=my.id" in one]
    assert "zyx" not in line and found.json()["choices"][0]["text"] not in line
    assert "user=a_b_c" in line and "completion_tokens=2 outcome=done" in line
    odd = client.get("/health", headers={"x-request-id": 'a b"<>'})
    assert odd.headers["x-request-id"] != 'a b"<>'


# --- a device that waits ---------------------------------------------------------------------------------------------


def gated() -> tuple[threading.Event, threading.Semaphore, Callable[[Sequence[Rows]], None]]:
    """Return an event that is set in a step, a semaphore that lets steps end, and the function of the device."""
    inside, gate = threading.Event(), threading.Semaphore(0)

    def wait(_: Sequence[Rows]) -> None:
        inside.set()
        assert gate.acquire(timeout=30)

    return inside, gate, wait


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("where", ["decode", "queued"])
def test_a_client_that_goes_is_given_up_wherever_its_request_is(stream: bool, where: str) -> None:
    inside, gate, wait = gated()
    with local(slots=1, before=wait) as server, server.client() as client:
        first = threading.Thread(target=lambda: client.post(TEXT, json=text(max_tokens=2, ignore_eos=True)))
        if where == "queued":
            first.start()
            assert inside.wait(20)
        body = json.dumps(text(max_tokens=20, ignore_eos=True, stream=stream)).encode()
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as raw:
            head = f"POST {TEXT} HTTP/1.1\r\nhost: a\r\ncontent-length: {len(body)}\r\n\r\n"
            raw.sendall(head.encode() + body)
            wanted = (1, 1) if where == "queued" else (1, 0)
            assert reached(lambda: state_of(server) == wanted and inside.is_set())
        assert reached(lambda: bool(server.engine._inbox.cancelled))
        gate.release(2)  # the step in which the cancellation comes, and one more of the first request
        assert settled(server)
        if where == "queued":
            first.join(20)
        assert server.step.steps == (2 if where == "queued" else 1)
        assert reached(lambda: any("outcome=client_gone" in line for line in server.log))
        gate.release(100)


def state_of(server: Local) -> tuple[int, int]:
    found = server.engine.snapshot()
    return found.running, found.waiting


def reached(check: Callable[[], bool], seconds: float = 20.0) -> bool:
    """Return whether something comes true within some seconds."""
    end = time.monotonic() + seconds
    while not check():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


def test_a_full_queue_is_told_at_once_and_when_to_come_again() -> None:
    inside, gate, wait = gated()
    with local(slots=1, before=wait, limits=Limits(queue=2)) as server, server.client() as client:
        threads = []
        for n in range(3):
            threads.append(threading.Thread(target=lambda: client.post(TEXT, json=text(max_tokens=1))))
            threads[-1].start()
            assert reached(lambda n=n: sum(state_of(server)) == n + 1)  # type: ignore[misc]
            assert inside.wait(20)
        found = client.post(TEXT, json=text(max_tokens=1))
        assert (found.status_code, found.json()["error"]["code"]) == (429, "queue_full")
        assert int(found.headers["retry-after"]) >= 1
        two = client.post(TEXT, json=text(prompt=["a", "b"], max_tokens=1))
        never = client.post(TEXT, json=text(prompt=["a", "b", "c"], max_tokens=1))
        assert [two.status_code, never.status_code] == [429, 400]
        assert sum(state_of(server)) == 3
        gate.release(100)
        for thread in threads:
            thread.join(20)
        assert client.post(TEXT, json=text(max_tokens=1)).status_code == 200


def test_a_deadline_ends_an_answer_with_its_status_or_in_its_stream() -> None:
    def slow(_: Sequence[Rows]) -> None:
        time.sleep(0.02)

    with local(slots=1, before=slow) as server, server.client() as client:
        body = text(max_tokens=20, ignore_eos=True, deadline_s=0.1)
        found = client.post(TEXT, json=body)
        assert (found.status_code, found.json()["error"]["code"]) == (504, "deadline_exceeded")
        told = events(client.post(TEXT, json={**body, "stream": True}))
        assert told[-1]["error"]["code"] == "deadline_exceeded"
        assert "[DONE]" not in told
        assert settled(server)


def test_a_device_that_fails_is_told_to_every_client_and_the_server_is_not_ready() -> None:
    count, gate = [0], threading.Event()

    def fails(_: Sequence[Rows]) -> None:
        count[0] += 1
        if count[0] == 4:
            assert gate.wait(20)
            raise RuntimeError("no device")

    with local(slots=2, before=fails) as server, server.client() as client:
        said: list[httpx.Response] = []

        def ask(**more: Any) -> None:
            said.append(client.post(TEXT, json=text(max_tokens=15, ignore_eos=True, **more)))

        threads = [threading.Thread(target=ask, kwargs={"stream": n == 0}) for n in range(4)]
        threads[0].start()
        assert reached(lambda: count[0] >= 2)
        for thread in threads[1:]:
            thread.start()
        assert reached(lambda: sum(state_of(server)) == 4)
        assert client.get("/ready").status_code == 200
        gate.set()
        for thread in threads:
            thread.join(20)
        assert sorted(one.status_code for one in said) == [200, 500, 500, 500]
        (streamed,) = [one for one in said if one.status_code == 200]
        assert "no device" in events(streamed)[-1]["error"]["message"]
        assert client.get("/ready").status_code == 503
        assert client.get("/health").status_code == 200
        assert client.post(TEXT, json=text()).status_code == 503


def test_a_device_that_hangs_makes_the_server_unready_and_it_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmbuild.serve.api.app.STALLED_S", 0.2)
    inside, gate, wait = gated()
    with local(slots=1, before=wait) as server, server.client() as client:
        thread = threading.Thread(target=lambda: client.post(TEXT, json=text(max_tokens=1)))
        thread.start()
        assert inside.wait(20)
        assert reached(lambda: client.get("/ready").status_code == 503)
        assert "no step has ended" in client.get("/ready").json()["error"]["message"]
        assert client.get("/health").status_code == 200
        gate.release()
        thread.join(20)
        assert client.get("/ready").status_code == 200


def test_a_bug_in_one_request_is_told_without_its_words_and_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with local() as server, server.client() as client:

        def broken(*_: object) -> None:
            raise ValueError("secret prompt")

        with monkeypatch.context() as patched:
            patched.setattr(server.state.models["fake"], "text", broken)
            found = client.post(TEXT, json=text())
        assert (found.status_code, found.json()["error"]["code"]) == (500, "internal_error")
        assert "secret" not in found.text
        assert client.post(TEXT, json=text()).status_code == 200


def test_many_answers_at_a_time_are_each_their_own() -> None:
    with local(slots=3) as server, server.client() as client:
        bodies = [text(prompt="q" * (1 + n % 7) + chr(97 + n), max_tokens=12, stream=n % 2 == 0) for n in range(16)]
        alone = [spoken(client.post(TEXT, json=body)) for body in bodies]
        assert len(set(alone)) > 10
        found: dict[int, str] = {}
        threads = [
            threading.Thread(target=lambda n=n: found.update({n: spoken(client.post(TEXT, json=bodies[n]))}))  # type: ignore[misc]
            for n in range(16)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert [found[n] for n in range(16)] == alone


def spoken(response: httpx.Response) -> str:
    if response.headers["content-type"].startswith("text/event-stream"):
        return "".join(c["text"] for e in events(response)[:-1] for c in e["choices"])
    return str(response.json()["choices"][0]["text"])


@pytest.mark.parametrize("how", ["the time is over", "a second signal"])
def test_what_is_not_finished_at_the_end_is_told(how: str) -> None:
    inside, gate, wait = gated()
    with local(slots=1, before=wait) as server, server.client() as client:
        said: list[httpx.Response] = []

        def ask(stream: bool) -> None:
            said.append(client.post(TEXT, json=text(max_tokens=20, ignore_eos=True, stream=stream)))

        threads = [threading.Thread(target=ask, args=(stream,)) for stream in (True, False)]
        for thread in threads:
            thread.start()
        assert reached(lambda: sum(state_of(server)) == 2 and inside.is_set())
        gate.release(1)
        assert reached(lambda: server.step.steps == 1)

        async def end() -> bool:
            asked: asyncio.Queue[None] = asyncio.Queue()
            if how == "a second signal":
                asyncio.get_running_loop().call_later(0.1, asked.put_nowait, None)
            drained = asyncio.ensure_future(_drained(server.state, 0.1 if how == "the time is over" else 60, asked))
            asyncio.get_running_loop().call_later(0.4, gate.release, 100)  # the step that runs ends
            finished = await drained
            await asyncio.to_thread(server.engine.close)
            return finished

        server.state.draining = True
        assert client.get("/ready").status_code == 503
        assert client.post(TEXT, json=text()).status_code == 503
        assert asyncio.run(end()) is False
        for thread in threads:
            thread.join(20)
        codes = sorted(one.status_code for one in said)
        assert codes in ([200, 503], [503, 503])
        told = [events(one)[-1] if one.status_code == 200 else one.json() for one in said]
        assert [one["error"]["code"] for one in told] == ["shutting_down"] * 2
