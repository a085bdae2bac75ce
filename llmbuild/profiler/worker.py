"""The process that runs one artifact: JSON requests on stdin, one JSON answer a line on stdout.

open     {artifact, parameters, abi, driver, workers, times}   -> load_s samples
check    {data}                                                -> errors against PyTorch on the same weights
quality  {data}                                                -> KL, top-1 and perplexity against the f32 model
round    {prompt, output}                                      -> ttft_s, tpot_s, e2e_s, energy_j of one answer
memory   {}                                                    -> peak resident bytes so far
limits   {artifact, read_bytes, functions, seconds}            -> seconds of the machine's limit kernels
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmbuild.errors import LlmbuildError
from llmbuild.profiler import limits
from llmbuild.profiler.energy import rapl
from llmbuild.runtime.session import Session, Settings
from llmbuild.spec.program import abi_from

QUALITY_PROMPT = 8
"""Tokens of each quality window that go through prefill; the rest go through decode one by one."""

COME_BACK_S = 0.05
"""Untimed work before each timed answer, in seconds, one answer at most."""


class Worker:
    """One artifact, opened once for measuring."""

    def __init__(self) -> None:
        self._session: Session | None = None
        self._meter = rapl()

    @property
    def session(self) -> Session:
        """The opened artifact."""
        if self._session is None:
            raise LlmbuildError("nothing is open")
        return self._session

    def open(self, request: dict[str, Any]) -> dict[str, Any]:
        """Open the artifact `times` times; the last one stays."""
        seconds = []
        for _ in range(request["times"]):
            self._session = None
            begin = perf_counter()
            self._session = Session(
                Path(request["artifact"]),
                Path(request["parameters"]),
                abi_from(request["abi"]),
                Settings(request["driver"], request["workers"]),
            )
            seconds.append(perf_counter() - begin)
        return {"load_s": seconds}

    def check(self, request: dict[str, Any]) -> dict[str, Any]:
        """Compare logits with PyTorch's on the same weights: error over the size of the logits, root mean square."""
        with np.load(request["data"]) as data:
            prompt, forced, expected, noise = data["prompt"], data["forced"], data["logits"], float(data["noise"])
        actual = self._forced(prompt, forced)
        scale = float(np.sqrt(np.mean(np.square(expected, dtype=np.float64)))) or 1.0
        error = float(np.sqrt(np.mean(np.square(actual.astype(np.float64) - expected))))
        return {
            "finite": bool(np.isfinite(actual).all()),
            "error": error / scale,
            "noise": noise,
            "top1": float(np.mean(actual.argmax(-1) == expected.argmax(-1))),
        }

    def quality(self, request: dict[str, Any]) -> dict[str, Any]:
        """Score held-out windows teacher-forced, through prefill for the first tokens and decode for the rest."""
        with np.load(request["data"]) as data:
            windows, reference = data["tokens"], data["logits"]
        kl, agree, loss = [], [], []
        for tokens, expected in zip(windows, reference, strict=True):
            prompt, forced = tokens[:QUALITY_PROMPT], tokens[QUALITY_PROMPT:-1]
            actual = log_softmax(self._forced(prompt, forced))
            wanted = log_softmax(expected[QUALITY_PROMPT - 1 : -1])
            kl.append(np.sum(np.exp(wanted) * (wanted - actual), axis=-1))
            agree.append(actual.argmax(-1) == wanted.argmax(-1))
            loss.append(-actual[np.arange(len(actual)), tokens[QUALITY_PROMPT:]])
        return {
            "quality_kl": max(0.0, float(np.mean(np.concatenate(kl)))),
            "quality_top1": float(np.mean(np.concatenate(agree))),
            "quality_perplexity": float(np.exp(np.mean(np.concatenate(loss)))),
        }

    def round(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer once: prefill, then decode its own greedy tokens; seconds on a monotonic clock, joules if counted."""
        session, prompt, output = self.session, request["prompt"], request["output"]
        self._come_back(prompt, output)
        counted = self._meter.read()
        begin = perf_counter()
        token = session.prefill(prompt)
        first = perf_counter()
        for step in range(output - 1):
            token = session.decode(token, len(prompt) + step)
        end = perf_counter()
        return {
            "ttft_s": first - begin,
            "tpot_s": (end - first) / (output - 1) if output > 1 else 0.0,
            "e2e_s": end - begin,
            "energy_j": self._meter.joules(counted, self._meter.read()),
        }

    def _come_back(self, prompt: list[int], output: int) -> None:
        """Work untimed for a moment: others have had the caches since this process last ran.

        Without it a model that fits the last-level cache looks up to twice as slow in turns as it is alone.
        """
        end = perf_counter() + COME_BACK_S
        token = self.session.prefill(prompt)
        for step in range(output - 1):
            if perf_counter() >= end:
                return
            token = self.session.decode(token, len(prompt) + step)

    def memory(self, _: dict[str, Any]) -> dict[str, Any]:
        """Return the peak resident set of this process."""
        match = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        return {"peak_memory_bytes": int(match[1]) * 1024 if match else None}

    def _forced(self, prompt: NDArray[Any], forced: NDArray[Any]) -> NDArray[np.float32]:
        """Return f32[1 + len(forced), V]: the logits after the prompt and after each forced token."""
        session = self.session
        session.prefill(prompt)
        rows = [session.logits()]
        for step, token in enumerate(forced):
            session.decode(int(token), len(prompt) + step)
            rows.append(session.logits())
        return np.stack(rows)


def log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Return the log-probabilities over the last axis, in f64."""
    x = logits.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(-1, keepdims=True)))


def main() -> None:
    """Answer requests until stdin ends, which it also does when the parent dies."""
    worker = Worker()
    verbs: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        name: getattr(worker, name) for name in ("open", "check", "quality", "round", "memory")
    }
    verbs["limits"] = limits.run
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = verbs[request.pop("verb")](request)
        except LlmbuildError as error:
            answer = {"refused": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
