"""The routes of the gateway: each request goes to one replica, and to another one only before it was begun.

Begun is what the client has seen a byte of. An answer that is not streamed is forwarded whole, so it may be asked for
again at any time. A stream that breaks ends with an error in the API's form: it is never begun anew.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from prometheus_client import Histogram
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from llmbuild.fleet.gateway.metrics import FleetMetrics
from llmbuild.fleet.gateway.seen import Watch
from llmbuild.fleet.gateway.stream import Relay
from llmbuild.fleet.gateway.table import SUSPECT_S, WARM_S, Job, Place, Table
from llmbuild.fleet.gateway.upstream import SILENT_S, Answer, Broken, ask
from llmbuild.fleet.simulate.trace import Asked
from llmbuild.serve.api import replies
from llmbuild.serve.api.errors import INVALID, UNAVAILABLE, ApiError, of_status
from llmbuild.serve.api.fields import parsed
from llmbuild.serve.api.http import (
    ClientGone,
    EventStream,
    Handler,
    Note,
    answered,
    body_of,
    refused,
    while_there,
)
from llmbuild.serve.api.keys import OPEN, Keys
from llmbuild.serve.api.metrics import CONTENT_TYPE
from llmbuild.spec.fleet import Fleet

ATTEMPTS = 5
"""Replicas that one request is given to, one after another."""
ANSWER_S = 660.0
"""Seconds for an answer that is not streamed; a server gives up after 600 s by itself."""
ELSEWHERE = (429, 500, 502, 503)
"""Statuses after which another replica is asked: this one is full, ends or has failed."""
_KEPT = ("content-type", "retry-after")
Way = Callable[["Gateway", Request], Awaitable[Response]]


@dataclass
class Gateway:
    """What the routes share."""

    fleet: Fleet
    table: Table
    watch: Watch
    metrics: FleetMetrics
    keys: Keys = field(default_factory=Keys)
    log: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)
    draining: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    open: int = 0
    """Requests that are not answered yet."""
    numbers: int = 0


@dataclass(frozen=True)
class _Wanted:
    """A request as the gateway reads it."""

    job: Job
    path: str
    body: bytes
    stream: bool
    usage: bool
    """Whether the client asked for the usage at a stream's end."""
    characters: int
    arrived_s: float
    authorization: str | None = None
    """The client's key, which the replicas ask for too: what they share between requests is a key's own."""

    @property
    def key(self) -> tuple[int, int]:
        """Return its service and class."""
        return self.job.ask.service, self.job.ask.kind


def application(state: Gateway) -> Starlette:
    """Return the ASGI application."""
    routes: list[tuple[str, str, Way]] = [
        ("GET", "/health", _health),
        ("GET", "/ready", _ready),
        ("GET", "/metrics", _metrics),
        ("GET", "/v1/models", _models),
        ("POST", "/v1/chat/completions", _generate),
        ("POST", "/v1/completions", _generate),
    ]

    def no_route(request: Request, error: Exception) -> Response:
        return refused(of_status(error.status_code if isinstance(error, HTTPException) else 500))

    made = [Route(path, _guarded(state, way), methods=[method]) for method, path, way in routes]
    return Starlette(routes=made, exception_handlers={404: no_route, 405: no_route})


def _guarded(state: Gateway, way: Way) -> Handler:
    """Return a handler that checks the key, turns errors into answers, and logs each request to a model."""

    async def checked(request: Request) -> Response:
        if request.url.path not in OPEN:
            request.state.note.key = state.keys.name(request.headers.get("authorization"))
        return await way(state, request)

    async def guarded(request: Request) -> Response:
        return await answered(request, checked, state.log, quiet=request.method != "POST")

    return guarded


# --- generation ------------------------------------------------------------------------------------------------------


async def _generate(state: Gateway, request: Request) -> Response:
    note: Note = request.state.note
    if state.draining:
        raise ApiError(503, "the fleet is shutting down", UNAVAILABLE, "unavailable")
    wanted = _wanted(state, request.url.path, await body_of(request))
    if state.keys.digests:
        wanted = replace(wanted, authorization=request.headers.get("authorization"))
    note.model = state.fleet.services[wanted.key[0]].name
    state.watch.arrived(wanted.key, wanted.arrived_s)
    trip = _Trip(state, wanted, note)
    state.open += 1
    try:
        return await while_there(request.receive, trip.go(request.method))
    except BaseException as error:
        trip.end("client_gone" if isinstance(error, ClientGone) else _refusal(error))
        raise


def _refusal(error: BaseException) -> str:
    return "rejected" if isinstance(error, ApiError) and error.status in (429, 503) else "failed"


class _Trip:
    """One request: its replicas one after another, and its one end."""

    def __init__(self, state: Gateway, wanted: _Wanted, note: Note) -> None:
        self._state, self._wanted, self._note = state, wanted, note
        self._place: Place | None = None
        self._answer: Answer | None = None
        self._ended = False
        self._first = False
        self._rows = 1
        """Requests at the replica when the first token came."""
        state.watch.waiting[wanted.key[0]] += 1

    async def go(self, method: str) -> Response:
        """Return the answer of the first replica that gives one.

        Raises:
            ApiError: none does.
        """
        state, wanted, without = self._state, self._wanted, set[str]()
        last: Response | None = None
        why = "no replica answers"
        for attempt in range(ATTEMPTS):
            if attempt:
                state.metrics.retries.labels(state.fleet.services[wanted.key[0]].name).inc()
            place = await state.table.place(wanted.job, without, asyncio.get_running_loop().time())
            if place is None:
                break
            self._take(place)
            try:
                made = await self._asked(place, method)
            except Broken as error:
                place.suspect_s, why = asyncio.get_running_loop().time() + SUSPECT_S, str(error)
                state.log(f"retry id={self._note.id} {place.live.name}: {error}")
                self._leave()
                continue
            if made.status_code not in ELSEWHERE:
                return made
            last = made
            without.add(place.live.name)
            self._leave()
        if last is None:
            raise ApiError(502, f"{why}; {ATTEMPTS} replicas were asked", UNAVAILABLE, "replicas_failed")
        self.end("rejected" if last.status_code in (429, 503) else "failed")
        return last

    async def _asked(self, place: Place, method: str) -> Response:
        """Return the answer of one replica, or the beginning of its stream.

        Raises:
            Broken: nothing of it was forwarded.
        """
        wanted = self._wanted
        headers = {"content-type": "application/json", "x-request-id": self._note.id}
        if wanted.authorization is not None:
            headers["authorization"] = wanted.authorization
        silent_s = SILENT_S if wanted.stream else ANSWER_S
        self._answer = answer = await ask(place.live.url, wanted.path, wanted.body, headers, silent_s)
        kept = {name: answer.headers[name] for name in _KEPT if name in answer.headers}
        if answer.status != 200 or not wanted.stream:
            body = await answer.whole()
            if answer.status not in ELSEWHERE:
                self._whole(answer.status, body)
            return Response(body, answer.status, headers=kept)
        relay = Relay(answer.pieces(), wanted.usage)
        first = await relay.first()
        return EventStream(self._streamed(relay, first), partial(self._stream_ended, relay))

    def _whole(self, status: int, body: bytes) -> None:
        """Learn from an answer that is not streamed."""
        if status == 200:
            usage = json.loads(body).get("usage") or {}
            self._learn(int(usage.get("prompt_tokens", 0)), int(usage.get("completion_tokens", 0)))
        self.end("answered" if status == 200 else "refused")

    async def _streamed(self, relay: Relay, first: bytes) -> AsyncIterator[bytes]:
        self._seen_first(time.monotonic())
        try:
            yield first
            async for piece in relay.rest():
                yield piece
        except Broken as error:
            name = self._place.live.name if self._place else ""
            self._state.log(f"broken id={self._note.id} {name}: {error}")
            if self._place is not None:
                self._place.suspect_s = asyncio.get_running_loop().time() + SUSPECT_S
            told = f"the replica broke off in the middle of the answer: {error}"
            yield replies.failed(ApiError(502, told, UNAVAILABLE, "replica_lost"))

    def _seen_first(self, now: float) -> None:
        self._wanted.job.begun = self._first = True
        self._rows = self._place.load if self._place else 1
        self._state.watch.waiting[self._wanted.key[0]] -= 1
        self._labelled(self._state.metrics.first).observe(now - self._wanted.arrived_s)

    def _stream_ended(self, relay: Relay, there: bool) -> None:
        if relay.done:
            self._learn(relay.prompt, relay.output)
            self._met(relay)
        self.end("answered" if relay.done else "failed" if there else "client_gone")
        self._state.log(self._note.line("POST", self._wanted.path, 200))

    def _met(self, relay: Relay) -> None:
        """Count whether a stream has met its SLO."""
        service = self._state.fleet.services[self._wanted.key[0]]
        kind = service.classes[self._wanted.key[1]]
        tpot_s = (relay.last_s - relay.first_s) / (relay.output - 1) if relay.output > 1 else 0.0
        self._labelled(self._state.metrics.per_token).observe(tpot_s)
        self._corrected(relay, tpot_s)
        met = relay.first_s - self._wanted.arrived_s <= kind.ttft_s and tpot_s <= kind.tpot_s
        self._state.metrics.slo.labels(service.name, kind.name, str(met).lower()).inc()

    def _corrected(self, relay: Relay, tpot_s: float) -> None:
        """Hold the time between tokens against the profile's."""
        place = self._place
        if place is not None and asyncio.get_running_loop().time() - place.since_s >= WARM_S:
            rows, positions = (self._rows + place.load) / 2, relay.prompt + relay.output / 2
            correction = self._state.watch.corrections[self._wanted.key[0]]
            correction.seen(place.point, rows, positions, relay.output, tpot_s)

    def _learn(self, prompt: int, output: int) -> None:
        self._note.prompt_tokens, self._note.completion_tokens = prompt, output
        self._state.watch.ended(self._wanted.key, self._wanted.characters, prompt, output)

    # --- its replica and its end -------------------------------------------------------------------------------------

    def _take(self, place: Place) -> None:
        self._place = place
        place.jobs.add(self._wanted.job)

    def _leave(self) -> None:
        """Leave a replica: what it still computes for this request is given up."""
        if self._answer is not None:
            self._answer.close()
            self._answer = None
        if self._place is not None:
            self._place.jobs.discard(self._wanted.job)
            self._place = None

    def end(self, outcome: str) -> None:
        """Count the request, once."""
        if self._ended:
            return
        self._ended = True
        self._leave()
        if not self._first:
            self._state.watch.waiting[self._wanted.key[0]] -= 1
        self._state.open -= 1
        self._note.outcome = outcome
        s, c = self._wanted.key
        service = self._state.fleet.services[s]
        self._state.metrics.requests.labels(service.name, service.classes[c].name, outcome).inc()
        self._labelled(self._state.metrics.e2e).observe(time.monotonic() - self._wanted.arrived_s)

    def _labelled(self, histogram: Histogram) -> Histogram:
        service = self._state.fleet.services[self._wanted.key[0]]
        return histogram.labels(service.name, service.classes[self._wanted.key[1]].name)


# --- what is asked ---------------------------------------------------------------------------------------------------


def _wanted(state: Gateway, path: str, data: bytes) -> _Wanted:
    """Return a request: its service by its model, its class by the name that it gives.

    Raises:
        ApiError, RequestRefused: the body is no object, or names what is not there.
    """
    body = parsed(data)
    service, kind = _service(state.fleet, body.get("model")), 0
    named = body.pop("slo_class", None)
    classes = state.fleet.services[service].classes
    if named is not None:
        names = [each.name for each in classes]
        if named not in names:
            told = f"slo_class is {str(named)[:40]!r}; {state.fleet.services[service].name} has {', '.join(names)}"
            raise ApiError(400, told, INVALID, None, "slo_class")
        kind = names.index(str(named))
    stream, options = body.get("stream") is True, body.get("stream_options")
    usage = isinstance(options, Mapping) and options.get("include_usage") is True
    if stream and (options is None or isinstance(options, Mapping)):
        body["stream_options"] = {**(options or {}), "include_usage": True}
    body["model"] = state.fleet.services[service].model
    characters, tokens = _prompt(body)
    prompt = tokens or state.watch.tokens_of(service, characters)
    state.numbers += 1
    now = time.monotonic()
    output = body.get("max_tokens", body.get("max_completion_tokens"))
    expected = state.watch.output((service, kind))
    most = min(output, round(expected)) if isinstance(output, int) and output > 0 else round(expected)
    asked = Asked(state.numbers, now, service, kind, prompt, max(1, most))
    return _Wanted(Job(asked), path, json.dumps(body).encode(), stream, usage, characters, now)


def _service(fleet: Fleet, name: object) -> int:
    """Return the service of a name: its own, or its model's.

    Raises:
        ApiError: there is none.
    """
    for names in ([one.name for one in fleet.services], [one.model for one in fleet.services]):
        if name in names:
            return names.index(str(name))
    told = f"model {str(name)[:100]!r} is not served here: {', '.join(one.name for one in fleet.services)}"
    raise ApiError(404, told, code="model_not_found", param="model")


def _prompt(body: Mapping[str, object]) -> tuple[int, int]:
    """Return the characters of a prompt, or else its tokens; what is malformed is left to the replica to refuse."""
    prompt, messages = body.get("prompt"), body.get("messages")
    if isinstance(prompt, str):
        return len(prompt), 0
    if isinstance(prompt, list):
        texts = [one for one in prompt if isinstance(one, str)]
        return sum(map(len, texts)), 0 if texts else len(prompt)
    if isinstance(messages, list):
        return sum(len(str(one.get("content", ""))) for one in messages if isinstance(one, Mapping)), 0
    return 1, 0


# --- the other routes ------------------------------------------------------------------------------------------------


async def _health(state: Gateway, _: Request) -> Response:
    """Say that the event loop answers."""
    return JSONResponse({"status": "ok"})


async def _ready(state: Gateway, _: Request) -> Response:
    """Say whether every service has a replica that takes requests."""
    if state.draining:
        raise ApiError(503, "the fleet is shutting down", UNAVAILABLE, "draining")
    bare = [one.name for s, one in enumerate(state.fleet.services) if not state.table.serves(s)]
    if bare:
        raise ApiError(503, f"no replica serves {', '.join(bare)}", UNAVAILABLE, "no_replica")
    return JSONResponse({"status": "ready", "models": [one.name for one in state.fleet.services]})


async def _metrics(state: Gateway, _: Request) -> Response:
    return Response(state.metrics.text(), media_type=CONTENT_TYPE)


async def _models(state: Gateway, _: Request) -> Response:
    running = Counter(place.live.service for place in state.table.places)
    head = {"object": "model", "created": state.created, "owned_by": "llmbuild", "parent": None}
    data = [
        {"id": one.name, **head, "root": one.model, "replicas": running[s]}
        for s, one in enumerate(state.fleet.services)
    ]
    return JSONResponse({"object": "list", "data": data})
