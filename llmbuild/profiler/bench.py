"""Measure variants against the baseline in interleaved rounds: both run in every round, in random order.

A number alone drifts with the machine; the paired ratio to a baseline that ran a moment before or after does not.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from time import monotonic
from typing import Any

from llmbuild import digest
from llmbuild.process import Limits
from llmbuild.profiler import noise, statistics
from llmbuild.profiler.child import Child, ChildFailed
from llmbuild.profiler.energy import RaplMeter, rapl
from llmbuild.profiler.operators import decode_operators, dispatches
from llmbuild.profiler.protocol import Protocol, Quality, Subject
from llmbuild.profiler.roofline import Roofline, fractions, work
from llmbuild.spec.measurement import PROTOCOL, Measurement, Operator, Reading
from llmbuild.spec.program import abi_from
from llmbuild.spec.variant import Failure
from llmbuild.spec.workload import Workload

TIMED = ("ttft_s", "tpot_s", "e2e_s", "output_tokens_per_s", "energy_j_per_token")
LOADS = 3
OPERATORS = 12
"""Kinds of dispatches that are kept with a measurement, the costliest first."""
NOISE = 3.0
"""Allowed error in units of how far the logits move when token vectors move by a millionth: rounding flips steps of
quantized activations, and random weights amplify that."""
Samples = dict[str, list[float]]


class Live:
    """A subject in a running worker."""

    def __init__(self, subject: Subject, limits: Limits) -> None:
        self.subject = subject
        self.child = Child(limits)
        self.readings: dict[str, Reading] = {}
        self.notes: dict[str, str] = {}
        self.operators: tuple[Operator, ...] = ()
        self.decode_steps = 1 << 30
        """Output tokens of one round; shortened for a baseline that is much slower than what it is compared with."""

    def prepare(self, workload: Workload, quality: Quality, warmup_s: float) -> None:
        """Open, warm up, then check numerics and quality; memory is read before the checks add their own.

        Raises:
            ChildFailed: the artifact does not open or run, or computes something else than PyTorch.
        """
        opened = self.open(LOADS)
        self.readings["load_s"] = statistics.median_of(opened)
        self.warm(workload, warmup_s)
        peak = self.child.ask("profile", "memory")["peak_memory_bytes"]
        if peak is not None:
            self.readings["peak_memory_bytes"] = statistics.exact(peak)
        self._check()
        self._score(quality)
        self._count()

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
            times=times,
        )
        return list(opened["load_s"])

    def warm(self, workload: Workload, seconds: float) -> float:
        """Run until `seconds` have passed, once at least; return the seconds of the last answer."""
        end = monotonic() + seconds
        while True:
            took = self.round(workload)["e2e_s"]
            if monotonic() >= end:
                return took

    def round(self, workload: Workload) -> dict[str, float]:
        """Answer once and return the seconds, and the joules per output token where they are counted."""
        output = min(workload.output, self.decode_steps)
        answer = self.child.ask("profile", "round", prompt=prompt_of(workload, self.subject.abi), output=output)
        joules = answer.pop("energy_j")
        full = answer["ttft_s"] + answer["tpot_s"] * (workload.output - 1)
        energy = {} if joules is None else {"energy_j_per_token": joules / output}
        return {**answer, **energy, "e2e_s": full, "output_tokens_per_s": workload.output / full}

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

    def _score(self, quality: Quality) -> None:
        if quality.data is None:
            self.notes["quality"] = quality.reason
            return
        for name, value in self.child.ask("quality", "quality", data=str(quality.data)).items():
            self.readings[name] = statistics.exact(value)

    def _count(self) -> None:
        """Count and time the dispatches of a decode step; a tool that fails leaves a note, not a failed variant."""
        s = self.subject
        found = decode_operators(s.artifact_path, s.parameters_path, abi_from(s.abi), self.child.limits)
        if isinstance(found, Failure):
            self.notes["operators"] = f"absent: {found.reason}"
            return
        self.operators = found
        self.readings["dispatches_per_token"] = statistics.exact(dispatches(found))


class Bench:
    """The meter of one build: keeps the baseline's worker alive, so that every candidate is paired with it."""

    def __init__(
        self,
        workloads: Sequence[Workload],
        quality: Quality,
        machine: str,
        limits: Limits,
        protocol: Protocol,
        roofline: Roofline | None = None,
    ) -> None:
        self.workloads, self.quality, self.machine = tuple(workloads), quality, machine
        self.limits, self.protocol, self.roofline = limits, protocol, roofline
        self.meter: RaplMeter = rapl()
        self._order = random.Random(0)
        self._baseline: Live | None = None

    @property
    def has_baseline(self) -> bool:
        """Say whether there is something to pair with."""
        return self._baseline is not None

    def measure(self, subject: Subject, baseline: bool = False) -> tuple[Measurement, ...] | Failure:
        """Return a measurement for each workload; a `baseline` stays open, and all later ones are paired with it."""
        live = Live(subject, self.limits)
        try:
            live.prepare(self.workloads[0], self.quality, self.protocol.warmup_s)
            if baseline:
                self.close()
                self._baseline = live
            measured = tuple(self._rounds([live], w, self.protocol.seconds)[0] for w in self.workloads)
        except ChildFailed as error:
            return error.failure
        finally:
            if live is not self._baseline:
                live.child.close()
        return measured

    def race(self, subjects: Sequence[Subject]) -> list[tuple[Measurement, ...]]:
        """Measure the survivors again, all of them and the baseline in every round; the baseline is measured too."""
        fresh = [Live(s, self.limits) for s in subjects if not self._is_baseline(s)]
        lives = [*([self._baseline] if self._baseline else []), *fresh]
        try:
            for live in fresh:
                live.prepare(self.workloads[0], self.quality, self.protocol.warmup_s)
            by_workload = [
                self._rounds(lives, w, self.protocol.race_seconds, self.protocol.race_rounds) for w in self.workloads
            ]
        except ChildFailed:
            return []  # what was measured before stands; a survivor that dies now was measured whole already
        finally:
            for live in fresh:
                live.child.close()
        return [tuple(of_live) for of_live in zip(*by_workload, strict=True)]

    def _is_baseline(self, subject: Subject) -> bool:
        return self._baseline is not None and subject.variant == self._baseline.subject.variant

    def close(self) -> None:
        """End the baseline's worker."""
        if self._baseline is not None:
            self._baseline.child.close()
            self._baseline = None

    def _fit_baseline(self, workload: Workload) -> str:
        """Shorten the baseline's rounds where a whole answer takes too long; return a note when that was done."""
        if self._baseline is None:
            return ""
        self._baseline.decode_steps = 1 << 30
        took = self._baseline.warm(workload, 0.0)
        if took <= self.protocol.baseline_round_s:
            return ""
        steps = max(4, int(workload.output * self.protocol.baseline_round_s / took))
        self._baseline.decode_steps = steps
        return f"baseline rounds shortened to {min(steps, workload.output)} of {workload.output} output tokens"

    def _rounds(
        self, lives: Sequence[Live], workload: Workload, seconds: float, rounds: int | None = None
    ) -> list[Measurement]:
        baseline = self._baseline
        alone = baseline is not None and list(lives) == [baseline]
        shortened = "" if alone else self._fit_baseline(workload)
        if alone and baseline is not None:
            baseline.decode_steps = 1 << 30
        for live in lives:
            live.warm(workload, 0.0)
        entrants = list(dict.fromkeys([*([baseline] if baseline else []), *lives]))
        samples: dict[Live, Samples] = {live: defaultdict(list) for live in entrants}
        before, end, done = noise.snapshot(), monotonic() + seconds, 0
        least = rounds or self.protocol.rounds
        while done < least or (rounds is None and done < self.protocol.most_rounds and monotonic() < end):
            if done >= self.protocol.rounds and monotonic() >= end:
                break
            self._order.shuffle(entrants)
            for live in entrants:
                self._sample(live, workload, samples[live])
            done += 1
        noisy = noise.verdict(before, noise.snapshot(), max(1, max(live.subject.workers for live in lives)))
        notes = {k: v for k, v in (("baseline", shortened), ("noise", noisy)) if v}
        return [
            self._measurement(live, workload, samples[live], samples[baseline] if baseline else {}, notes)
            for live in lives
        ]

    @staticmethod
    def _sample(live: Live, workload: Workload, into: Samples) -> None:
        for name, value in live.round(workload).items():
            into[name].append(value)

    def _measurement(
        self, live: Live, workload: Workload, mine: Samples, theirs: Samples, notes: dict[str, str]
    ) -> Measurement:
        timed = {name: statistics.median_of(mine[name]) for name in TIMED if mine.get(name)}
        ratios = {name: statistics.paired_ratio(mine[name], theirs[name]) for name in timed if theirs.get(name)}
        absent = {} if "energy_j_per_token" in timed else {"energy": self.meter.reason}
        if self.roofline is None:
            absent["limits"] = "absent: the machine was busy or its limits could not be measured"
        return Measurement(
            key=measurement_key(live.subject, workload, self.machine),
            variant=live.subject.variant,
            artifact=live.subject.artifact,
            workload=workload,
            machine=self.machine,
            readings={**live.readings, **timed, **self._fractions(live.subject, workload, timed)},
            ratios=ratios,
            notes={**live.notes, **notes, **absent},
            energy_source=self.meter.source if "energy_j_per_token" in timed else None,
            operators=live.operators[:OPERATORS],
        )

    def _fractions(self, subject: Subject, workload: Workload, timed: dict[str, Reading]) -> dict[str, Reading]:
        """Return how near a variant comes to the machine's limits; nothing where those are not known."""
        if self.roofline is None:
            return {}
        done = work(abi_from(subject.abi), subject.parameter_bytes, workload)
        found = fractions(self.roofline.of(subject.driver, subject.workers), done, timed["tpot_s"], timed["ttft_s"])
        integer = found.prefill_of_int8 if subject.integer else None
        return {"bandwidth_fraction": found.decode_of_bandwidth, "peak_fraction": integer or found.prefill_of_f32}


def measurement_key(subject: Subject, workload: Workload, machine: str) -> str:
    """Return the name of a measurement: what was run, how, on what, under which protocol."""
    return digest.of(
        {
            "variant": subject.variant,
            "artifact": subject.artifact,
            "workload": workload,
            "machine": machine,
            "protocol": PROTOCOL,
        }
    )


def adopt(known: Measurement, subject: Subject) -> Measurement:
    """Return a measurement of the same bytes under the same settings, for another variant that came out equal."""
    return replace(
        known,
        key=measurement_key(subject, known.workload, known.machine),
        variant=subject.variant,
        notes={**known.notes, "reused": f"same executable and settings as {digest.short(known.variant)}"},
    )


def prompt_of(workload: Workload, abi: dict[str, Any]) -> list[int]:
    """Return the workload's prompt: random tokens of the model's vocabulary by the workload's seed."""
    chosen = random.Random(workload.seed)
    return [chosen.randrange(abi["vocabulary"]) for _ in range(workload.prompt)]
