"""The process that runs one artifact: JSON requests on stdin, one JSON answer a line on stdout.

open     {artifact, parameters, abi, driver, workers, times}   -> load_s samples
check    {data}                                                -> errors against PyTorch on the same weights
quality  {data}                                                -> KL, top-1 and perplexity against the f32 model
round    {prompts, output, seconds, settled, alone}            -> ttft_s, tpot_s, gap_s of each answer in that time
meter    {}                                                    -> the energy meter's source, boundary, step_s, reason
energy   {prompts, output, steps}                              -> joules, seconds, tokens of answers in one window
idle     {steps}                                               -> joules, seconds of waiting in one window
memory   {}                                                    -> peak resident bytes so far
load     {sequences, contexts, cells}                          -> seconds of one visit to each cell, in order
load_energy {sequences, contexts, cell, steps}                 -> joules, seconds of such steps in one window
limits   {artifact, read_bytes, functions, seconds}            -> seconds of the machine's limit kernels
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from time import monotonic, perf_counter, sleep
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmbuild.errors import InputError, LlmbuildError
from llmbuild.process.child import say
from llmbuild.profiler import limits
from llmbuild.profiler.budget import COME_BACK_S as LEARN_S
from llmbuild.profiler.budget import SLOW_PROMPT_S
from llmbuild.profiler.divergence import Divergence, mapped
from llmbuild.profiler.load_steps import LoadSteps
from llmbuild.profiler.meters.energy import Found, find
from llmbuild.profiler.meters.meter import Absent, Meter, Window, window_s
from llmbuild.runtime.session import Session, Settings
from llmbuild.spec.program import abi_from
from llmbuild.system.strict_json import JsonObject

QUALITY_PROMPT = 8
"""Tokens of each quality window before the first scored one. Without `score`, prefill processes them, and decode the
rest one by one."""

LEARN_STEPS = 16
"""Untimed decode steps before each timed answer; fewer are enough after `LEARN_S`."""

SLOW_OPEN_S = 2.0
"""Seconds of an opening after which two are enough."""

COME_BACK_S = 0.05
"""Maximum seconds of untimed work before each timed answer; at most one answer."""


@dataclass(frozen=True)
class Calls:
    """The session calls for the first tokens after prompts of `length`, and for the later ones at a position.

    One sequence uses the calls of a single user, a batch the batch calls.
    """

    length: int
    first: Callable[[], Any]
    later: Callable[[Any, int], Any]
    any: Any
    """Tokens to decode where no prompt is answered first."""

    @staticmethod
    def of(session: Session, prompts: list[list[int]]) -> Calls:
        """Return the calls for prompts of equal length, one for each sequence."""
        length, batch = len(prompts[0]), np.asarray(prompts, np.int64)
        if len(prompts) == 1:
            return Calls(length, lambda: session.prefill(prompts[0]), session.decode, prompts[0][-1])
        return Calls(length, lambda: session.prefill_batch(batch), session.decode_batch, batch[:, -1])


class Worker:
    """One artifact, opened once for measuring. One class: every request is about what one of them opened."""

    def __init__(self) -> None:
        self._session: Session | None = None
        self._driver, self._meters = "", tuple[str, ...]()
        self._found: Found | None = None
        self._load: LoadSteps | None = None
        self._first_s = 0.0
        """Seconds of the last timed prefill."""

    @property
    def session(self) -> Session:
        """The opened artifact."""
        if self._session is None:
            raise LlmbuildError("nothing is open")
        return self._session

    def open(self, request: JsonObject) -> dict[str, object]:
        """Open the artifact `times` times, twice where that takes long; the last one stays open."""
        seconds: list[float] = []
        self._driver, self._meters = request["driver"], tuple(request["meters"])
        while len(seconds) < request["times"] and (len(seconds) < 2 or max(seconds) <= SLOW_OPEN_S):
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

    def check(self, request: JsonObject) -> dict[str, object]:
        """Compare logits with PyTorch's on the same weights: RMS error over the RMS of the logits, of each way."""
        with np.load(request["data"]) as data:
            found = {name: data[name] for name in data.files}
        batch = self.session.abi.batch
        prompt, forced = (found[name].reshape(batch, -1) for name in ("prompt", "forced"))
        start = found.get("start", np.full(batch, prompt.shape[1]))
        ways = [_compared(found, self._forced(prompt, forced, start))]
        alone = prompt[0], forced[0], int(start.reshape(-1)[0])
        if self.session.abi.score:
            ways.append(_compared(found, self._scored(*alone)))
        if self.session.abi.page:
            ways.append(_compared(found, self._stepped(*alone)))
        told = max(ways, key=lambda one: (not one["finite"], one["error"]))
        return {**told, "noise": float(found["noise"])}

    def quality(self, request: JsonObject) -> dict[str, object]:
        """Score held-out windows teacher-forced: each in one call where the program has `score`."""
        data, found = mapped(Path(request["data"])), Divergence()
        windows = np.array(data["tokens"], np.int64)
        for tokens, expected, actual in zip(windows, data["logits"], self._windows(windows), strict=True):
            found.add(expected[QUALITY_PROMPT - 1 : -1], actual, tokens[QUALITY_PROMPT:])
        return dict(found.readings())

    def round(self, request: JsonObject) -> dict[str, object]:
        """Answer for `seconds`, at least once: prefill, then decode its own greedy tokens; return all times.

        An answer `alone` decodes without a prompt, and has no seconds to the first token. A `settled` worker needs no
        untimed work first.
        """
        calls, output, alone = Calls.of(self.session, request["prompts"]), request["output"], request["alone"]
        if not request["settled"]:
            self._warm_caches(calls, output, alone or self._first_s > SLOW_PROMPT_S)
        end = perf_counter() + request["seconds"]
        answers = [self._answer(calls, output, alone)]
        while perf_counter() < end:
            answers.append(self._answer(calls, output, alone))
        return {"answers": answers}

    def _answer(self, calls: Calls, output: int, alone: bool) -> dict[str, object]:
        """Answer once; seconds on a monotonic clock."""
        ticks, position = [0.0] * output, calls.length
        begin = perf_counter()
        token = calls.any if alone else calls.first()
        ticks[0] = perf_counter()
        for step in range(output - 1):
            token = calls.later(token, position + step)
            ticks[step + 1] = perf_counter()
        if not alone:
            self._first_s = ticks[0] - begin
        return {
            "ttft_s": None if alone else ticks[0] - begin,
            "tpot_s": (ticks[-1] - ticks[0]) / (output - 1) if output > 1 else 0.0,
            "gap_s": [b - a for a, b in pairwise(ticks)],
        }

    def meter(self, _: JsonObject) -> dict[str, object]:
        """Find the meter of the artifact's device, and why a better one is missing."""
        self._found = self._found or find(self._driver, measure_step=True, meters=self._meters)
        meter = self._found.meter
        if meter is None:
            return {"source": None, "reason": self._found.reason}
        return {
            "source": meter.source,
            "boundary": meter.boundary,
            "step_s": meter.step_s,
            "reason": self._found.reason,
            **meter.conditions(),
        }

    def energy(self, request: JsonObject) -> dict[str, object]:
        """Answer repeatedly in one window of at least `steps` updates of the meter."""
        calls, output = Calls.of(self.session, request["prompts"]), request["output"]
        self._warm_caches(calls, output, self._first_s > SLOW_PROMPT_S)
        tokens = 0

        def answer() -> None:
            nonlocal tokens
            token = calls.first()
            for step in range(output - 1):
                token = calls.later(token, calls.length + step)
            tokens += output * self.session.abi.batch

        return {**self._metered(request["steps"], answer), "tokens": tokens}

    def idle(self, request: JsonObject) -> dict[str, object]:
        """Wait in one window: the idle power."""
        return self._metered(request["steps"], lambda: sleep(0.02))

    def load(self, request: JsonObject) -> dict[str, object]:
        """Visit kinds of steps of a server, each once."""
        steps = self._steps(request)
        return {"seconds": [steps.visit(pieces) for pieces in request["cells"]]}

    def load_energy(self, request: JsonObject) -> dict[str, object]:
        """Run steps of one kind in one window of at least `steps` updates of the meter."""
        steps = self._steps(request)
        return self._metered(request["steps"], lambda: steps.run(request["cell"]))

    def _steps(self, request: JsonObject) -> LoadSteps:
        self._load = self._load or LoadSteps(self.session, request["sequences"], request["contexts"])
        return self._load

    def _metered(self, steps: int, work: Callable[[], object]) -> dict[str, object]:
        meter = self._found.meter if self._found else None
        if meter is None:
            raise LlmbuildError("no energy meter was found")
        window, end = meter.window(), monotonic() + window_s(meter, steps)
        while monotonic() < end:
            work()
            window.keep()
        return _energy_reading(meter, window)

    def _warm_caches(self, calls: Calls, output: int, alone: bool) -> None:
        """Work untimed for a moment: other processes have used the caches since this process last ran.

        Without it, a model that fits the last-level cache measures up to twice as slow in interleaved rounds as alone;
        the session also has to measure a step's duration each time that it is opened. A slow prefill is no warmer for
        one before it, so that decoding `alone` is enough.
        """
        begin = perf_counter()
        token = calls.any if alone else calls.first()
        for step in range(output - 1):
            passed = perf_counter() - begin
            if passed >= COME_BACK_S and (step >= LEARN_STEPS or passed >= LEARN_S):
                return
            token = calls.later(token, calls.length + step)

    def memory(self, _: JsonObject) -> dict[str, object]:
        """Return the peak resident set of this process."""
        match = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        return {"peak_memory_bytes": int(match[1]) * 1024 if match else None}

    def _forced(
        self, prompts: NDArray[np.int64], forced: NDArray[np.int64], start: int | NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Return logits f32[1+D,B,V] after prompts i64[B,P] and each of the forced tokens i64[B,D] from `start` on."""
        session = self.session
        session.prefill_batch(prompts)
        rows = [session.logits_batch()]
        for step in range(forced.shape[1]):
            session.decode_batch(forced[:, step], start + step)
            rows.append(session.logits_batch())
        return np.stack(rows)

    def _scored(self, prompt: NDArray[np.int64], forced: NDArray[np.int64], start: int) -> NDArray[np.float32]:
        """Return the logits f32[1+D,1,V] of `_forced` by `score`: the tokens from `start` on are others than before."""
        first = np.array(self.session.score(prompt)[-1:])
        then = self.session.score(np.concatenate([prompt[:start], forced]))[start:]
        return np.concatenate([first, then])[:, None]

    def _stepped(self, prompt: NDArray[np.int64], forced: NDArray[np.int64], start: int) -> NDArray[np.float32]:
        """Return the logits f32[1+D,1,V] of `_forced` by `step`, beside the prompt's own tokens as another sequence."""
        session, rows = self.session, []
        each = -(-session.abi.context // session.abi.page)
        tables = np.arange(2 * each)[::-1]  # in another order than positions
        with session.shared_cache(2 * each) as cache:
            for turn in range(1 + len(forced)):
                mine, first = (prompt, 0) if not turn else (forced[turn - 1 : turn], start + turn - 1)
                beside = prompt[turn : turn + 1]
                places = np.concatenate([first + np.arange(len(mine)), turn + np.arange(len(beside))])
                count = len(places)
                of_rows = 2 * count + np.repeat([0, each], [len(mine), len(beside)])
                tokens, where = np.concatenate([mine, beside]), np.concatenate([places, of_rows, tables])
                session.step(tokens, places, where, np.array([len(mine) - 1]), cache)
                rows.append(np.array(session.step_logits()))
        return np.stack(rows)

    def _windows(self, windows: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
        """Yield the logits f32[1+D,V] of each window after its first tokens, in batches of the artifact's size."""
        if self.session.abi.score:
            for window in windows:
                yield self.session.score(window)[QUALITY_PROMPT - 1 : -1]
            return
        batch = self.session.abi.batch
        for first in range(0, len(windows), batch):
            taken = windows[first : first + batch]
            filled = np.concatenate([taken, np.repeat(taken[-1:], batch - len(taken), 0)])
            found = self._forced(filled[:, :QUALITY_PROMPT], filled[:, QUALITY_PROMPT:-1], QUALITY_PROMPT)
            yield from found.transpose(1, 0, 2)[: len(taken)]


def _compared(found: dict[str, NDArray[Any]], actual: NDArray[np.float32]) -> dict[str, float]:
    """Return how far logits f32[R,B,V] are from those of an import's check data."""
    if "columns" in found:  # a packed folder carries only some of them
        actual = actual[..., found["columns"]]
    expected = found["logits"].reshape(actual.shape)
    scale = float(np.sqrt(np.mean(np.square(expected, dtype=np.float64)))) or 1.0
    error = float(np.sqrt(np.mean(np.square(actual.astype(np.float64) - expected))))
    return {
        "finite": bool(np.isfinite(actual).all()),
        "error": error / scale,
        "top1": float(np.mean(actual.argmax(-1) == expected.argmax(-1))),
    }


def _energy_reading(meter: Meter, window: Window) -> dict[str, object]:
    found = window.close()
    if isinstance(found, Absent):
        return {"absent": found.reason}
    if not found.joules:  # windows span many updates: a power of 0 is impossible
        return {"absent": f"the counter did not move in {found.seconds:.2g} s"}
    return {"joules": found.joules, "seconds": found.seconds, **meter.conditions()}


def main() -> None:
    """Answer requests until stdin ends, which it also does when the parent dies."""
    worker = Worker()
    verbs: dict[str, Callable[[JsonObject], dict[str, object]]] = {
        name: getattr(worker, name)
        for name in ("open", "check", "quality", "round", "meter", "energy", "idle", "memory", "load", "load_energy")
    }
    verbs["limits"] = limits.run
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = verbs[request.pop("verb")](request)
        except LlmbuildError as error:
            # A variant's refusal of a request is permanent; the runtime's failure to open it may be transient.
            answer = {"refused": str(error), "lasting": isinstance(error, InputError)}
        say(json.dumps(answer))


if __name__ == "__main__":
    main()
