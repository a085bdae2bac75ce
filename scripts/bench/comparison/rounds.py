"""Run participants in interleaved rounds: each a running process, all of them in every round, in random order."""

from __future__ import annotations

import json
import os
import random
import select
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from time import monotonic
from typing import Any

from llmbuild.process.child import Limits, confine, failure_of, stop_group, tail
from llmbuild.profiler import noise

FIRST_PROMPT = 16
"""Tokens of the prompt whose first answer is timed together with the load."""

_ANSWER_BYTES = 1 << 16


class WorkerFailed(Exception):
    """A worker crashed, took too long or refused; the message is its row's reason."""


class Worker:
    """A child process that answers one JSON line with one JSON line."""

    def __init__(self, command: Sequence[str], limits: Limits) -> None:
        self.command, self.limits = list(command), limits
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self._process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            bufsize=0,
            start_new_session=True,
            preexec_fn=confine(limits),
        )

    def ask(self, verb: str, **request: Any) -> dict[str, Any]:
        """Return the answer.

        Raises:
            WorkerFailed: no answer within the limit, no process any more, or one that says what it cannot do.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"verb": verb, **request}).encode() + b"\n")
        except BrokenPipeError:
            raise self._ended() from None
        try:
            answer = json.loads(self._line())
        except ValueError as error:
            raise WorkerFailed(f"answered no JSON: {error}") from None
        if "refused" in answer:
            raise WorkerFailed(str(answer["refused"]))
        return dict(answer)

    def _line(self) -> bytes:
        """Read up to the end of a line; a worker that stops in the middle of one is out of time too."""
        assert self._process.stdout is not None
        end, read = monotonic() + self.limits.seconds, b""
        while not read.endswith(b"\n"):
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, end - monotonic()))
            if not ready:
                stop_group(self._process)
                raise WorkerFailed(f"no answer within {self.limits.seconds:g} s")
            piece = self._process.stdout.read(_ANSWER_BYTES)
            if not piece:
                raise self._ended()
            read += piece
        return read

    def _ended(self) -> WorkerFailed:
        code, log = self._process.wait(), tail(self._log.fileno())
        last = next((x.strip() for x in reversed(log.splitlines()) if x.strip()), "")
        if code >= 0:
            return WorkerFailed(f"ended with {code} instead of an answer: {last}")
        return WorkerFailed(failure_of(self.command, "profile", self.limits, code, log).reason)

    @property
    def process_id(self) -> int:
        """The worker's process."""
        return self._process.pid

    def close(self) -> None:
        """End the worker."""
        stop_group(self._process)
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                stream.close()


@dataclass(frozen=True)
class Participant:
    """Who runs: a runtime with weights in a format, the command of its worker and the request that opens it."""

    name: str
    runtime: str
    format: str
    command: tuple[str, ...]
    opening: dict[str, Any]
    variant: str = ""
    choices: str = ""
    absent: str = ""
    """Why it does not run at all; empty for one that does."""


@dataclass(frozen=True)
class Plan:
    """What each round does: token ids, and how many rounds and fresh starts there are."""

    prompt: tuple[int, ...]
    forced: tuple[int, ...]
    fill: tuple[int, ...]
    rounds: int
    loads: int
    limits: Limits = field(default_factory=Limits)
    seed: int = 0
    threads: int = 1
    alone: bool = False
    """Whether nobody else has a model open while one runs: each opens anew in every round."""


@dataclass
class Entrant:
    """A participant under way; seconds by name and round, so that only rounds that both ran are ever paired."""

    participant: Participant
    worker: Worker | None = None
    samples: dict[str, dict[int, float]] = field(default_factory=dict)
    decode_steps_s: list[float] = field(default_factory=list)
    peak_memory_bytes: int | None = None
    version: str = ""
    reason: str = ""

    def start(self, plan: Plan, number: int) -> None:
        """Open the model in a fresh process; start 0 fills the file cache and is not kept."""
        self.close()
        self.worker = Worker(self.participant.command, plan.limits)
        told = self.worker.ask("open", **self.participant.opening, first=list(plan.prompt[:FIRST_PROMPT]))
        self.version = str(told["version"])
        if number:
            self._keep(number, load_s=told["load_s"], first_token_s=told["first_token_s"])

    def round(self, plan: Plan, number: int) -> None:
        """Run the prompt and the forced tokens once; round 0 warms up and is not kept."""
        assert self.worker is not None
        told = self.worker.ask("round", prompt=list(plan.prompt), forced=list(plan.forced), fill=list(plan.fill))
        self.peak_memory_bytes = int(told["peak_memory_bytes"])
        if number:
            self._keep(number, prefill_s=told["prefill_s"], decode_s=median(told["decode_s"]))
            self.decode_steps_s += told["decode_s"]

    def afresh(self, plan: Plan, number: int) -> None:
        """Open the model, run a round twice, of which the second counts, and close it again; 0 fills the file cache."""
        self.start(plan, number)
        self.round(plan, 0)
        if number:
            self.round(plan, number)
        self.close()

    def close(self) -> None:
        """End the worker."""
        if self.worker is not None:
            self.worker.close()
            self.worker = None

    def _keep(self, number: int, **seconds: float) -> None:
        for name, value in seconds.items():
            self.samples.setdefault(name, {})[number] = float(value)


def compare(participants: Sequence[Participant], plan: Plan, say: Callable[[str], None]) -> tuple[list[Entrant], str]:
    """Return what each participant took, and what disturbed the rounds (empty: nothing).

    One that fails is out from there on, with its reason.
    """
    entrants = [Entrant(p, reason=p.absent) for p in participants]
    order = random.Random(plan.seed)
    try:
        noisy = _afresh(entrants, plan, order, say) if plan.alone else _together(entrants, plan, order, say)
    finally:
        for entrant in entrants:
            entrant.close()
    return entrants, noisy


def _together(entrants: list[Entrant], plan: Plan, order: random.Random, say: Callable[[str], None]) -> str:
    """Open everyone, then run the rounds with all of them open; return what disturbed the rounds."""
    for number in range(plan.loads + 1):
        _once(entrants, order, lambda e, n=number: e.start(plan, n), say)
        say(f"[{number}/{plan.loads}] fresh starts, {_alive(entrants)} participants")
    before, own = noise.snapshot(), noise.cpu_ticks(_processes(entrants))
    for number in range(plan.rounds + 1):
        _once(entrants, order, lambda e, n=number: e.round(plan, n), say)
        say(f"[{number}/{plan.rounds}] rounds, {_alive(entrants)} participants")
    own = noise.cpu_ticks(_processes(entrants)) - own
    return noise.verdict(before, noise.snapshot(), plan.threads, max(0, own))


def _afresh(entrants: list[Entrant], plan: Plan, order: random.Random, say: Callable[[str], None]) -> str:
    """Run the rounds with one participant open at a time; the time of others cannot be told from theirs."""
    before = noise.snapshot()
    for number in range(plan.rounds + 1):
        _once(entrants, order, lambda e, n=number: e.afresh(plan, n), say)
        say(f"[{number}/{plan.rounds}] rounds, one at a time, {_alive(entrants)} participants")
    return noise.verdict(before, noise.snapshot(), plan.threads)


def _processes(entrants: Sequence[Entrant]) -> list[int]:
    return [os.getpid(), *(e.worker.process_id for e in entrants if e.worker is not None)]


def _alive(entrants: Sequence[Entrant]) -> int:
    return sum(not e.reason for e in entrants)


def _once(
    entrants: Sequence[Entrant], order: random.Random, act: Callable[[Entrant], None], say: Callable[[str], None]
) -> None:
    """Let everyone who is still in act once, in random order."""
    for entrant in order.sample(list(entrants), len(entrants)):
        if entrant.reason:
            continue
        try:
            act(entrant)
        except WorkerFailed as failed:
            entrant.reason = str(failed)
            entrant.close()
            say(f"{entrant.participant.name} is out: {failed}")
