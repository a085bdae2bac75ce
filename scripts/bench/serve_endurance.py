"""Let many clients use, leave and misuse one server, kill it on the way, and hold every answer against the loader's.

    python scripts/bench/serve_endurance.py MODEL -C CATALOG [--requests N] [--clients N] [--kills N] [--json]

Clients of the `openai` package ask for greedy completions of prompts whose answers the loader gave before, half of them
streamed. A fifth goes away at a random moment, a twentieth is malformed. The server is killed with SIGKILL `--kills`
times at even distances, and started again on the same port. What must hold: every finished answer is the loader's, what
a broken stream said is its beginning, every malformed request gets a 4xx in the API's form, and at the end nothing
runs, waits or holds memory for keys and values. Memory is the anonymous memory of the server's process tree after each
tenth of the requests of its last start.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

import httpx
import openai
from comparison.script import end, say
from comparison.watched import memory, tree

from llmbuild.errors import LlmbuildError
from llmbuild.report.rows import quantity
from llmbuild.runtime import host, load, reader

TEXTS = (
    "import os", "def main(", "class Node:", "for key in", "return self", "with open(", "if not", "raise ValueError",
    "    def __init__(self", "try:", "from typing import", "x = [", "while True:", "assert len(", "print(", "#",
)  # fmt: skip
BAD: tuple[dict[str, Any] | bytes, ...] = (
    b"{",
    b"[]",
    {"prompt": "x"},
    {"model": "no-such-model", "prompt": "x"},
    {"model": None, "prompt": "x"},
    {"model": "", "prompt": "x", "max_tokens": -1},
    {"model": "", "prompt": "x", "temperature": -1},
    {"model": "", "prompt": "x", "n": 10**7},
    {"model": "", "prompt": "x", "logprobs": 10**9},
    {"model": "", "prompt": "x" * 200_000},
    {"model": "", "prompt": [10**9]},
    {"model": "", "prompt": {"text": "x"}},
    {"model": "", "prompt": "x", "stop": ["a"] * 1000},
    {"model": "", "prompt": "x", "no_such_field": 1},
)
"""Bodies that no server can answer; `model` is put in where it is empty."""
STARTS_S, ENDS_S, SETTLES_S, ANSWER_S = 120.0, 60.0, 30.0, 120.0
"""Seconds that a start, a graceful end, the last sequences and one answer may take."""
LEFT, MALFORMED = 0.2, 0.05
NOTHING = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
"""What is 0 where nothing runs."""


class Server:
    """The command, as a process; its messages go to a file."""

    def __init__(self, model: str, catalog: Path, log: Path) -> None:
        self._command = [sys.executable, "-m", "llmbuild", "serve", model, "-C", str(catalog)]
        self._log, self.port = log, 0
        self._process: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, on the port that it had before."""
        with self._log.open("a") as messages:
            command = [*self._command, "--port", str(self.port)]
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=messages, text=True)
        assert self._process.stdout is not None
        said = self._process.stdout.readline()
        found = re.search(r":(\d+)", said)
        if found is None:
            raise LlmbuildError(f"the server did not start: {self._log.read_text().splitlines()[-1:]}")
        self.port = int(found[1])

    def kill(self) -> None:
        """Kill it."""
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def finish(self) -> int:
        """End it gracefully, and return its exit code."""
        assert self._process is not None
        self._process.terminate()
        return self._process.wait(ENDS_S)

    def memory_bytes(self) -> int:
        """Return the anonymous memory of the process and of what it started."""
        assert self._process is not None
        return sum(memory(number).get("RssAnon", 0) for number in tree(self._process.pid))


@dataclass
class Run:
    """What is asked, what came, and how far it is."""

    model: str
    answers: dict[str, str]
    wanted: int
    drawn: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    up: asyncio.Event = field(default_factory=asyncio.Event)
    begun: int = 0
    tokens: int = 0

    def next(self) -> int | None:
        """Return the number of the next request; None behind the last."""
        if self.begun >= self.wanted:
            return None
        self.begun += 1
        return self.begun


def answers_of(model: str, catalog: Path, output: int) -> tuple[str, dict[str, str]]:
    """Return the variant, and the loader's greedy answers to prompts of one text and of two."""
    with load(catalog, model) as found:
        prompts = [*TEXTS, *(f"{a}\n{b}" for a in TEXTS[:6] for b in TEXTS[6:12])]
        return str(found.row["variant"]), {text: "".join(found.generate(text, output)) for text in prompts}


async def client(run: Run, api: openai.AsyncOpenAI, raw: httpx.AsyncClient, output: int) -> None:
    """Ask until there is nothing more to ask; wait while the server is down."""
    while run.next() is not None:
        await run.up.wait()
        kind = run.drawn.random()
        try:
            if kind < MALFORMED:
                await malformed(run, raw)
            else:
                await asks(run, api, output, leaves=kind < MALFORMED + LEFT)
        except (openai.APIConnectionError, openai.APITimeoutError, httpx.HTTPError):
            run.counts["broken by a kill"] += 1
            await asyncio.sleep(0.05)
        except openai.InternalServerError as error:
            run.counts[f"refused with {error.status_code}"] += 1


async def malformed(run: Run, raw: httpx.AsyncClient) -> None:
    """Send what cannot be answered."""
    body = run.drawn.choice(BAD)
    if isinstance(body, dict):
        body = json.dumps({**body, "model": run.model} if body.get("model") == "" else body).encode()
    said = await raw.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    run.counts["malformed"] += 1
    told = said.json() if "json" in said.headers.get("content-type", "") else {}
    if not 400 <= said.status_code < 500 or "message" not in told.get("error", {}):
        run.wrong.append(f"{body[:80]!r} was answered with {said.status_code} {said.text[:200]}")


async def asks(run: Run, api: openai.AsyncOpenAI, output: int, leaves: bool) -> None:
    """Ask for one answer, and hold what comes against the loader's."""
    prompt = run.drawn.choice(list(run.answers))
    wanted, streamed = run.answers[prompt], run.drawn.random() < 0.5
    asked: dict[str, Any] = {"model": run.model, "prompt": prompt, "max_tokens": output, "temperature": 0}
    if not streamed:
        answer = asyncio.create_task(api.completions.create(**asked))
        if leaves:
            await asyncio.wait([answer], timeout=run.drawn.expovariate(50))
            if not answer.done():
                answer.cancel()
                await asyncio.wait([answer])
                run.counts["left"] += 1
                return
        whole = await answer
        ended(run, prompt, wanted, whole.choices[0].text, whole.usage.completion_tokens if whole.usage else 0)
        return
    after = run.drawn.randrange(1, output) if leaves else output + 2
    text, chunks, tokens, finished = "", 0, 0, False
    try:
        usage = {"include_usage": True}
        async with await api.completions.create(**asked, stream=True, stream_options=usage) as stream:
            async for chunk in stream:
                chunks, tokens = chunks + 1, chunk.usage.completion_tokens if chunk.usage else tokens
                for choice in chunk.choices:
                    text, finished = text + choice.text, finished or choice.finish_reason is not None
                if chunks >= after and not finished:
                    break
    finally:
        if not wanted.startswith(text):
            run.wrong.append(f"{prompt!r}: {text!r} is no beginning of {wanted!r}")
    if finished:
        ended(run, prompt, wanted, text, tokens)
    elif leaves:
        run.counts["left"] += 1
    else:
        run.wrong.append(f"{prompt!r}: a stream ended without a reason behind {text!r}")


def ended(run: Run, prompt: str, wanted: str, text: str, count: int) -> None:
    """Take a finished answer."""
    run.counts["answered"] += 1
    run.tokens += count
    if text != wanted:
        run.wrong.append(f"{prompt!r}: {text!r} instead of {wanted!r}")


async def kills(run: Run, server: Server, count: int, held: list[int]) -> None:
    """Kill the server at even distances and start it again; note its memory after each tenth behind its last start."""
    for number in range(1, count + 1):
        while run.begun < run.wanted * number // (count + 1):
            await asyncio.sleep(0.02)
        run.up.clear()
        say(f"killed behind request {run.begun}")
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.start)
        run.up.set()
    behind = run.begun
    for tenth in range(1, 10):
        while run.begun < behind + (run.wanted - behind) * tenth // 10:
            await asyncio.sleep(0.02)
        held.append(server.memory_bytes())


async def settled(raw: httpx.AsyncClient) -> dict[str, float]:
    """Return what still runs, waits or is held once nothing does, or at the latest after a while."""
    until, found = monotonic() + SETTLES_S, {"": 1.0}
    while any(found.values()) and monotonic() < until:
        text = (await raw.get("/metrics")).text
        lines = [line for line in text.splitlines() if line.startswith(NOTHING)]
        found = {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in lines}
        await asyncio.sleep(0.1)
    return found


async def everything(asked: argparse.Namespace, server: Server, run: Run) -> dict[str, Any]:
    """Run all clients against the server."""
    held: list[int] = []
    begin = monotonic()
    async with (
        openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0, timeout=ANSWER_S) as api,
        httpx.AsyncClient(base_url=server.url, timeout=ANSWER_S) as raw,
    ):
        run.up.set()
        clients = [client(run, api, raw, asked.output) for _ in range(asked.clients)]
        await asyncio.gather(kills(run, server, asked.kills, held), *clients)
        taken = monotonic() - begin
        left = await settled(raw)
        held.append(server.memory_bytes())
    return {"seconds": taken, "left": left, "memory_bytes": held}


def document(asked: argparse.Namespace) -> dict[str, Any]:
    """Run everything and return it as one document."""
    say("the loader answers")
    variant, answers = answers_of(asked.model, Path(asked.catalog), asked.output)
    with TemporaryDirectory(prefix="llmbuild-bench-") as name:
        log = Path(name) / "log"
        server = Server(asked.model, Path(asked.catalog), log)
        server.start()
        run = Run(asked.model, answers, asked.requests, random.Random(asked.seed))
        try:
            found = asyncio.run(everything(asked, server, run))
        except BaseException:
            server.kill()
            raise
        code, said = server.finish(), log.read_text()
    return {
        "machine": host.machine().describe(),
        "model": asked.model,
        "variant": variant[:12],
        "requests": run.begun,
        "clients": asked.clients,
        "kills": asked.kills,
        "counts": dict(sorted(run.counts.items())),
        "tokens": run.tokens,
        "wrong": run.wrong,
        "tracebacks": said.count("Traceback"),
        "exit": code,
        **found,
    }


def text(made: dict[str, Any]) -> str:
    """Return what happened, in lines."""
    memory = " ".join(f"{each / 1e6:.0f}" for each in made["memory_bytes"])
    held = ", ".join(f"{name} {value:g}" for name, value in made["left"].items())
    return "\n".join(
        [
            f"{made['machine']}; {made['model']} {made['variant']}",
            f"{made['requests']} requests of {made['clients']} clients in {quantity(made['seconds'], 's')}, "
            f"{made['kills']} kills",
            "; ".join(f"{name}: {count}" for name, count in made["counts"].items()),
            f"{made['tokens']} tokens of finished answers; wrong or lost: {len(made['wrong'])}",
            f"held at the end: {held}",
            f"memory after each tenth, in MB: {memory}",
            f"tracebacks: {made['tracebacks']}; exit code {made['exit']}",
            *made["wrong"][:10],
        ]
    )


def main() -> int:
    """Print what happened; 1 where something that must hold does not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="pystdlib")
    parser.add_argument("-C", "--catalog", default=reader.default_location())
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--output", type=int, default=24, help="tokens of an answer at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    made = document(asked)
    print(json.dumps(made) if asked.json else text(made))
    bad = made["wrong"] or made["tracebacks"] or made["exit"] or any(made["left"].values())
    return 1 if bad else 0


if __name__ == "__main__":
    end(main)
