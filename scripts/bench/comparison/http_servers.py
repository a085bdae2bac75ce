"""HTTP servers under comparison: processes on some cores, and what requests to them saw."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from comparison.asks import Ask
from comparison.rounds import Worker
from llmbuild.errors import InputError
from llmbuild.process.child import stop_group, tail
from llmbuild.profiler import noise

START_S = 600.0
"""Seconds in which a server must answer: some compile first."""
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_URL = re.compile(r"http://127\.0\.0\.1:\d+")


@dataclass(frozen=True)
class Entrant:
    """A server that takes part: its command, the model that requests name, and what only its requests have."""

    name: str
    command: tuple[str, ...]
    model: str
    more: Mapping[str, Any] = field(default_factory=dict)
    variant: str = ""
    choices: str = ""


@dataclass(frozen=True)
class Server:
    """An entrant that answers."""

    entrant: Entrant
    url: str
    process: int

    def body(self, ask: Ask, **more: Any) -> dict[str, Any]:
        """Return a completion's body: greedy, streamed, and as long as is asked for."""
        asked = {"model": self.entrant.model, "prompt": list(ask.prompt), "max_tokens": ask.output, "temperature": 0}
        streamed = {"stream": True, "stream_options": {"include_usage": True}}
        return {**asked, "ignore_eos": True, **streamed, **self.entrant.more, **more}


@contextmanager
def started(entrants: Sequence[Entrant], cores: Sequence[int]) -> Iterator[list[Server]]:
    """Start servers on these cores, and end them with the block.

    Raises:
        InputError: one does not answer.
    """
    with ExitStack() as held:
        yield [held.enter_context(_started(one, cores)) for one in entrants]


@contextmanager
def _started(entrant: Entrant, cores: Sequence[int]) -> Iterator[Server]:
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            entrant.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=partial(os.sched_setaffinity, 0, cores),
        )
        try:
            yield Server(entrant, _answering(entrant, process, log.fileno()), process.pid)
        finally:
            stop_group(process)


def _answering(entrant: Entrant, process: subprocess.Popen[bytes], log: int) -> str:
    """Return the address of a server, once it answers: it prints where it listens."""
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        found = _URL.search(tail(log))
        if found and _healthy(found[0]):
            return found[0]
        time.sleep(0.1)
    said = [line for line in tail(log).splitlines() if line.strip()][-1:]
    raise InputError(f"{entrant.name} does not answer: {said or process.poll()}: `{' '.join(entrant.command)}`")


def _healthy(url: str) -> bool:
    """Return whether a server answers; it is asked past any proxy of the environment."""
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@dataclass(frozen=True)
class Answer:
    """What one request saw, in seconds and tokens; `tpot_s` is the mean time per token after the first."""

    asked: Ask
    ttft_s: float
    e2e_s: float
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int | None
    text: str

    @property
    def tpot_s(self) -> float:
        """Seconds per token after the first; those that came with the first one's text count as later ones."""
        return (self.e2e_s - self.ttft_s) / max(1, self.output_tokens - 1)


@dataclass(frozen=True)
class Run:
    """What a server answered to some requests, and the CPU seconds of the client and of the server in it."""

    answers: tuple[Answer, ...]
    wall_s: float
    client_cpu_s: float
    server_cpu_s: float


def run(client: Worker, server: Server, asks: Sequence[Ask], streams: int, **more: Any) -> Run:
    """Send requests to a server, `streams` at a time.

    Raises:
        WorkerFailed: one was not answered whole.
    """
    bodies = [server.body(ask, **more) for ask in asks]
    before = noise.cpu_ticks([server.process])
    told = client.ask("load", url=f"{server.url}/v1/completions", bodies=bodies, streams=streams)
    spent = (noise.cpu_ticks([server.process]) - before) / TICKS_PER_S
    answers = tuple(Answer(ask, **one) for ask, one in zip(asks, told["answers"], strict=True))
    return Run(answers, told["wall_s"], told["cpu_s"], spent)


def unlike(name: str, answers: Sequence[Answer], cached: bool = False) -> list[str]:
    """Return where answers are not what was asked for: by the tokens of prompts and answers, and of caches of prompts.

    `cached` says whether some of each prompt must come from the cache; else none may.
    """
    told = []
    for one in answers:
        if one.prompt_tokens != len(one.asked.prompt):
            told.append(f"{name} counts {one.prompt_tokens} tokens of a prompt of {len(one.asked.prompt)}")
        if one.output_tokens != one.asked.output:
            told.append(f"{name} answers with {one.output_tokens} tokens where {one.asked.output} are asked for")
        if bool(one.cached_tokens) is not cached:
            told.append(f"{name} took {one.cached_tokens} tokens of a prompt from its cache")
    return told
