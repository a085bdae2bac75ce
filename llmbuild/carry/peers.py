"""PyTorch on the same device at the same time: it and llmbuild's best variant answer in turns, in random order."""

from __future__ import annotations

import contextlib
import json
import queue
import random
import subprocess
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from llmbuild.process.child import NEUTRAL, environment
from llmbuild.profiler.live import Live
from llmbuild.profiler.meters import energy
from llmbuild.profiler.meters.meter import Energy, window_s
from llmbuild.profiler.statistics import median_of, paired_ratio
from llmbuild.spec.measurement import Reading
from llmbuild.spec.workload import Workload
from llmbuild.system.strict_json import JsonObject

TIMES = ("tpot_s", "ttft_s")
VISIT_S = 0.5
LEAST_ROUNDS, MOST_ROUNDS = 3, 15
OURS = -1
"""The number of llmbuild's variant among PyTorch's modes."""
WINDOWS, WINDOW_STEPS = 2, 30
"""Windows of energy for each of PyTorch's modes, and updates of the counter in each."""


@dataclass(frozen=True)
class Versus:
    """One mode of PyTorch under a workload, and llmbuild's time over its own, paired: below 1 llmbuild is faster.

    `reason` is why there are no readings; joules are of the whole board, `window_s` the length of their windows.
    """

    model: str
    workload: Workload
    runtime: str
    variant: str
    choices: str
    reason: str = ""
    readings: dict[str, Reading] | None = None
    ratios: dict[str, Reading] | None = None
    window_s: float | None = None


class Peer:
    """A process of PyTorch with a model of one shape, eager and compiled, that answers on request."""

    def __init__(self, script: Path, shape: Path, workload: Workload) -> None:
        size = [str(shape.absolute()), str(workload.prompt), str(workload.output)]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by close()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-E", str(script.absolute()), *size, "--batch", str(workload.batch), "--turns"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment(),
            cwd=NEUTRAL,
        )
        self._lines: queue.Queue[JsonObject] = queue.Queue()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(json.loads(line))
        self._lines.put({})

    def ready(self, end: float) -> list[JsonObject]:
        """Return each mode's description, with a `reason` where it cannot run; nothing where PyTorch is not ready."""
        found: list[JsonObject] = []
        while told := self._next(end):
            if "ready" in told:
                return found
            found.append(told)
        return []

    def turn(self, number: int, seconds: float, end: float) -> JsonObject:
        """Return a mode's times in that many seconds; nothing where the process has died or the time is up."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{number} {seconds}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return {}
        return self._next(end)

    def _next(self, end: float) -> JsonObject:
        try:
            return self._lines.get(timeout=max(0.0, end - monotonic()))
        except queue.Empty:
            return {}

    def said(self) -> str:
        """Return the last line of the error output."""
        self._log.seek(0)
        return next(
            (line.strip() for line in reversed(self._log.read().splitlines()) if line.strip()), "the time was up"
        )

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._listener.join()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            with contextlib.suppress(BrokenPipeError):
                if pipe is not None:
                    pipe.close()


def versus(peer: Peer, ours: Live, named: Versus, end: float) -> list[Versus]:
    """Return a row for each mode of PyTorch, from turns with llmbuild's open variant; with a reason on failure."""
    told = peer.ready(end)
    if not told:
        return [_row(named, peer.said(), {"runtime": "PyTorch"})]
    modes = [number for number, one in enumerate(told) if "reason" not in one]
    taken = _turns(peer, ours, named.workload, modes, end)
    if taken is None:
        return [_row(named, one.get("reason", peer.said()), one) for one in told]
    return [
        _found(named, one, taken[OURS], taken[number], _joules(peer, number, end))
        if number in modes
        else _row(named, one["reason"], one)
        for number, one in enumerate(told)
    ]


def _turns(
    peer: Peer, ours: Live, workload: Workload, modes: Sequence[int], end: float
) -> dict[int, dict[str, list[float]]] | None:
    """Return the times of all participants, round by round; None where PyTorch failed."""
    everyone = [OURS, *modes]
    taken: dict[int, dict[str, list[float]]] = {number: defaultdict(list) for number in everyone}
    order = random.Random(0)
    for done in range(MOST_ROUNDS if modes else 0):
        if done >= LEAST_ROUNDS and monotonic() >= end:
            break
        for number in order.sample(everyone, len(everyone)):
            late = max(end, monotonic() + 4 * VISIT_S) + VISIT_S
            told = ours.visit(workload, VISIT_S)[0] if number == OURS else peer.turn(number, VISIT_S, late)
            if not told:
                return None
            for name in TIMES:
                taken[number][name].append(float(told[name]))
    return taken


def _row(named: Versus, reason: str, told: JsonObject) -> Versus:
    return Versus(named.model, named.workload, told["runtime"], named.variant, named.choices, reason)


def _found(
    named: Versus,
    told: JsonObject,
    ours: dict[str, list[float]],
    theirs: dict[str, list[float]],
    joules: Sequence[Energy],
) -> Versus:
    readings = {name: median_of(theirs[name]) for name in TIMES}
    if joules:
        readings["energy_j_per_token"] = median_of([one.joules for one in joules])
    return Versus(
        named.model,
        named.workload,
        told["runtime"],
        named.variant,
        named.choices,
        readings=readings,
        ratios={name: paired_ratio(ours[name], theirs[name]) for name in TIMES},
        window_s=joules[-1].seconds if joules else None,
    )


def _joules(peer: Peer, number: int, end: float) -> list[Energy]:
    """Return joules per token of windows with one mode; none without a meter of the board, or without time."""
    meter = energy.find("cuda", measure_step=True).meter
    if meter is None:
        return []
    found: list[Energy] = []
    seconds = window_s(meter, WINDOW_STEPS)
    while len(found) < WINDOWS and monotonic() + seconds < end:
        window = meter.window()
        told = peer.turn(number, seconds, end + seconds)
        taken = window.close()
        if not told or not isinstance(taken, Energy):
            return []
        found.append(Energy(taken.joules / told["tokens"], taken.seconds))
    return found
