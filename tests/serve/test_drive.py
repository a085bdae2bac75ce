"""The client of comparisons and load curves: sends at its times, and reads afterwards what came when."""

from __future__ import annotations

import json
import os
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from math import inf

import pytest

from llmbuild.serve import served_time
from llmbuild.serve.drive import TOKENS, Heard, Sending, bodies, drive

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
ERROR = b'data: {"error": {"message": "gone"}}\n\n'
DONE = b"data: [DONE]\n\n"


def token(finish: str = "null") -> bytes:
    return b'data: {"choices":[{"index":0,"text":"a","logprobs":null,"finish_reason":%s}]}\n\n' % finish.encode()


def usage(tokens: int) -> bytes:
    return b'data: {"choices":[],"usage":{"prompt_tokens":2,"completion_tokens":%d}}\n\n' % tokens


@contextmanager
def answering(*pieces: bytes) -> Iterator[tuple[str, list[bytes]]]:
    """Answer every request with these pieces, and keep the bodies."""
    asked = list[bytes]()

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            length = 0
            while (line := self.rfile.readline().strip()) != b"":
                length = int(line.split(b":")[1]) if line.startswith(b"content-length") else length
            asked.append(self.rfile.read(length))
            for piece in pieces:
                self.wfile.write(piece)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", asked
        finally:
            server.shutdown()


def one(*pieces: bytes) -> Heard:
    with answering(*pieces) as (url, _):
        (found,) = drive(url, "m", [Sending(0.0, 2, 2)], after_s=10.0).heard
    return found


def test_a_whole_answer_has_its_tokens_and_times() -> None:
    found = one(HEAD, token(), token('"length"') + usage(2) + DONE)
    assert (found.end, found.tokens, found.chunks, found.ends) == ("answered", 2, 2, 1)
    assert found.late_s >= 0
    assert 0 < found.ttft_s <= found.last_s <= found.closed_s < inf
    assert found.tpot_s == found.last_s - found.ttft_s


@pytest.mark.parametrize(
    ("pieces", "end"),
    [
        ([HEAD, token()], "lost"),
        ([HEAD, token(), ERROR], "failed"),
        ([HEAD, ERROR, DONE], "failed"),
        ([b"HTTP/1.1 503 Service Unavailable\r\n\r\n{}"], "rejected"),
        ([b"HTTP/1.1 429 Too Many Requests\r\n\r\n{}"], "rejected"),
        ([b"HTTP/1.1 500 Internal Server Error\r\n\r\n{}"], "failed"),
        ([], "lost"),
    ],
)
def test_what_is_no_whole_answer_is_told(pieces: list[bytes], end: str) -> None:
    found = one(*pieces)
    assert (found.end, found.tokens) == (end, 0)


def test_a_stream_that_ends_twice_is_seen() -> None:
    assert one(HEAD, token('"length"') + usage(1) + DONE + DONE).ends == 2


def test_nobody_who_answers_is_a_request_that_is_lost() -> None:
    with answering() as (url, _):
        pass
    driven = drive(url, "m", [Sending(0.0, 2, 2)] * 2, after_s=10.0)
    assert [one.end for one in driven.heard] == ["lost", "lost"]


def test_requests_go_at_their_times_with_as_many_tokens_as_are_asked_for() -> None:
    sends = [Sending(0.0, 3, 1), Sending(0.05, 5, 7)]
    with answering(HEAD, token('"length"') + usage(1) + DONE) as (url, asked):
        driven = drive(url, "m", sends, after_s=10.0)
    assert [one.sent_s - one.late_s for one in driven.heard] == pytest.approx([0.0, 0.05])
    assert driven.seconds >= 0.05 and driven.cpu_s > 0
    assert asked == bodies("m", sends)
    for body, send in zip(map(json.loads, asked), sends, strict=True):
        assert (len(body["prompt"]), body["max_tokens"]) == (send.prompt, send.output)
        assert set(body["prompt"]) <= set(TOKENS)


def test_a_server_that_answers_at_once_takes_little_for_steps_and_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served_time, "_whole", lambda found, output: None)
    monkeypatch.setattr(served_time, "LEAST", 1)
    monkeypatch.setattr(served_time, "REST_S", 0.001)
    with answering(HEAD, token('"length"') + usage(1) + DONE) as (url, _):
        found = served_time.measured(url, "m", 3, 1024, 0.0, lambda: 0.0, lambda: 0.0)
    assert [one["sequences"] for one in found["decodes"]] == [1, 2, 3]  # type: ignore[attr-defined]
    assert found["rounds"] == 1
    assert found["requests"]["ttft_s"] > 0  # type: ignore[index]
    assert served_time.cpu_s(os.getpid()) > 0


def test_steps_of_few_and_of_all_sequences_are_measured() -> None:
    assert served_time.counts(16) == [1, 2, 4, 8, 16]
    assert served_time.counts(1) == [1]


def test_the_time_of_each_token_is_kept_where_it_is_asked_for() -> None:
    pieces = HEAD, token(), token() + token(), token('"length"') + usage(4) + DONE
    with answering(*pieces) as (url, _):
        (heard,) = drive(url, "m", [Sending(0.0, 2, 4)], after_s=10.0, each=True).heard
        (plain,) = drive(url, "m", [Sending(0.0, 2, 4)], after_s=10.0).heard
    assert (len(heard.came_s), plain.came_s) == (4, ())
    assert list(heard.came_s) == sorted(heard.came_s) and heard.came_s[0] == heard.ttft_s


def test_tokens_that_take_longer_after_a_rest_tell_by_how_much_and_how_long() -> None:
    fast, slow = [0.010] * 30, [0.020] * 10
    times = list(accumulate([0.05, *slow, *fast]))
    factor, seconds = served_time.cold([times, [one + 0.001 for one in times], times[:-2]])
    assert (factor, seconds) == (pytest.approx(2.0), pytest.approx(0.25))


def test_tokens_that_take_the_same_are_not_of_cold_cores() -> None:
    assert served_time.cold([list(accumulate([0.05, *[0.010, 0.0101] * 20]))]) == (1.0, 0.0)
    assert served_time.cold([[0.05]]) == (1.0, 0.0)
