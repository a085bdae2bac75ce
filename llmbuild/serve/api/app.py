"""The routes: each reads a body, asks an engine and writes an answer."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from llmbuild.runtime import checks
from llmbuild.serve.api import asked, replies
from llmbuild.serve.api.asked import Asked, Models
from llmbuild.serve.api.bridge import Answers, Bridge, Numbered
from llmbuild.serve.api.errors import UNAVAILABLE, ApiError, of_fault, of_status
from llmbuild.serve.api.fields import Fields, parsed, truth
from llmbuild.serve.api.http import (
    PING_S,
    EventStream,
    Handler,
    Note,
    answered,
    body_of,
    note_of,
    noted,
    refused,
    while_there,
)
from llmbuild.serve.api.keys import OPEN, Keys
from llmbuild.serve.api.metrics import CONTENT_TYPE, Metrics, ModelMetrics
from llmbuild.serve.served import Served

"""Paths that need no key."""
STALLED_S = 60.0
"""A server with work whose last step ended longer ago is not ready."""
_LONG_BODY = 4096
"""Bytes of a body from which on it is read on another thread: templates and tokenizers take time."""


@dataclass
class State:
    """What the routes share."""

    models: Models
    bridge: Bridge
    metrics: Metrics
    observers: Mapping[str, ModelMetrics]
    keys: Keys = field(default_factory=Keys)
    log: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)
    draining: bool = False
    created: int = field(default_factory=lambda: int(time.time()))


def application(state: State) -> Starlette:
    """Return the ASGI application."""
    routes: list[tuple[str, str, Callable[[State, Request], Awaitable[Response]]]] = [
        ("GET", "/health", _health),
        ("GET", "/ready", _ready),
        ("GET", "/metrics", _metrics),
        ("GET", "/v1/models", _models),
        ("GET", "/v1/models/{model:path}", _model),
        ("POST", "/v1/chat/completions", partial(_generate, asked.chat, "chatcmpl")),
        ("POST", "/v1/completions", partial(_generate, asked.completion, "cmpl")),
        ("POST", "/tokenize", _tokenize),
        ("POST", "/detokenize", _detokenize),
    ]

    def no_route(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        return noted(request, note_of(request), refused(of_status(status)), state.log)

    made = [Route(path, _guarded(state, partial(handler, state)), methods=[way]) for way, path, handler in routes]
    return Starlette(routes=made, exception_handlers={404: no_route, 405: no_route})


def _guarded(state: State, handler: Handler) -> Handler:
    """Return a handler that checks the key, turns errors into answers and writes the log."""

    async def checked(request: Request) -> Response:
        if request.url.path not in OPEN:
            request.state.note.key = state.keys.name(request.headers.get("authorization"))
        return await handler(request)

    async def guarded(request: Request) -> Response:
        return await answered(request, checked, state.log)

    return guarded


# --- generation ------------------------------------------------------------------------------------------------------

Reader = Callable[[Mapping[str, object], Models, str], Asked]


async def _generate(read: Reader, kind: str, state: State, request: Request) -> Response:
    note: Note = request.state.note
    if state.draining:
        raise ApiError(503, "the server is shutting down", UNAVAILABLE, "unavailable")
    name = f"{kind}-{secrets.token_hex(12)}"
    found = await _read(request, lambda body: read(body, state.models, name))
    note.model, note.user, note.prompt_tokens = found.served.name, found.user, found.prompt_tokens
    salt, tenant = note.key.encode(), note.key
    found = replace(found, requests=tuple(replace(one, salt=salt, tenant=tenant) for one in found.requests))
    for one in found.requests:
        state.observers[found.served.name].asked(one.params)
    made = replies.Replies(found, name, int(time.time()))
    with ExitStack() as held:
        answers = held.enter_context(state.bridge.submitted(found))
        if not found.stream:
            body = await while_there(request.receive, _whole(made, answers))
            note.completion_tokens, note.outcome = answers.completion_tokens, "done"
            return JSONResponse(body)
        first = await while_there(request.receive, answers.some())
        replies.parts(first)  # what fails before the first token is told by the status
        source = _stream(made, answers, first, note)
        ended = partial(_stream_ended, state, request, note, answers, held.pop_all())
        return EventStream(source, ended)


async def _read(request: Request, read: Callable[[dict[str, object]], Asked]) -> Asked:
    data = await body_of(request)
    if len(data) < _LONG_BODY and b"response_format" not in data:  # a grammar may take a second to compile
        return read(parsed(data))
    return await run_in_threadpool(lambda: read(parsed(data)))


async def _whole(made: replies.Replies, answers: Answers) -> replies.Json:
    found: dict[int, replies.Part] = {}
    while answers.open:
        replies.parts(await answers.some(), found)
    return made.whole(found, answers)


async def _stream(made: replies.Replies, answers: Answers, first: list[Numbered], note: Note) -> AsyncIterator[bytes]:
    """Yield the chunks of a stream: what came since the last one is one chunk."""
    try:
        yield made.opening() + made.chunks(replies.parts(first))
        while answers.open:
            events = await answers.some(PING_S)
            if not events:
                yield b": still working\n\n"
            elif piece := made.chunks(replies.parts(events)):
                yield piece
        note.outcome = "done"
        yield made.ending(answers)
    except ApiError as error:
        note.outcome = error.code or ""
        yield replies.failed(error)


def _stream_ended(state: State, request: Request, note: Note, answers: Answers, held: ExitStack, there: bool) -> None:
    held.close()
    note.completion_tokens = answers.completion_tokens
    if not there:
        note.outcome = "client_gone"
    state.log(note.line(request.method, request.url.path, 200))


# --- the other routes ------------------------------------------------------------------------------------------------


async def _health(state: State, _: Request) -> Response:
    """Say that the event loop answers."""
    return JSONResponse({"status": "ok"})


async def _ready(state: State, _: Request) -> Response:
    """Say whether requests are answered: nobody drains, no engine has failed, and the last step is not long ago."""
    if state.draining:
        raise ApiError(503, "the server is shutting down", UNAVAILABLE, "draining")
    for name, served in state.models.items():
        found = served.engine.snapshot()
        if found.fault:
            raise of_fault("closed", f"the engine of {name} has failed: {found.fault}")
        if found.idle_s > STALLED_S:
            raise of_fault("closed", f"{name}: no step has ended for {found.idle_s:.0f} s")
    return JSONResponse({"status": "ready", "models": list(state.models)})


async def _metrics(state: State, _: Request) -> Response:
    return Response(state.metrics.text(), media_type=CONTENT_TYPE)


async def _models(state: State, _: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_shown(state, one) for one in state.models.values()]})


async def _model(state: State, request: Request) -> Response:
    return JSONResponse(_shown(state, asked.model_named(request.path_params["model"], state.models)))


def _shown(state: State, one: Served) -> dict[str, object]:
    shown: dict[str, object] = {"id": one.name, "object": "model", "created": state.created, "owned_by": "llmbuild"}
    return {**shown, "root": one.variant, "parent": None, "max_model_len": one.context}


async def _tokenize(state: State, request: Request) -> Response:
    """Return the tokens of a text or a chat."""
    fields = Fields(parsed(await body_of(request)))
    served = asked.model_of(fields, state.models)
    messages: list[dict[str, object]] = fields.take("messages", asked.messages_of, [])
    add = fields.take("add_special_tokens", truth, True)
    found = served.chat(messages) if messages else served.text(fields.needed("prompt", checks.text), add)
    fields.neutral({"add_generation_prompt": (True,), "return_token_strs": (False,)})
    fields.end()
    return JSONResponse({"tokens": found.tokens, "count": len(found.tokens), "max_model_len": served.context})


async def _detokenize(state: State, request: Request) -> Response:
    """Return the text of tokens."""
    fields = Fields(parsed(await body_of(request)))
    served = asked.model_of(fields, state.models)
    tokens = fields.needed("tokens", asked.tokens_of)
    fields.end()
    return JSONResponse({"prompt": served.tokenizer.decode(tokens)})
