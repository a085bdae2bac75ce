"""One HTTP request: its body within a limit, its client's presence, its id, and its line in the log."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from llmbuild.serve.api.errors import INVALID, ApiError, of_exception

T = TypeVar("T")
Handler = Callable[[Request], Awaitable[Response]]
LARGEST_BODY = 2 << 20
"""Bytes of a request's body."""
PING_S = 15.0
"""A stream says that it is alive where nothing was said for so long."""
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass
class Note:
    """What the log says of a request; prompts and answers are no part of it."""

    id: str
    begun: float
    key: str = ""
    model: str = ""
    user: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    outcome: str = ""

    def line(self, method: str, path: str, status: int) -> str:
        """Return the line."""
        fields = {
            "id": self.id,
            "key": self.key,
            "model": self.model,
            "user": self.user[:64],
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "outcome": self.outcome,
        }
        told = " ".join(f"{name}={_plain(value)}" for name, value in fields.items() if value not in ("", None))
        return f"{_now()} {method} {_plain(path)} {status} {time.monotonic() - self.begun:.3f}s {told}"


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _plain(value: object) -> str:
    """Return a text without what would begin another field or line."""
    return re.sub(r"[^\x21-\x7e]", "_", str(value))


def note_of(request: Request) -> Note:
    """Return the note of a request; its client may name it."""
    given = request.headers.get("x-request-id", "")
    return Note(given if _ID.fullmatch(given) else secrets.token_hex(8), time.monotonic())


async def body_of(request: Request) -> bytes:
    """Return the body.

    Raises:
        ApiError: it is larger than the limit.
    """
    found = bytearray()
    async for part in request.stream():
        found += part
        if len(found) > LARGEST_BODY:
            raise ApiError(413, f"the body is larger than {LARGEST_BODY} bytes", INVALID, "body_too_large")
    return bytes(found)


class ClientGone(Exception):
    """The client has closed its connection."""


async def while_there(receive: Receive, work: Awaitable[T]) -> T:
    """Return the result of some work, which is cancelled where the client goes.

    Raises:
        ClientGone: it has.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        for one in (task, gone):
            one.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await one


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """An answer of server-sent events. Its source is closed when it ends or its client goes."""

    media_type = "text/event-stream"

    def __init__(self, source: AsyncIterator[bytes], done: Callable[[bool], None]) -> None:
        """Take the pieces, and what is called at the end with whether the client was still there."""
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._source, self._done = source, done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the pieces as they come."""
        there = True
        try:
            await while_there(receive, self._send(send))
        except (ClientGone, OSError):
            there = False
        finally:
            self._done(there)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for piece in self._source:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def refused(error: ApiError) -> Response:
    """Return the answer that tells an error."""
    return JSONResponse(error.body, error.status, headers=error.headers)


async def answered(request: Request, handler: Handler, log: Callable[[str], None], quiet: bool = False) -> Response:
    """Return a handler's answer, or the one that tells its error; `quiet` requests have no line in the log."""
    note = request.state.note = note_of(request)
    try:
        response = await handler(request)
    except ClientGone:
        note.outcome = "client_gone"
        response = Response(status_code=499)
    except Exception as error:  # noqa: BLE001 - a client is told of any error, and other clients go on
        told = of_exception(error)
        if told.status == 500:
            log(f"error id={note.id} {type(error).__name__}: {error}")
        note.outcome = told.code or "refused"
        response = refused(told)
    return noted(request, note, response, None if quiet else log)


def noted(request: Request, note: Note, response: Response, log: Callable[[str], None] | None) -> Response:
    """Return a response with the request's id; the line of a stream is written when it has ended."""
    response.headers["x-request-id"] = note.id
    if log is not None and not isinstance(response, EventStream):
        log(note.line(request.method, request.url.path, response.status_code))
    return response
