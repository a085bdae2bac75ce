"""From rounds to measurements: medians with intervals, ratios to the baseline, notes that explain them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from llmbuild import digest
from llmbuild.profiler import statistics
from llmbuild.profiler.live import Live
from llmbuild.profiler.protocol import Protocol, Subject
from llmbuild.profiler.roofline import Roofline, fractions, work
from llmbuild.profiler.rounds import EnergyRounds, Rounds, Samples
from llmbuild.runtime import host
from llmbuild.runtime.memory import shares_memory
from llmbuild.spec.measurement import PROTOCOL, Measurement, Reading
from llmbuild.spec.program import abi_from
from llmbuild.spec.slo import ENERGY
from llmbuild.spec.workload import Workload

TIMED = ("ttft_s", "tpot_s", "e2e_s", "output_tokens_per_s")
WITH_PROMPT = ("ttft_s", "e2e_s", "output_tokens_per_s")
"""The timed metrics that contain the time of the prompt."""
OPERATORS = 12
"""Maximum number of dispatch kinds kept with a measurement, the costliest first."""


@dataclass(frozen=True)
class Known:
    """The baseline's seconds to the first token and per later one, as read alone, before its rounds with others.

    Where the prompt is slow, its rounds with others only decode.
    """

    ttft_s: Reading
    tpot_s: Reading

    def uncertainty(self, tpot_s: Sequence[float]) -> float:
        """Return the factor by which the time of the prompt may be off now: its interval, and the drift since then."""
        drift = statistics.middle(tpot_s) / self.tpot_s.median if tpot_s and self.tpot_s.median > 0 else 1.0
        apart = max(self.ttft_s.high / self.ttft_s.median, self.ttft_s.median / self.ttft_s.low)
        return apart * math.exp(abs(math.log(drift)))


@dataclass(frozen=True)
class Reader:
    """Makes measurements of one machine, paired with `baseline` where there is one; `known` are its readings alone."""

    machine: str
    protocol: Protocol
    roofline: Roofline | None
    baseline: Live | None
    known: Mapping[str, Known]

    def bare(self, live: Live, rounds: Rounds, readings: dict[str, Reading]) -> Measurement:
        """Return a measurement of these readings, without ratios and notes."""
        return Measurement(
            key=measurement_key(live.subject, rounds.workload, self.machine),
            variant=live.subject.variant,
            artifact=live.subject.artifact,
            workload=rounds.workload,
            machine=self.machine,
            readings=readings,
            ratios={},
            notes={},
            session=rounds.name,
        )

    def sampled(self, live: Live, rounds: Rounds) -> Measurement:
        """Return intermediate results of a race: medians and samples, without intervals."""
        taken = rounds.samples(live, self.protocol.rounds)
        kept = {name: () if live.prompt is not None and name in WITH_PROMPT else tuple(taken[name]) for name in TIMED}
        middle = {name: statistics.middle(taken[name]) for name in TIMED}
        timed = {name: Reading(m, m, m, kept[name]) for name, m in middle.items()}
        return self.bare(live, rounds, {**live.readings, **timed})

    def brief(self, live: Live, rounds: Rounds) -> Measurement:
        """Return the measurement of a few short answers, with wide intervals."""
        baseline = self.baseline
        assert baseline is not None
        mine, theirs = rounds.taken[live], rounds.taken[baseline]
        names = [name for name in TIMED if min(*mine[name], *theirs[name]) > 0]
        ratios = {n: statistics.few_of([a / b for a, b in zip(mine[n], theirs[n], strict=True)]) for n in names}
        timed = {name: statistics.few_of(mine[name]) for name in names}
        made = self.bare(live, rounds, {**live.readings, **timed})
        return replace(made, ratios=self._widened(ratios, rounds.workload, theirs["tpot_s"]))

    def whole(self, live: Live, rounds: Rounds, energy: EnergyRounds, notes: Mapping[str, str]) -> Measurement:
        """Return the measurement of finished rounds."""
        taken, known = self._samples(live, rounds, energy), self.known.get(rounds.workload.name)
        timed = {name: self._median(name, values) for name, values in taken.items()}
        if live.prompt is not None and known is not None:
            loose = self._widened(timed, rounds.workload, taken["tpot_s"])
            timed |= {name: replace(loose[name], samples=()) for name in WITH_PROMPT}
            timed["ttft_s"] = replace(known.ttft_s, samples=())
        gaps = statistics.percentile_of(rounds.gaps_s[live], 0.99)
        tail = {} if gaps is None else {"itl_p99_s": gaps}
        absent = self._without_energy(live, energy)
        if self.roofline is None:
            busy = "the machine was busy or its limits could not be measured"
            cpu = shares_memory(live.subject.driver)
            absent["limits"] = f"absent: {busy if cpu else 'limits are measured of CPUs alone'}"
        bare = self.bare(live, rounds, {**live.readings, **timed, **tail, **self._fractions(live, rounds, timed)})
        source = live.meter().source
        noisy = ", ".join(t for t in (notes.get("noise", ""), energy.noisy(live)) if t)
        return replace(
            bare,
            ratios=self._ratios(live, rounds, energy),
            notes={**noted(live), **{k: v for k, v in {**notes, "noise": noisy}.items() if v}, **absent},
            energy_source=source if ENERGY in timed else None,
            energy=dict(energy.facts.get(live, {})) if ENERGY in timed else None,
            operators=live.operators[:OPERATORS],
        )

    @staticmethod
    def _without_energy(live: Live, energy: EnergyRounds) -> dict[str, str]:
        """Return the note that replaces joules, or accompanies estimated ones."""
        facts = energy.facts.get(live, {})
        if "model" in facts:
            return {"energy": str(facts["model"])}
        return {} if energy.samples(live) else {"energy": energy.lost.get(live) or live.meter().reason}

    def _samples(self, live: Live, rounds: Rounds, energy: EnergyRounds) -> Samples:
        taken, joules = rounds.samples(live, self.protocol.rounds), energy.samples(live)
        return {**{name: taken[name] for name in TIMED}, **({ENERGY: joules} if joules else {})}

    def _ratios(self, live: Live, rounds: Rounds, energy: EnergyRounds) -> dict[str, Reading]:
        """Return the ratios to the baseline over the common rounds; energy only where one meter read both."""
        baseline = self.baseline
        if baseline is None:
            return {}
        both = rounds.pairs(live, baseline, self.protocol.rounds)
        if live.meter().source == baseline.meter().source:
            both[ENERGY] = list(zip(energy.samples(live), energy.samples(baseline), strict=False))
        found = {name: self._ratio(name, pairs) for name, pairs in both.items() if pairs}
        return found if live is baseline else self._widened(found, rounds.workload, [b for _, b in both["tpot_s"]])

    def _ratio(self, name: str, pairs: Sequence[tuple[float, float]]) -> Reading:
        mine, theirs = [a for a, _ in pairs], [b for _, b in pairs]
        if self._few(name, [*mine, *theirs], len(pairs)):
            return statistics.few_of([a / b for a, b in pairs])
        return statistics.paired_ratio(mine, theirs)

    def _median(self, name: str, values: Sequence[float]) -> Reading:
        return (statistics.few_of if self._few(name, values, len(values)) else statistics.median_of)(values)

    def _few(self, name: str, values: Sequence[float], count: int) -> bool:
        """Return whether rounds were too few for a bootstrap, which would find too narrow an interval."""
        return name in TIMED and 2 <= count < min(self.protocol.rounds, statistics.FEW) and min(values) > 0

    def _widened(self, found: Mapping[str, Reading], workload: Workload, tpot_s: Sequence[float]) -> dict[str, Reading]:
        """Return readings with the intervals that follow from a baseline whose prompt was read before these rounds."""
        known = self.known.get(workload.name)
        if self.baseline is None or self.baseline.prompt is None or known is None:
            return dict(found)
        off = known.uncertainty(tpot_s)
        return {n: replace(r, low=r.low / off, high=r.high * off) if n in WITH_PROMPT else r for n, r in found.items()}

    def _fractions(self, live: Live, rounds: Rounds, timed: Mapping[str, Reading]) -> dict[str, Reading]:
        """Return the shares of the machine's limits that a variant reaches; nothing where the limits are unknown."""
        if self.roofline is None:
            return {}
        subject = live.subject
        done = work(abi_from(subject.abi), subject.parameter_bytes, rounds.workload)
        found = fractions(self.roofline.of(subject.driver, subject.workers), done, timed["tpot_s"], timed["ttft_s"])
        integer = found.prefill_of_int8 if subject.integer else None
        return {"bandwidth_fraction": found.decode_of_bandwidth, "peak_fraction": integer or found.prefill_of_f32}


def noted(live: Live) -> dict[str, str]:
    """Return a subject's notes and the conditions of its readings."""
    return {**live.notes, **host.conditions().notes()}


def measurement_key(subject: Subject, workload: Workload, machine: str) -> str:
    """Return the key of a measurement: artifact, settings, machine and protocol."""
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
    """Return a measurement of the same bytes with the same settings, for another variant with an equal artifact."""
    return replace(
        known,
        key=measurement_key(subject, known.workload, known.machine),
        variant=subject.variant,
        notes={**known.notes, "reused": f"same executable and settings as {digest.short(known.variant)}"},
    )
