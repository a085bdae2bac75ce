"""A backend whose replicas are records, and replicas whose answers are scripted: for tests of live fleets."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace

import httpx
import uvicorn

from llmbuild.fleet.actuators.interface import (
    APPLIED,
    Answer,
    Live,
    Route,
    SetClock,
    SetPartition,
    SetPower,
    Slot,
    Start,
    State,
    Stop,
    Switch,
)
from llmbuild.fleet.capacity import OperatingPoint
from llmbuild.fleet.gateway.app import Gateway, application
from llmbuild.fleet.gateway.metrics import FleetMetrics
from llmbuild.fleet.gateway.seen import Watch
from llmbuild.fleet.gateway.table import Table
from llmbuild.fleet.policies.routing import least_loaded
from llmbuild.serve.api.keys import Keys
from llmbuild.serve.api.server import Server
from llmbuild.spec.fleet import Fleet


class FakeBackend:
    """Starts take `start_s`, drains take `drain_s`; a slot's starts may fail."""

    def __init__(self, start_s: float = 2.0, drain_s: float = 1.0, divides: bool = False) -> None:
        self.now, self.start_s, self.drain_s, self.divides = 0.0, start_s, drain_s, divides
        self.actions: list[object] = []
        self.broken: set[Slot] = set()
        self._live: dict[str, Live] = {}
        self._until: dict[str, float] = {}
        self._count = 0

    def start(self, action: Start) -> Answer:
        """Begin to start."""
        assert all(one.slot != action.slot for one in self._live.values())
        self.actions.append(action)
        self._count += 1
        name = f"r{self._count}"
        self._live[name] = Live(name, action.service, action.point, action.slot, "starting", f"http://{name}")
        self._until[name] = self.now + self.start_s
        return APPLIED

    def stop(self, action: Stop) -> Answer:
        """Begin to drain."""
        self.actions.append(action)
        self._live[action.replica] = replace(self._live[action.replica], state="draining")
        self._until[action.replica] = self.now + self.drain_s
        return APPLIED

    def route(self, action: Route) -> Answer:
        """Agree."""
        self.actions.append(action)
        return APPLIED

    def switch(self, action: Switch) -> Answer:
        """Refuse."""
        return Answer("unsupported", "it does not")

    def set_clock(self, action: SetClock) -> Answer:
        """Agree."""
        self.actions.append(action)
        return APPLIED

    def set_power(self, action: SetPower) -> Answer:
        """Refuse."""
        return Answer("unsupported", "it does not")

    def set_partition(self, action: SetPartition) -> Answer:
        """Agree or refuse, as it was made; the node must hold nothing."""
        if self.divides:
            assert all(one.slot.node != action.node for one in self._live.values())
            self.actions.append(action)
            return APPLIED
        return Answer("unsupported", "it does not")

    def die(self, name: str) -> None:
        """Lose a replica."""
        self._live[name] = replace(self._live[name], state="dead", told="killed by signal 9")

    def live(self) -> list[Live]:
        """Return the replicas at this time."""
        for name, one in list(self._live.items()):
            if self.now >= self._until[name] and one.state in ("starting", "draining"):
                failed = one.slot in self.broken or one.state == "draining"
                state: State = "dead" if failed else "ready"
                self._live[name] = replace(one, state=state, told="exit code 1" if failed else "")
        found = list(self._live.values())
        self._live = {name: one for name, one in self._live.items() if one.state != "dead"}
        return found


# --- scripted replicas behind a real gateway -------------------------------------------------------------------------

NO_KEYS = Keys()
Script = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]
"""Answers the body of a request."""


@dataclass
class Replica:
    """A server on the loopback that answers by a script, and counts."""

    script: Script
    url: str = ""
    bodies: list[bytes] = field(default_factory=list)
    heads: list[bytes] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request."""
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"content-length"))
        self.heads.append(head)
        self.bodies.append(await reader.readexactly(length))
        with contextlib.suppress(ConnectionError):
            await self.script(self.bodies[-1], writer)
            writer.close()


def head(status: int = 200, kind: str = "text/event-stream", length: int | None = None) -> bytes:
    """Return the head of an answer."""
    size = f"content-length: {length}" if length is not None else "transfer-encoding: chunked"
    return f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\n{size}\r\n\r\n".encode()


def chunk(data: bytes) -> bytes:
    """Return a piece of a body of unknown length."""
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def event(text: str) -> bytes:
    """Return an event with a piece of a completion."""
    return f'data: {{"choices": [{{"index": 0, "text": "{text}"}}]}}\n\n'.encode()


USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}\n\n'
DONE = b"data: [DONE]\n\n"


async def streams(_: bytes, writer: asyncio.StreamWriter) -> None:
    """Stream two tokens, the usage, and the end."""
    for data in (event("a"), event("b"), USAGE + DONE):
        writer.write((head() if data == event("a") else b"") + chunk(data))
        await writer.drain()
    writer.write(b"0\r\n\r\n")
    await writer.drain()


async def whole(_: bytes, writer: asyncio.StreamWriter) -> None:
    """Answer by one body."""
    body = b'{"choices": [{"text": "ab"}], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}'
    writer.write(head(200, "application/json", len(body)) + body)
    await writer.drain()


async def dies_at_once(_: bytes, writer: asyncio.StreamWriter) -> None:
    """Break the connection."""
    writer.transport.abort()


async def dies_in_the_body(_: bytes, writer: asyncio.StreamWriter) -> None:
    """Break the connection within a body."""
    writer.write(head(200, "application/json", 100) + b'{"choices"')
    await writer.drain()
    writer.transport.abort()


async def dies_in_the_stream(_: bytes, writer: asyncio.StreamWriter) -> None:
    """Break the connection behind the first token."""
    writer.write(head() + chunk(event("a")))
    await writer.drain()
    await asyncio.sleep(0.05)
    writer.transport.abort()


def refuses(status: int) -> Script:
    """Return a script that answers with an error."""

    async def script(_: bytes, writer: asyncio.StreamWriter) -> None:
        body = b'{"error": {"message": "no", "type": "t", "param": null, "code": null}}'
        writer.write(head(status, "application/json", len(body)) + body)
        await writer.drain()

    return script


@dataclass
class Fronted:
    """A gateway with its replicas."""

    url: str
    state: Gateway
    replicas: list[Replica]
    lines: list[str]
    call: Callable[[Callable[[], None]], None]
    """Runs a function on the gateway's thread."""

    def client(self) -> httpx.Client:
        """Return a client."""
        return httpx.Client(base_url=self.url, timeout=20, trust_env=False)

    def live(self, *states: State) -> list[Live]:
        """Return the replicas with these states; all are ready where none is given."""
        return lives(self.state.fleet, self.replicas, *states)

    def update(self, *states: State) -> None:
        """Tell the gateway other states of the replicas, the first ones."""
        self.call(lambda: self.state.table.update(self.live(*states) if states else []))


def lives(fleet: Fleet, replicas: list[Replica], *states: State) -> list[Live]:
    """Return replicas as a backend would tell them."""
    from tests.support.fleets import profile

    kind = fleet.nodes[0]
    point = OperatingPoint(profile(kind.device), kind, 16)
    told = states or ("ready",) * len(replicas)
    return [
        Live(f"r{i}", 0, point, Slot(kind.name, kind.nodes[i], 0), state, one.url)
        for i, (one, state) in enumerate(zip(replicas, told, strict=False))
    ]


@contextlib.contextmanager
def fronted(fleet: Fleet, *scripts: Script, keys: Keys = NO_KEYS) -> Iterator[Fronted]:
    """Serve a gateway with a scripted replica for each script, on the loopback, until the block ends."""
    loop, ready, end = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
    lines: list[str] = []
    replicas = [Replica(script) for script in scripts]
    found: list[Fronted] = []

    @contextlib.asynccontextmanager
    async def served(one: Replica) -> AsyncIterator[None]:
        server = await asyncio.start_server(one.serve, "127.0.0.1", 0)
        one.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server:
            yield

    async def run() -> None:
        async with contextlib.AsyncExitStack() as stack:
            for one in replicas:
                await stack.enter_async_context(served(one))
            table = Table(fleet, least_loaded)
            state = Gateway(fleet, table, Watch(fleet, 0.0), FleetMetrics(dict), keys, lines.append)
            table.update(lives(fleet, replicas))
            server = Server(uvicorn.Config(application(state), port=0, log_config=None, lifespan="off"))
            running = asyncio.ensure_future(server.serve())
            await server.begun.wait()
            port = server.servers[0].sockets[0].getsockname()[1]

            def call(what: Callable[[], None]) -> None:
                done = threading.Event()
                loop.call_soon_threadsafe(lambda: (what(), done.set()))
                assert done.wait(5)

            found.append(Fronted(f"http://127.0.0.1:{port}", state, replicas, lines, call))
            ready.set()
            await end.wait()
            server.should_exit = True
            await running

    def work() -> None:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(run())
        loop.close()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert ready.wait(10)
        yield found[0]
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join(20)
        assert not thread.is_alive()
