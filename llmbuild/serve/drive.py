"""A client that sends completions at their times, as streams, and notes when bytes came.

    python -m llmbuild.serve.drive < ASKED > HEARD

Answers are read after the last one has ended: while requests run, it takes little of the cores that it shares with a
server. What it takes is told.
"""

from __future__ import annotations

import gc
import json
import random
import re
import selectors
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from math import inf
from time import monotonic, process_time
from typing import NamedTuple

TOKENS = range(5, 200)
"""Ids that every vocabulary has."""
CONNECT_S = 5.0
_PIECE = 1 << 16
_TEXT = b'"text":'
_FINISH = re.compile(rb'"finish_reason":\s*"')
_USAGE = re.compile(rb'"completion_tokens":\s*(\d+)')
_ERROR = re.compile(rb'data: \{"error"')
_BUSY = (429, 503)


class Sending(NamedTuple):
    """A request: seconds from the beginning, and tokens of the prompt and of the answer."""

    at_s: float
    prompt: int
    output: int


@dataclass(frozen=True)
class Heard:
    """What came of one request; seconds are from when it was sent, infinite where nothing came."""

    sent_s: float
    """From the beginning."""
    late_s: float
    """How late it was sent: the client's own fault."""
    end: str = "lost"
    """`answered`; `rejected` before the first byte; `failed` with an error behind it; `lost` without an end."""
    ttft_s: float = inf
    last_s: float = inf
    """To the last token."""
    closed_s: float = inf
    """To the end of the connection."""
    tokens: int = 0
    chunks: int = 0
    """Fewer than tokens where the client, or the event loop of the server, was late."""
    ends: int = 0
    """How often the stream said that it ended."""
    came_s: tuple[float, ...] = ()
    """When each token came; kept where it is asked for."""

    @property
    def tpot_s(self) -> float:
        """Return the seconds between tokens, on average; 0 for a single token."""
        return (self.last_s - self.ttft_s) / (self.tokens - 1) if self.tokens > 1 else 0.0


@dataclass(frozen=True)
class Driven:
    """What came of all requests, in their order, and the CPU seconds of the client."""

    heard: tuple[Heard, ...]
    cpu_s: float
    seconds: float


@dataclass
class _Open:
    """A request whose answer has not ended."""

    number: int
    late_s: float
    sent_s: float
    pieces: list[tuple[float, bytes]] = field(default_factory=list)


def bodies(model: str, sends: Sequence[Sending], seed: int = 0) -> list[bytes]:
    """Return the body of each request: token ids drawn by a seed, an answer of just as many tokens as are asked for."""
    rng = random.Random(seed)
    return [
        json.dumps(
            {
                "model": model,
                "prompt": [rng.choice(TOKENS) for _ in range(one.prompt)],
                "max_tokens": one.output,
                "ignore_eos": True,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ).encode()
        for one in sends
    ]


def drive(
    url: str, model: str, sends: Sequence[Sending], after_s: float = 60.0, seed: int = 0, each: bool = False
) -> Driven:
    """Send each request at its time, whether earlier ones are answered or not, and return what came of them.

    What has not ended `after_s` seconds after the last one was due is given up. Requests are in the order of their
    times. With `each`, the time of each token is kept.
    """
    host, _, port = url.removeprefix("http://").rpartition(":")
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\nconnection: close\r\n"
    texts = [f"{head}content-length: {len(body)}\r\n\r\n".encode() + body for body in bodies(model, sends, seed)]
    ended: dict[int, _Open] = {}
    with _quiet(), selectors.DefaultSelector() as selector:
        begun, cpu, waiting, there = monotonic(), process_time(), 0, 0
        last_s = (sends[-1].at_s if sends else 0.0) + after_s
        while (waiting < len(sends) or there) and monotonic() - begun < last_s:
            due = sends[waiting].at_s if waiting < len(sends) else last_s
            for key, _ in selector.select(max(0.0, begun + due - monotonic())):
                there -= not _read(selector, key)
            while waiting < len(sends) and (now := monotonic()) - begun >= sends[waiting].at_s:
                one = _Open(waiting, now - begun - sends[waiting].at_s, now)
                there += _sent(selector, (host, int(port)), texts[waiting], one)
                ended[waiting] = one
                waiting += 1
        seconds, cpu = monotonic() - begun, process_time() - cpu
        for key in list(selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]  # a socket
    return Driven(tuple(_heard(ended.get(i), one, begun, each) for i, one in enumerate(sends)), cpu, seconds)


@contextmanager
def _quiet() -> Iterator[None]:
    """Collect no garbage."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _sent(selector: selectors.BaseSelector, place: tuple[str, int], text: bytes, one: _Open) -> bool:
    """Send a request; return whether an answer may come."""
    try:
        made = socket.create_connection(place, CONNECT_S)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        made.sendall(text)
    except OSError:
        return False
    made.setblocking(False)
    selector.register(made, selectors.EVENT_READ, one)
    return True


def _read(selector: selectors.BaseSelector, key: selectors.SelectorKey) -> bool:
    """Take what has come; return whether more may come."""
    connection, one = key.fileobj, key.data
    assert isinstance(connection, socket.socket)
    try:
        piece = connection.recv(_PIECE)
    except BlockingIOError:
        return True
    except OSError:
        piece = b""
    one.pieces.append((monotonic(), piece))
    if piece:
        return True
    selector.unregister(connection)
    connection.close()
    return False


def _heard(one: _Open | None, asked: Sending, begun: float, each: bool) -> Heard:
    """Return what an answer says."""
    if one is None:
        return Heard(asked.at_s, 0.0)
    data = b"".join(piece for _, piece in one.pieces)
    sent_s, late_s = one.sent_s - begun, one.late_s
    status = int(data[9:12]) if data[9:12].isdigit() else 0
    closed_s = one.pieces[-1][0] - one.sent_s if one.pieces and not one.pieces[-1][1] else inf
    if status != 200:
        return Heard(
            sent_s, late_s, "rejected" if status in _BUSY else "failed" if status else "lost", closed_s=closed_s
        )
    first = data.find(b"data: {", data.find(b"\r\n\r\n"))
    finish = max((match.start() for match in _FINISH.finditer(data)), default=-1)
    usage = _USAGE.search(data, finish)
    ends = data.count(b"data: [DONE]")
    end = "failed" if _ERROR.search(data) else "answered" if ends and finish >= 0 else "lost"
    ttft_s, last_s = (_when(one.pieces, at) - one.sent_s if at >= 0 else inf for at in (first, finish))
    tokens, chunks = int(usage[1]) if usage and finish >= 0 else 0, data.count(_TEXT)
    came_s = tuple(_came(one.pieces, one.sent_s)) if each else ()
    return Heard(sent_s, late_s, end, ttft_s, last_s, closed_s, tokens, chunks, ends, came_s)


def _came(pieces: Sequence[tuple[float, bytes]], sent_s: float) -> Iterator[float]:
    """Yield when each token came, in seconds from the sending: with the piece in which its chunk begins."""
    for at_s, piece in pieces:
        for _ in range(piece.count(_TEXT)):
            yield at_s - sent_s


def _when(pieces: Sequence[tuple[float, bytes]], place: int) -> float:
    """Return when a byte came."""
    for at_s, piece in pieces:
        place -= len(piece)
        if place < 0:
            return at_s
    return inf


def main() -> None:
    """Drive as is asked on standard input, beginning at a time of the wall clock; write what came."""
    asked = json.load(sys.stdin)
    sends = [Sending(*one) for one in asked["sends"]]
    time.sleep(max(0.0, asked.get("begin", 0.0) - time.time()))
    json.dump(asdict(drive(asked["url"], asked["model"], sends, asked["after_s"], asked["seed"])), sys.stdout)


if __name__ == "__main__":
    main()
