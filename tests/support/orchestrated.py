"""Running orchestrators, and clients that keep how each of their requests ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from llmbuild.fleet.actuators.journal import Entry, Journal, runs


def waited(true: Callable[[], bool], most_s: float = 20.0) -> None:
    """Wait until something is true."""
    until = time.monotonic() + most_s
    while not true():
        assert time.monotonic() < until
        time.sleep(0.02)


@dataclass
class Orchestrator:
    """A running command."""

    process: subprocess.Popen[str]
    journal: Journal
    url: str = ""
    lines: list[str] = field(default_factory=list)

    def entries(self, count: int = 2) -> list[Entry]:
        """Return what runs, once as many replicas are written down."""
        waited(lambda: len([one for one in self.journal.read() if runs(one)]) == count)
        return list(self.journal.read())

    def serving(self, replicas: int) -> None:
        """Wait until so many replicas take requests."""
        with httpx.Client(base_url=self.url, timeout=5, trust_env=False) as client:
            waited(lambda: client.get("/v1/models").json()["data"][0]["replicas"] == replicas)

    def said(self, text: str) -> bool:
        """Return whether a line of its log has a text."""
        return any(text in line for line in self.lines)


@contextlib.contextmanager
def orchestrated(
    words: Sequence[object], state: Path, replicas: int = 2, cwd: Path | None = None
) -> Iterator[Orchestrator]:
    """Run a command in a folder until the block ends; whatever fails in it, no process is left."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(list(map(str, words)), **pipes, text=True, cwd=cwd) as process:
        assert process.stdout is not None and process.stderr is not None
        found = Orchestrator(process, Journal(state))
        reader = threading.Thread(target=lambda: found.lines.extend(process.stderr or ()))
        reader.start()
        try:
            found.url = process.stdout.readline().strip()
            assert found.url.startswith("http://127.0.0.1:"), found.lines
            found.serving(replicas)
            yield found
        except BaseException:
            process.kill()
            for pid in found.journal.marked().values():
                os.kill(pid, signal.SIGKILL)
            raise
        finally:
            if process.poll() is None:
                process.terminate()
            process.wait(60)
            reader.join(60)


class Client(threading.Thread):
    """Asks again and again until it is over, and keeps how each request ended."""

    def __init__(self, url: str, model: str, tokens: int = 10) -> None:
        super().__init__()
        self.url, self.model, self.tokens = url, model, tokens
        self.ends, self.over = list[str](), threading.Event()
        self.begun = 0
        """Requests whose answers have begun."""
        self.start()

    def run(self) -> None:
        """Ask."""
        with httpx.Client(base_url=self.url, timeout=30, trust_env=False) as client:
            while not self.over.is_set():
                self.ends.append(asked(client, self.model, self.tokens, self._begin))

    def _begin(self) -> None:
        self.begun += 1


def all_ends(clients: Sequence[Client]) -> list[str]:
    """End clients, and return how all their requests ended."""
    for one in clients:
        one.over.set()
    for one in clients:
        one.join(30)
    return [end for one in clients for end in one.ends]


def asked(client: httpx.Client, model: str, tokens: int = 10, begin: Callable[[], None] = lambda: None) -> str:
    """Return how a request ended: `done`, an error's code, or what it broke with; call `begin` at its first bytes."""
    body = {"model": model, "prompt": "def push", "max_tokens": tokens, "stream": True, "ignore_eos": True}
    data = b""
    try:
        with client.stream("POST", "/v1/completions", json=body) as answer:
            for piece in answer.iter_bytes():
                if not data:
                    begin()
                data += piece
    except httpx.HTTPError as error:
        return repr(error)
    *events, last = data.decode().strip().split("\n\n")
    if answer.status_code != 200:
        return str(json.loads(data)["error"]["code"])
    if last != "data: [DONE]":
        return str(json.loads(last.removeprefix("data: "))["error"]["code"])
    choices = [json.loads(one[6:])["choices"][0] for one in events]
    ends = [one["finish_reason"] for one in choices if one["finish_reason"]]
    return "done" if len(ends) <= 1 and choices else f"ends: {ends}"


def kill_amid(found: Orchestrator, victim: Entry, clients: list[Client]) -> None:
    """Stop a replica so that requests of more clients come to it and are not begun, then kill it, and wait until that
    was noticed.
    """
    waited(lambda: sum(len(one.ends) for one in clients) > 20)
    os.kill(victim.pid, signal.SIGSTOP)
    clients += [Client(found.url, one.model) for one in clients]
    time.sleep(0.5)
    os.kill(victim.pid, signal.SIGKILL)
    waited(lambda: victim.name not in {one.name for one in found.journal.read()})
