"""A client of servers that answer as OpenAI's API does: sends completions as streams, several at a time.

One process drives all servers of a comparison, so that all meet the same client. It answers JSON lines on its standard
input (`load`), and reads the events of a stream after its last answer: while requests run, it only notes when bytes
came. So it takes little of the cores that it shares with the server; what it takes is told.
"""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Iterator
from time import perf_counter, process_time
from typing import Any

import httpx
from peer_worker import Request, serve

LIMIT_S = 600.0
Piece = tuple[float, bytes]


def load(request: Request) -> Request:
    """Send {bodies} to {url}, {streams} at a time, each when one before has ended; return what came of each.

    `wall_s` is the time from the first request to the last byte, `cpu_s` the CPU time of this process in it.
    """
    return asyncio.run(_load(request["url"], request["bodies"], request["streams"]))


async def _load(url: str, bodies: list[dict[str, Any]], streams: int) -> Request:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)  # llama-server closes what is kept at will
    found: list[tuple[float, list[Piece]]] = [(0.0, [])] * len(bodies)
    async with httpx.AsyncClient(timeout=LIMIT_S, limits=limits, trust_env=False) as client:
        waiting = iter(range(len(bodies)))

        async def stream() -> None:
            for number in waiting:
                found[number] = await _asked(client, url, bodies[number])

        gc.collect()
        gc.disable()
        begun, cpu = perf_counter(), process_time()
        await asyncio.gather(*(stream() for _ in range(streams)))
        wall_s, cpu_s = perf_counter() - begun, process_time() - cpu
        gc.enable()
    return {"wall_s": wall_s, "cpu_s": cpu_s, "answers": [answer(begun, pieces) for begun, pieces in found]}


async def _asked(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> tuple[float, list[Piece]]:
    """Return when a request was sent, and the bytes of its answer, each piece with the time when it came."""
    begun, pieces = perf_counter(), list[Piece]()
    async with client.stream("POST", url, json=body) as response:
        async for piece in response.aiter_raw():
            pieces.append((perf_counter(), piece))
        if response.status_code != 200:
            raise RuntimeError(f"{url} answers {response.status_code}: {pieces[0][1].decode()[:300] if pieces else ''}")
    return begun, pieces


def answer(begun: float, pieces: list[Piece]) -> Request:
    """Return what a stream says: seconds from the request to the first and to the last token, counts, and the text.

    Raises:
        ValueError: it tells of an error, has no text, or does not end.
    """
    text, first, last, usage, done = "", None, begun, None, False
    for at, event in events(pieces):
        if event == "[DONE]":
            done = True
            continue
        body = json.loads(event)
        if "error" in body:
            raise ValueError(f"a stream tells of an error: {body['error']}")
        usage = body.get("usage") or usage
        for choice in body["choices"]:
            text, last = text + choice["text"], at
            first = at if first is None and choice["text"] else first
    if first is None or usage is None or not done:
        raise ValueError(f"a stream has no text, no usage or no end: {text[:60]!r}, {usage}")
    return {
        "ttft_s": first - begun,
        "e2e_s": last - begun,
        "prompt_tokens": usage["prompt_tokens"],
        "output_tokens": usage["completion_tokens"],
        "cached_tokens": (usage.get("prompt_tokens_details") or {}).get("cached_tokens"),
        "text": text,
    }


def events(pieces: list[Piece]) -> Iterator[tuple[float, str]]:
    """Yield the data of each server-sent event, with the time when its last byte came."""
    held = b""
    for at, piece in pieces:
        *whole, held = (held + piece).split(b"\n\n")
        for one in whole:
            if one.startswith(b"data: "):
                yield at, one.removeprefix(b"data: ").decode()


if __name__ == "__main__":
    serve({"load": load})
