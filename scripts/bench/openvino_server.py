"""OpenVINO GenAI's continuous batching behind HTTP, in the peers' environment: it has no server of its own.

    PYTHON scripts/bench/openvino_server.py FOLDER --sequences N --context TOKENS --threads N [--port N]

FOLDER has OpenVINO IR and the tokenizer of a model, as `openvino_model.py` writes them. POST /v1/completions takes
token ids and answers as OpenAI's API does, greedy, streamed, with forced lengths: what `http_client.py` asks. The HTTP
stack is that of `llmbuild serve`. Keys and values are in f16, for N sequences of so many tokens; prompts that begin
alike share nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from transformers import AutoTokenizer

BLOCK = 32
"""Positions of a block of OpenVINO's cache on a CPU."""
BATCHED = 256
"""Tokens of a step at most: its own default."""


@dataclass
class Asked:
    """One request: what it asks, and where its tokens go."""

    tokens: list[int]
    count: int
    loop: asyncio.AbstractEventLoop
    came: asyncio.Queue[list[int]] = field(default_factory=asyncio.Queue)
    handle: Any = None
    given: int = 0


class Pipeline:
    """The pipeline, which one thread owns."""

    def __init__(self, folder: Path, sequences: int, context: int, threads: int) -> None:
        import openvino_genai as genai

        plan = genai.SchedulerConfig()
        plan.num_kv_blocks = sequences * -(-context // BLOCK)
        plan.max_num_seqs, plan.max_num_batched_tokens = sequences, BATCHED
        plan.dynamic_split_fuse, plan.enable_prefix_caching = True, False
        properties = {"INFERENCE_NUM_THREADS": threads, "KV_CACHE_PRECISION": "f16"}
        self._pipeline = genai.ContinuousBatchingPipeline(str(folder), plan, "CPU", properties)
        self._changed, self._new, self._number = threading.Condition(), list[Asked](), 0
        threading.Thread(target=self._run, daemon=True).start()

    def ask(self, asked: Asked) -> None:
        """Take a request, from any thread."""
        with self._changed:
            self._new.append(asked)
            self._changed.notify()

    def _run(self) -> None:
        running: list[Asked] = []
        while True:
            with self._changed:
                while not self._new and not running:
                    self._changed.wait()
                new, self._new = self._new, []
            for one in new:
                one.handle = self._begun(one)
            running += new
            self._pipeline.step()
            running = [one for one in running if not self._told(one)]

    def _begun(self, one: Asked) -> Any:
        import openvino as ov
        import openvino_genai as genai

        wanted = genai.GenerationConfig()
        wanted.max_new_tokens = wanted.min_new_tokens = one.count
        wanted.do_sample, wanted.ignore_eos, wanted.eos_token_id = False, True, -1
        self._number += 1
        return self._pipeline.add_request(self._number, ov.Tensor(np.array([one.tokens], np.int64)), wanted)

    @staticmethod
    def _told(one: Asked) -> bool:
        """Hand on what came of a request; return whether it has ended."""
        while one.handle.can_read():
            for output in one.handle.read().values():
                one.given += len(output.generated_ids)
                one.loop.call_soon_threadsafe(one.came.put_nowait, list(output.generated_ids))
        return one.given >= one.count


def application(folder: Path, pipeline: Pipeline) -> Starlette:
    """Return the routes."""
    tokenizer = AutoTokenizer.from_pretrained(folder)

    async def completions(request: Request) -> Response:
        body = await request.json()
        asked = Asked(body["prompt"], body["max_tokens"], asyncio.get_running_loop())
        pipeline.ask(asked)
        return StreamingResponse(_events(asked), media_type="text/event-stream")

    async def _events(asked: Asked) -> AsyncIterator[bytes]:
        given = 0
        while given < asked.count:
            tokens = await asked.came.get()
            given += len(tokens)
            choice = {"index": 0, "text": tokenizer.decode(tokens), "finish_reason": None}
            yield _event({"object": "text_completion", "choices": [choice], "usage": None})
        usage = {"prompt_tokens": len(asked.tokens), "completion_tokens": given}
        yield _event({"object": "text_completion", "choices": [], "usage": usage}) + b"data: [DONE]\n\n"

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    return Starlette(routes=[Route("/v1/completions", completions, methods=["POST"]), Route("/health", health)])


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


def main() -> None:
    """Serve until the process is ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for name in ("sequences", "context", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--port", type=int, default=0)
    asked = parser.parse_args()
    routes = application(asked.folder, Pipeline(asked.folder, asked.sequences, asked.context, asked.threads))
    listener = socket.socket()
    listener.bind(("127.0.0.1", asked.port))
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    config = uvicorn.Config(routes, log_config=None, access_log=False, lifespan="off")
    asyncio.run(uvicorn.Server(config).serve(sockets=[listener]))


if __name__ == "__main__":
    main()
