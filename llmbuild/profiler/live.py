"""A variant in a running worker: opened, warmed up, checked, then run answer by answer."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from time import monotonic

from llmbuild.process.child import Limits
from llmbuild.profiler import statistics
from llmbuild.profiler.budget import LEAST_TOKENS
from llmbuild.profiler.child import Child, ChildFailed
from llmbuild.profiler.operators import decode_operators, dispatches
from llmbuild.profiler.protocol import Prepared, Quality, Subject
from llmbuild.runtime.memory import shares_memory
from llmbuild.spec.measurement import Operator, Reading
from llmbuild.spec.program import abi_from
from llmbuild.spec.variant import Failure
from llmbuild.spec.workload import Workload
from llmbuild.system.strict_json import JsonObject

LOADS = 3
"""Openings whose seconds are read; the worker stops after two where they are slow."""
OPERATORS_S = 30.0
"""Seconds after which the operators of a decode step are given up: the tool reads all weights and runs a few steps."""
SLOW_ANSWER_S = 1.0
"""Seconds of a whole answer above which a short one is warm-up enough."""
NOISE = 3.0
"""Allowed error in units of the logits' change when token vectors change by a millionth: rounding flips steps of
quantized activations, and random weights amplify that.
"""
COLD = {"CUDA_CACHE_DISABLE": "1", "AMD_COMGR_CACHE": "0"}
"""Environment in which GPU drivers ignore their caches of compiled code."""
WHOLE = 1 << 30
"""More output tokens than any workload has: rounds are not shortened."""


@dataclass(frozen=True)
class Answer:
    """One timed answer: time to the first token, mean time per later one, and the seconds between its tokens."""

    ttft_s: float
    tpot_s: float
    gaps_s: tuple[float, ...]


@dataclass(frozen=True)
class MeterFound:
    """The energy meter of a worker: its source (None where there is none), why no better one, and its metadata."""

    source: str | None
    reason: str
    facts: dict[str, float | str]


@dataclass(frozen=True)
class WindowTaken:
    """One energy window: joules (None where lost for `reason`), seconds, output tokens and conditions."""

    joules: float | None
    seconds: float
    tokens: int
    reason: str
    conditions: dict[str, float | str]


def _taken(told: JsonObject) -> WindowTaken:
    if "absent" in told:
        return WindowTaken(None, 0.0, 0, told["absent"], {})
    joules, seconds, tokens = (told.pop(k) for k in ("joules", "seconds", "tokens"))
    return WindowTaken(joules, seconds, tokens, "", told)


class Live:
    """A subject in a running worker: one that was started before, or a new one."""

    @staticmethod
    def start(driver: str, limits: Limits) -> Child:
        """Start a worker for variants of a driver."""
        return Child(limits if shares_memory(driver) else replace(limits, memory_bytes=0))

    def __init__(self, subject: Subject, limits: Limits, started: Child | None = None) -> None:
        self.subject = subject
        self.child = started or self.start(subject.driver, limits)
        known = subject.known or Prepared({}, {})
        self.readings: dict[str, Reading] = dict(known.readings)
        self.notes: dict[str, str] = dict(known.notes)
        self.operators: tuple[Operator, ...] = known.operators
        self._meter: MeterFound | None = None
        self.last: Answer | None = None
        """The last answer of a warm-up."""
        self.decode_steps = WHOLE
        """Output tokens of one round; shortened for a variant that is slow."""
        self.prompt: Reading | None = None
        """Seconds to the first token, where they are known and rounds only decode."""

    def prepare(self, workload: Workload, quality: Quality, warmup_s: float) -> None:
        """Open, warm up, then check numerics and quality; peak memory is read before the checks add to it.

        Raises:
            ChildFailed: the artifact does not open or run, or its logits differ from PyTorch's.
        """
        self.begin(workload, warmup_s)
        self.complete(quality)

    def begin(self, workload: Workload, warmup_s: float) -> None:
        """Open, warm up and check numerics, before any timing; what is known is not measured again.

        Raises:
            ChildFailed: the artifact does not open or run, or its logits differ from PyTorch's.
        """
        self._load()
        self._warm_up(workload, warmup_s)
        if "peak_memory_bytes" not in self.readings:
            peak = self.child.ask("profile", "memory")["peak_memory_bytes"]
            if peak is not None:
                self.readings["peak_memory_bytes"] = statistics.exact(peak)
        if "check" not in self.notes:
            self._check()

    def complete(self, quality: Quality) -> None:
        """Score held-out text and count the dispatches, where that is not known.

        Raises:
            ChildFailed: the worker died of it.
        """
        self.score(quality)
        self.count()

    def _load(self) -> None:
        if "load_s" in self.readings:
            self.open(1)
            return
        opened = self.open(LOADS)
        self.readings["load_s"] = statistics.median_of(opened)
        if len(opened) < LOADS:
            self.notes["load"] = f"{len(opened)} openings, since one takes {opened[-1]:.2g} s"
        if not shares_memory(self.subject.driver):
            self._open_cold()

    def _open_cold(self) -> None:
        """Open once in a process without the driver's cache of compiled code, and record the seconds."""
        warm, child = self.child, Child(self.child.limits, COLD)
        self.child = child
        try:
            self.notes["load"] = f"{self.open(1)[0]:.3g} s where the driver compiles it first; load_s is without that"
        finally:
            self.child = warm
            child.close()

    def _warm_up(self, workload: Workload, seconds: float) -> None:
        """Answer briefly, then in full for `seconds`, unless that takes long or the variant is known."""
        end, self.decode_steps = monotonic() + seconds, LEAST_TOKENS
        self.last = answer = self.answers(workload, 0.0, settled=True)[0]
        self.decode_steps = WHOLE
        whole_s = answer.ttft_s + answer.tpot_s * (workload.output - 1)
        if whole_s <= SLOW_ANSWER_S and self.subject.known is None:
            self.warm(workload, max(0.0, end - monotonic()))

    @property
    def load_s(self) -> float:
        """Seconds to open the artifact."""
        found = self.readings.get("load_s")
        return math.inf if found is None else found.median

    def open(self, times: int) -> list[float]:
        """Open the artifact `times` times and return the seconds of each; the last one stays open.

        Raises:
            ChildFailed: it does not open.
        """
        s = self.subject
        opened = self.child.ask(
            "profile",
            "open",
            artifact=str(s.artifact_path),
            parameters=str(s.parameters_path),
            abi=s.abi,
            driver=s.driver,
            workers=s.workers,
            meters=s.meters,
            times=times,
        )
        return list(opened["load_s"])

    def warm(self, workload: Workload, seconds: float) -> float:
        """Run until `seconds` have passed, at least once; return the seconds of the last answer."""
        end = monotonic() + seconds
        while True:
            self.last = answer = self.answers(workload, 0.0)[0]
            took = answer.ttft_s + answer.tpot_s * (workload.output - 1)
            if monotonic() >= end:
                return took

    def answers(self, workload: Workload, seconds: float, settled: bool = False) -> list[Answer]:
        """Answer for `seconds`, at least once; without untimed work before it where the worker is `settled`."""
        alone = self.prompt is not None
        asked = self._request(workload, min(workload.output, self.decode_steps))
        told = self.child.ask("profile", "round", **asked, seconds=seconds, settled=settled, alone=alone)["answers"]
        first = self.prompt.median if self.prompt is not None else None
        return [Answer(first or a["ttft_s"], a["tpot_s"], tuple(a["gap_s"])) for a in told]

    def visit(self, workload: Workload, seconds: float) -> tuple[dict[str, float], tuple[float, ...]]:
        """Answer for `seconds` and return the metrics' medians over the answers, and all seconds between tokens.

        Those of an answer as a whole are computed for all of the workload's tokens, also where fewer were decoded.
        """
        found = self.answers(workload, seconds)
        ttft, tpot = (statistics.middle([getattr(a, name) for a in found]) for name in ("ttft_s", "tpot_s"))
        full = statistics.middle([a.ttft_s + a.tpot_s * (workload.output - 1) for a in found])
        rates = {"e2e_s": full, "output_tokens_per_s": workload.batch * workload.output / full}
        return {"ttft_s": ttft, "tpot_s": tpot, **rates}, tuple(gap for a in found for gap in a.gaps_s)

    def meter(self) -> MeterFound:
        """Return the energy meter of the artifact's device, found once; needs an opened artifact."""
        if self._meter is None:
            told = self.child.ask("profile", "meter")
            source, reason = told.pop("source"), told.pop("reason")
            self._meter = MeterFound(source, reason, {k: v for k, v in told.items() if v is not None})
        return self._meter

    def energy(self, workload: Workload, steps: int) -> WindowTaken:
        """Answer repeatedly, each time in full, in a window of `steps` updates of the meter."""
        return _taken(self.child.ask("profile", "energy", **self._request(workload, workload.output), steps=steps))

    def _request(self, workload: Workload, output: int) -> dict[str, object]:
        return {"prompts": prompts_of(workload, self.subject.abi), "output": output}

    def idle(self, steps: int) -> WindowTaken:
        """Wait in a window of `steps` updates of the meter."""
        return _taken({**self.child.ask("profile", "idle", steps=steps), "tokens": 0})

    def _check(self) -> None:
        found = self.child.ask("check", "check", data=str(self.subject.check_path))
        allowed = max(self.subject.tolerance, NOISE * found["noise"])
        if not found["finite"] or found["error"] > allowed:
            reason = (
                f"logits differ from PyTorch's on the same weights by {found['error']:.3g} of their size "
                f"(allowed {allowed:.3g}), top-1 agreement {found['top1']:.2f}"
            )
            raise ChildFailed(Failure("check", reason, self.child.pasteable(), "", lasting=True))
        self.notes["check"] = f"logits within {found['error']:.2g} of PyTorch's on the same weights"

    def score(self, quality: Quality) -> None:
        """Score held-out text once, or note why not.

        Raises:
            ChildFailed: the worker died of it.
        """
        if "quality_kl" in self.readings or "quality" in self.notes:
            return
        if quality.data is None:
            self.notes["quality"] = quality.reason
            return
        for name, value in self.child.ask("quality", "quality", data=str(quality.data)).items():
            self.readings[name] = statistics.exact(value)

    def count(self) -> None:
        """Count and time the dispatches of a decode step; a failure of the tool is a note, not a failed variant."""
        s = self.subject
        if self.operators or "operators" in self.notes:
            return
        if not shares_memory(s.driver):
            self.notes["operators"] = "absent: dispatches are counted and timed on CPU drivers alone"
            return
        limits = replace(self.child.limits, seconds=min(OPERATORS_S, self.child.limits.seconds))
        found = decode_operators(s.artifact_path, s.parameters_path, abi_from(s.abi), limits)
        if isinstance(found, Failure):
            self.notes["operators"] = f"absent: {found.reason}"
            return
        self.operators = found
        self.readings["dispatches_per_token"] = statistics.exact(dispatches(found))


def prompts_of(workload: Workload, abi: JsonObject) -> list[list[int]]:
    """Return the workload's prompts: random tokens of the model's vocabulary by the workload's seed."""
    chosen = random.Random(workload.seed)
    return [[chosen.randrange(abi["vocabulary"]) for _ in range(workload.prompt)] for _ in range(workload.batch)]
