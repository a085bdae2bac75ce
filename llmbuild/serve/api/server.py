"""The server: a socket, an event loop, the engines, and an end in which what was begun is finished."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import uvicorn
from starlette.applications import Starlette

from llmbuild.errors import InputError, sentence
from llmbuild.runtime.model import Model
from llmbuild.serve.api.app import State, application
from llmbuild.serve.api.bridge import Bridge
from llmbuild.serve.api.keys import Keys
from llmbuild.serve.api.metrics import Metrics
from llmbuild.serve.served import Served, Settings, opened

BACKLOG = 128
MOST_CONNECTIONS = 1024
"""Connections that are open at a time; more are answered by 503."""
_LAST_S = 5
"""Seconds that connections have to take what was written, after everything else has ended."""


@dataclass(frozen=True)
class Place:
    """Where a server listens, and how it ends: `drain_s` seconds are given to what was begun."""

    host: str = "127.0.0.1"
    port: int = 8000
    drain_s: float = 30.0

    @property
    def local(self) -> bool:
        """Whether only this host can connect."""
        with contextlib.suppress(ValueError):
            return ipaddress.ip_address(self.host).is_loopback
        return self.host == "localhost"


@dataclass(frozen=True)
class Told:
    """What a server says of itself: with `ready`, when it answers; with `log`, of each request."""

    ready: Callable[[str, Sequence[Served]], None]
    log: Callable[[str], None]


def serve(models: Sequence[Model], settings: Settings, place: Place, keys: Keys, told: Told) -> bool:
    """Serve models until SIGTERM or SIGINT; return whether all that was begun was finished.

    The first signal lets requests end, and takes no more; a second one, or the end of `drain_s`, ends them.

    Raises:
        InputError: the address cannot be listened on, or the models do not fit.
        LlmbuildError: a variant cannot be opened.
    """
    with contextlib.closing(listening(place)) as listener:
        return asyncio.run(_serve(models, settings, place, keys, told, listener))


async def _serve(
    models: Sequence[Model], settings: Settings, place: Place, keys: Keys, told: Told, listener: socket.socket
) -> bool:
    bridge = Bridge(asyncio.get_running_loop().call_soon_threadsafe, settings.stream_interval_s)
    metrics = Metrics()
    observers = {str(model.row["model"]): metrics.observe(str(model.row["model"])) for model in models}
    found = opened(models, settings, bridge.outlet, observers)
    by_name = {one.name: one for one in found}
    metrics.watch({name: one.engine.snapshot for name, one in by_name.items()})
    state = State(by_name, bridge, metrics, observers, keys, told.log)
    try:
        for one in found:
            one.engine.start(f"engine-{one.name}")
        return await _answer(state, place, listener, partial(told.ready, url_of(place, listener), found))
    finally:
        for one in found:
            await asyncio.to_thread(one.engine.close)
        await asyncio.sleep(0)  # the last events reach those who wait
        for one in found:
            one.close()


async def _answer(state: State, place: Place, listener: socket.socket, ready: Callable[[], None]) -> bool:
    """Answer until a signal comes; return whether all that was begun was finished."""
    server = server_of(application(state))
    with signals() as asked:
        running = asyncio.ensure_future(server.serve(sockets=[listener]))
        begun = asyncio.ensure_future(server.begun.wait())
        await asyncio.wait((running, begun), return_when=asyncio.FIRST_COMPLETED)
        begun.cancel()
        ready()
        first = asyncio.ensure_future(asked.get())
        await asyncio.wait((running, first), return_when=asyncio.FIRST_COMPLETED)
        first.cancel()
        state.draining = True
        done = await _drained(state, place.drain_s, asked)
        for one in state.models.values():
            await asyncio.to_thread(one.engine.close)
        server.should_exit = True
        await running
    return done


async def _drained(state: State, most_s: float, asked: asyncio.Queue[None]) -> bool:
    """Wait until the engines have nothing to do, for some seconds, or up to the next signal."""
    drains = [asyncio.to_thread(one.engine.drain, most_s) for one in state.models.values()]
    drained = asyncio.gather(*drains)
    second = asyncio.ensure_future(asked.get())
    await asyncio.wait((drained, second), return_when=asyncio.FIRST_COMPLETED)
    if not second.done():
        second.cancel()
        return all(await drained)
    for one in state.models.values():
        await asyncio.to_thread(one.engine.close)  # ends the drains, too
    await drained
    return False


class Server(uvicorn.Server):
    """A server that says when it listens, and leaves signals to its caller."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.begun = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        await super().startup(sockets)
        self.begun.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take no signal."""
        yield


def server_of(routes: Starlette) -> Server:
    """Return a server of these routes, as all of ours are set up."""
    config = uvicorn.Config(
        routes,
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=_LAST_S,
        backlog=BACKLOG,
    )
    return Server(config)


@contextlib.contextmanager
def signals() -> Iterator[asyncio.Queue[None]]:
    """Put each signal to end into a queue."""
    loop, asked, names = asyncio.get_running_loop(), asyncio.Queue[None](), (signal.SIGTERM, signal.SIGINT)
    before = {name: signal.getsignal(name) for name in names}
    for name in names:
        loop.add_signal_handler(name, asked.put_nowait, None)
    try:
        yield asked
    finally:
        for name in names:
            loop.remove_signal_handler(name)
            signal.signal(name, before[name])


def listening(place: Place) -> socket.socket:
    """Return a socket that is bound; it listens when the server begins.

    Raises:
        InputError: the address is none of this host, or is taken.
    """
    try:
        kind, _, _, _, address = socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(kind)
    except OSError as error:
        raise InputError(f"--host {place.host}: {error.strerror or error}: name an address of this host") from None
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        made.close()
        told = f"{place.host} port {place.port} cannot be listened on: {sentence(error)}"
        raise InputError(f"{told}: name another with --port, or 0 for any that is free") from None
    return made


def url_of(place: Place, listener: socket.socket) -> str:
    """Return the address of a socket that listens."""
    host = f"[{place.host}]" if ":" in place.host else place.host
    return f"http://{host}:{listener.getsockname()[1]}"


def to_stderr(line: str) -> None:
    """Write a line of the log."""
    print(line, file=sys.stderr, flush=True)
