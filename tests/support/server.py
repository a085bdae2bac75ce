"""Servers for tests: the command as a user starts it, and one in this process over a device that a test steers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from llmbuild.serve.api.app import State, application
from llmbuild.serve.api.bridge import Bridge
from llmbuild.serve.api.keys import Keys
from llmbuild.serve.api.metrics import Metrics
from llmbuild.serve.api.server import Server
from llmbuild.serve.engine import Engine, Limits
from llmbuild.serve.errors import RequestRefused
from llmbuild.serve.schedule.fcfs import Fcfs
from llmbuild.serve.schedule.named import Targets
from llmbuild.serve.served import Prompt
from llmbuild.serve.step import Rows
from tests.support.serving import CONTEXT, WORDS, FakeStep, text_of


@dataclass
class Running:
    """A server that was started as a command."""

    process: subprocess.Popen[str]
    url: str
    log: list[str] = field(default_factory=list)

    def stop(self, name: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(name)
        return self.process.wait(60)


@contextlib.contextmanager
def command(*arguments: str | Path, **env: str) -> Iterator[Running]:
    """Run `llmbuild serve` on a free port until the block ends."""
    words = [sys.executable, "-m", "llmbuild", "serve", *map(str, arguments), "--port", "0"]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **env}
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        found = Running(process, "")
        reader = threading.Thread(target=lambda: found.log.extend(process.stderr or ()))
        reader.start()
        try:
            found.url = process.stdout.readline().strip()
            assert found.url.startswith("http://127.0.0.1:"), (found.url, found.log)
            yield found
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(60)
            reader.join(60)


class Letters:
    """A tokenizer of the fake device's words."""

    def __init__(self) -> None:
        self._tokens = {word: token for token, word in enumerate(WORDS) if len(word) == 1}

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes of a token."""
        return WORDS[token].encode()

    def decode(self, tokens: Sequence[int]) -> str:
        """Return a text."""
        return "".join(WORDS[token] for token in tokens)

    def tokens(self, text: str) -> tuple[int, ...]:
        """Return the tokens of a text of letters."""
        if not text:
            raise RequestRefused("the prompt is empty: give at least one character", "prompt")
        return tuple(self._tokens.get(letter, 1) for letter in text)


class FakeServed:
    """What the routes need of a model, over the fake device."""

    def __init__(self, name: str, step: FakeStep, limits: Limits, bridge: Bridge, metrics: Metrics) -> None:
        self.name, self.variant, self.context, self.step = name, "f" * 64, CONTEXT, step
        self.tokenizer: Any = Letters()
        self.observer = metrics.observe(name)
        self.classes = {"chat": Targets(0.5, 0.05)}
        self.engine = Engine(step, Fcfs(), text_of, bridge.outlet, limits, self.observer)

    def text(self, text: str, add_special_tokens: bool = True) -> Prompt:
        """Return a prompt."""
        return Prompt(self.tokenizer.tokens(text))

    call_form = None

    def chat(self, messages: Sequence[Any], tools: Sequence[Any] = ()) -> Prompt:
        """Return the prompt of a chat."""
        return Prompt(self.tokenizer.tokens("".join(str(m["content"]) for m in messages)))


@dataclass
class Local:
    """A server in this process."""

    url: str
    state: State
    step: FakeStep
    log: list[str]

    @property
    def engine(self) -> Engine:
        """The engine of the model `fake`."""
        return self.state.models["fake"].engine

    def client(self) -> httpx.Client:
        """Return a client."""
        return httpx.Client(base_url=self.url, timeout=30, trust_env=False)


@contextlib.contextmanager
def local(
    slots: int = 2,
    before: Callable[[Sequence[Rows]], None] = lambda batch: None,
    limits: Limits | None = None,
    keys: Keys | None = None,
    make: Callable[[Bridge, Metrics], Any] | None = None,
) -> Iterator[Local]:
    """Serve the model `fake`, a fake or what is made, on a free port of the loopback, by the real server."""
    loop = asyncio.new_event_loop()
    bridge, metrics, log = Bridge(loop.call_soon_threadsafe), Metrics(), list[str]()
    step = FakeStep(slots, before=before)
    served = make(bridge, metrics) if make else FakeServed("fake", step, limits or Limits(), bridge, metrics)
    state = State({"fake": served}, bridge, metrics, {"fake": served.observer}, keys or Keys(), log.append)
    metrics.watch({"fake": served.engine.snapshot})
    config = uvicorn.Config(
        application(state), port=0, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=5
    )
    server, ready = Server(config), threading.Event()

    async def answer() -> None:
        running = asyncio.ensure_future(server.serve())
        await server.begun.wait()
        ready.set()
        await running

    def run() -> None:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(answer())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()

    served.engine.start()
    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert ready.wait(20)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Local(f"http://127.0.0.1:{port}", state, step, log)
    finally:
        served.engine.close()
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
