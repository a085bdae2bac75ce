"""Servers pinned to cores as the local backend pins them, clients on the same cores, and what came in percentiles."""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from math import ceil, inf
from pathlib import Path
from typing import Any

from comparison.watched import cpu_s
from llmbuild.catalog.schema import FILE
from llmbuild.errors import InputError
from llmbuild.fleet.actuators import local
from llmbuild.process.child import environment, python, stop_group
from llmbuild.serve.drive import Heard, Sending

PINNED = Path(local.__file__).with_name("pinned.py")
READY_S, AFTER_S = 120.0, 60.0
"""Seconds for a server to be ready, and for answers after the last arrival."""
_SUM = re.compile(r"^llmbuild:(step|host)_seconds_(sum|count)\{[^}]*\} (\S+)$", re.MULTILINE)


def pinned(core: int, *words: object) -> list[str]:
    """Return the command that runs a module or script on one core, as the local backend does."""
    return python(str(PINNED), str(core), *map(str, words))


@dataclass(frozen=True)
class Place:
    """A variant of a model that one core serves, and how many sequences run at a time at most."""

    core: int
    catalog: Path
    model: str
    variant: str
    sequences: int

    @property
    def name(self) -> str:
        """Return it in words."""
        return f"{self.model}/{self.variant[:12]} x{self.sequences} on core {self.core}"

    def profiling(self, budget: str) -> list[str]:
        """Return the command that measures its load curve on its core."""
        words = ("llmbuild", "profile", self.variant, "--load", "--budget", budget, "--sequences", self.sequences)
        return pinned(self.core, *words, "-C", self.catalog.resolve())

    def serving(self) -> list[str]:
        """Return the command that serves it on its core."""
        words = ("llmbuild", "serve", self.model, "-C", self.catalog.resolve(), "--variant", self.variant)
        return pinned(self.core, *words, "--max-sequences", self.sequences, "--port", 0)


def copied(catalog: Path, into: Path) -> Path:
    """Return a copy of a catalog that shares its blobs by links where the file system can: what is measured for a
    comparison does not stand in for what is in the catalog.
    """

    def linked(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)

    into.mkdir(parents=True)
    shutil.copytree(catalog / "blobs", into / "blobs", copy_function=linked)
    made = sqlite3.connect(f"file:{(catalog / FILE).resolve()}?mode=ro", uri=True)
    with closing(made) as source, closing(sqlite3.connect(into / FILE)) as target:
        source.backup(target)
    return into


@dataclass(frozen=True)
class Server:
    """A place that answers."""

    place: Place
    url: str
    process: int

    @property
    def cpu_s(self) -> float:
        """Return the CPU seconds that it has taken."""
        return cpu_s(self.process)

    def steps(self) -> dict[str, float]:
        """Return how many steps there were, and the seconds of the device and of the engine in them, so far."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"{self.url}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        return {f"{what}_{kind}": float(value) for what, kind, value in _SUM.findall(text)}


@contextmanager
def serving(places: Sequence[Place]) -> Iterator[list[Server]]:
    """Serve on all places, and end it with the block.

    Raises:
        InputError: one does not answer.
    """
    with ExitStack() as held:
        begun = [(place, held.enter_context(_process(place))) for place in places]
        yield [Server(place, _address(place, *one), one[0].pid) for place, one in begun]


@contextmanager
def _process(place: Place) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    with tempfile.TemporaryDirectory() as name:
        told = Path(name) / "log"
        with told.open("wb") as log:
            process = subprocess.Popen(
                place.serving(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment(),
                cwd="/",
                start_new_session=True,
            )
        try:
            yield process, told
        finally:
            stop_group(process)


def _address(place: Place, process: subprocess.Popen[bytes], log: Path) -> str:
    """Return the address that a server prints once it answers."""
    end = time.monotonic() + READY_S
    while time.monotonic() < end and process.poll() is None:
        if found := re.search(r"^http://\S+$", log.read_text(errors="replace"), re.MULTILINE):
            return found[0]
        time.sleep(0.05)
    raise InputError(f"{place.name} does not answer: {log.read_text(errors='replace')[-500:]}")


@dataclass(frozen=True)
class Seen:
    """What came of the requests to one server, the CPU seconds of its client and its own, and its steps."""

    heard: tuple[Heard, ...]
    seconds: float
    client_cpu_s: float
    server_cpu_s: float
    steps: Mapping[str, float]


def driven(servers: Sequence[Server], sends: Sequence[Sequence[Sending]], seed: int) -> list[Seen]:
    """Send requests to all servers at the same time, those to each by a client on its core.

    Raises:
        InputError: a client failed.
    """
    begin = time.time() + 2.0
    before = [(one.cpu_s, one.steps()) for one in servers]
    clients = []
    for server, some in zip(servers, sends, strict=True):
        asked = {"url": server.url, "model": server.place.model, "sends": some, "after_s": AFTER_S}
        client = subprocess.Popen(
            pinned(server.place.core, "llmbuild.serve.drive"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(),
            text=True,
        )
        assert client.stdin is not None
        client.stdin.write(json.dumps({**asked, "begin": begin, "seed": seed}))
        client.stdin.close()
        clients.append(client)
    told = [client.stdout.read() for client in clients if client.stdout is not None]
    if sum(client.wait() != 0 for client in clients):
        raise InputError("a client failed: what it said is above")
    found = []
    for server, text, (cpu, steps) in zip(servers, told, before, strict=True):
        body: dict[str, Any] = json.loads(text)
        heard = tuple(Heard(**{**one, "came_s": tuple(one["came_s"])}) for one in body["heard"])
        after = {name: value - steps.get(name, 0.0) for name, value in server.steps().items()}
        found.append(Seen(heard, body["seconds"], body["cpu_s"], server.cpu_s - cpu, after))
    return found


def percentiles(values: Sequence[float]) -> list[float]:
    """Return the 50th, 95th and 99th percentile; infinite without values."""
    ordered = sorted(values) or [inf]
    return [ordered[min(len(ordered) - 1, ceil(share * len(ordered)) - 1)] for share in (0.5, 0.95, 0.99)]
