"""A server that takes no time to start: what a fleet needs of `llmbuild serve`, with the standard library alone."""

from __future__ import annotations

import asyncio
import json
import signal
import sys

PAUSE_S = 0.02
"""Seconds of each token."""


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer one request: readiness, or a stream of tokens."""
    head = await reader.readuntil(b"\r\n\r\n")
    if head.startswith(b"GET"):
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
    else:
        length = next(int(one[16:]) for one in head.lower().split(b"\r\n") if one.startswith(b"content-length: "))
        tokens = json.loads(await reader.readexactly(length))["max_tokens"]
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n")
        for i in range(tokens):
            await asyncio.sleep(PAUSE_S)
            writer.write(event({"choices": [{"index": 0, "text": str(i), "finish_reason": None}]}))
            await writer.drain()
        usage = {"prompt_tokens": 3, "completion_tokens": tokens}
        writer.write(event({"choices": [], "usage": usage}) + b"data: [DONE]\n\n")
    await writer.drain()
    writer.close()


def event(body: object) -> bytes:
    """Return an event of a stream."""
    return b"data: " + json.dumps(body).encode() + b"\n\n"


async def serve() -> None:
    """Serve until SIGTERM, and until what was begun is finished."""
    over, open_ = asyncio.Event(), set[asyncio.Task[None]]()

    async def counted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        open_.add(task)
        try:
            await answer(reader, writer)
        finally:
            open_.discard(task)

    server = await asyncio.start_server(counted, "127.0.0.1", 0)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, over.set)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await over.wait()
    server.close()
    if open_:
        await asyncio.wait(set(open_))
    print("every answer was finished", file=sys.stderr)


if __name__ == "__main__":
    asyncio.run(serve())
