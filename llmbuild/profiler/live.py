"""A variant in a running worker: opened, warmed up, checked, then run answer by answer."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from time import monotonic

from llmbuild.process.child import Limits
from llmbuild.profiler import statistics
from llmbuild.profiler.child import Child, ChildFailed
from llmbuild.profiler.operators import decode_operators, dispatches
from llmbuild.profiler.protocol import Quality, Subject
from llmbuild.runtime.memory import shares_memory
from llmbuild.spec.measurement import Operator, Reading
from llmbuild.spec.program import abi_from
from llmbuild.spec.variant import Failure
from llmbuild.spec.workload import Workload
from llmbuild.system.strict_json import JsonObject

LOADS = 3
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


@dataclass(frozen=True)
class Prepared:
    """The facts about a subject that are known before its first round and hold for every process that opens it."""

    readings: dict[str, Reading]
    notes: dict[str, str]
    operators: tuple[Operator, ...]


class Live:
    """A subject in a running worker."""

    def __init__(self, subject: Subject, limits: Limits) -> None:
        self.subject = subject
        self.child = Child(limits if shares_memory(subject.driver) else replace(limits, memory_bytes=0))
        self.readings: dict[str, Reading] = {}
        self.notes: dict[str, str] = {}
        self.operators: tuple[Operator, ...] = ()
        self._meter: MeterFound | None = None
        self.last: Answer | None = None
        """The last answer of a warm-up."""
        self.decode_steps = WHOLE
        """Output tokens of one round; shortened for a baseline that is much slower than its candidates."""

    def prepare(self, workload: Workload, quality: Quality, warmup_s: float) -> None:
        """Open, warm up, then check numerics and quality; peak memory is read before the checks add to it.

        Raises:
            ChildFailed: the artifact does not open or run, or its logits differ from PyTorch's.
        """
        self.begin(workload, warmup_s)
        self.score(quality)
        self.count()

    def begin(self, workload: Workload, warmup_s: float) -> None:
        """Open, warm up and check numerics, before any timing.

        Raises:
            ChildFailed: the artifact does not open or run, or its logits differ from PyTorch's.
        """
        opened = self.open(LOADS)
        self.readings["load_s"] = statistics.median_of(opened)
        if not shares_memory(self.subject.driver):
            self._open_cold()
        self.warm(workload, warmup_s)
        peak = self.child.ask("profile", "memory")["peak_memory_bytes"]
        if peak is not None:
            self.readings["peak_memory_bytes"] = statistics.exact(peak)
        self._check()

    def _open_cold(self) -> None:
        """Open once in a process without the driver's cache of compiled code, and record the seconds."""
        warm, child = self.child, Child(self.child.limits, COLD)
        self.child = child
        try:
            self.notes["load"] = f"{self.open(1)[0]:.3g} s where the driver compiles it first; load_s is without that"
        finally:
            self.child = warm
            child.close()

    @property
    def prepared(self) -> Prepared:
        """The result of `prepare`."""
        return Prepared(dict(self.readings), dict(self.notes), self.operators)

    def resume(self, known: Prepared, workload: Workload, warmup_s: float) -> None:
        """Open and warm up a subject that another process prepared: its bytes are already checked and scored.

        Raises:
            ChildFailed: the artifact does not open or run any more.
        """
        self.readings, self.notes, self.operators = dict(known.readings), dict(known.notes), known.operators
        self.open(1)
        self.warm(workload, warmup_s)

    @property
    def load_s(self) -> float:
        """Seconds to open the artifact, from `prepare`."""
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

    def answers(self, workload: Workload, seconds: float) -> list[Answer]:
        """Answer for `seconds`, at least once."""
        told = self.child.ask("profile", "round", **self._load(workload), seconds=seconds)["answers"]
        return [Answer(a["ttft_s"], a["tpot_s"], tuple(a["gap_s"])) for a in told]

    def visit(self, workload: Workload, seconds: float) -> tuple[dict[str, float], tuple[float, ...]]:
        """Answer for `seconds` and return the metrics' medians over the answers, and all seconds between tokens."""
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
        """Answer repeatedly in a window of `steps` updates of the meter."""
        return _taken(self.child.ask("profile", "energy", **self._load(workload), steps=steps))

    def _load(self, workload: Workload) -> dict[str, object]:
        return {"prompts": prompts_of(workload, self.subject.abi), "output": min(workload.output, self.decode_steps)}

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
        if "quality_kl" in self.readings:
            return
        if quality.data is None:
            self.notes["quality"] = quality.reason
            return
        for name, value in self.child.ask("quality", "quality", data=str(quality.data)).items():
            self.readings[name] = statistics.exact(value)

    def count(self) -> None:
        """Count and time the dispatches of a decode step; a failure of the tool is a note, not a failed variant."""
        s = self.subject
        if not shares_memory(s.driver):
            self.notes["operators"] = "absent: dispatches are counted and timed on CPU drivers alone"
            return
        found = decode_operators(s.artifact_path, s.parameters_path, abi_from(s.abi), self.child.limits)
        if isinstance(found, Failure):
            self.notes["operators"] = f"absent: {found.reason}"
            return
        self.operators = found
        self.readings["dispatches_per_token"] = statistics.exact(dispatches(found))


def prompts_of(workload: Workload, abi: JsonObject) -> list[list[int]]:
    """Return the workload's prompts: random tokens of the model's vocabulary by the workload's seed."""
    chosen = random.Random(workload.seed)
    return [[chosen.randrange(abi["vocabulary"]) for _ in range(workload.prompt)] for _ in range(workload.batch)]
