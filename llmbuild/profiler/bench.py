"""Measure variants against the baseline in interleaved rounds: both run in every round, in random order.

Absolute readings drift with the machine; the paired ratio to a baseline of the same round does not.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from time import monotonic

from llmbuild import digest
from llmbuild.process.child import Limits
from llmbuild.profiler import statistics
from llmbuild.profiler.budget import LEAST_TOKENS, Pace, Plan, baseline_tokens, plan
from llmbuild.profiler.child import ChildFailed
from llmbuild.profiler.live import WHOLE, Answer, Live, Prepared
from llmbuild.profiler.meters import estimate
from llmbuild.profiler.meters.meter import RANK_STEPS, SCREEN_STEPS
from llmbuild.profiler.protocol import Protocol, Quality, Subject
from llmbuild.profiler.roofline import Roofline, fractions, work
from llmbuild.profiler.rounds import EnergyRounds, Rounds, Samples
from llmbuild.runtime import host
from llmbuild.runtime.memory import shares_memory
from llmbuild.spec.measurement import PROTOCOL, SCREENED, Measurement, Reading
from llmbuild.spec.program import abi_from
from llmbuild.spec.slo import ENERGY
from llmbuild.spec.variant import Failure
from llmbuild.spec.workload import Workload

TIMED = ("ttft_s", "tpot_s", "e2e_s", "output_tokens_per_s")
OPERATORS = 12
"""Maximum number of dispatch kinds kept with a measurement, the costliest first."""
Contenders = Callable[[Sequence[Measurement], float], set[str]]
"""Returns which variants of a race are undecided and can be decided within that many rounds in all."""

Dominated = Callable[[Sequence[Measurement], bool], str]
"""Returns which variant surely dominates one, from a brief measurement for each workload; empty for none. The flag
selects whether unscored quality counts as perfect, or as the worst.
"""

BRIEF = 3
"""Rounds of the short screen."""


class Bench:
    """The meter of one build: keeps the baseline's worker running, so that every candidate is paired with it.

    One class: all of its steps (check, screen, rounds, race) use the same running workers.
    """

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
        if estimate.asked():
            estimate.find()
        self._order = random.Random(0)
        self._baseline: Live | None = None
        self._prepared: dict[str, Prepared] = {}
        self._paces: dict[tuple[str, str], Pace] = {}

    @property
    def has_baseline(self) -> bool:
        """Return whether a baseline is open for pairing."""
        return self._baseline is not None

    def measure(
        self, subject: Subject, baseline: bool = False, dominated: Dominated | None = None
    ) -> tuple[Measurement, ...] | Failure:
        """Return a measurement for each workload; a `baseline` stays open, and all later ones are paired with it.

        A variant that is `dominated` after a few rounds has only those, with a note and wide intervals.
        """
        live = Live(subject, self.limits)
        try:
            live.begin(self.workloads[0], self.protocol.warmup_s)
            brief = () if baseline or dominated is None else self._brief(live, dominated)
            if brief:
                return brief
            live.score(self.quality)
            live.count()
            self._prepared[subject.variant] = live.prepared
            if baseline:
                self.close()
                self._baseline = live
            measured = tuple(self._screen(live, w) for w in self.workloads)
        except ChildFailed as error:
            return error.failure
        finally:
            if live is not self._baseline:
                live.child.close()
        return measured

    def _brief(self, live: Live, dominated: Dominated) -> tuple[Measurement, ...]:
        """Return brief measurements where they show that the variant is dominated, else nothing.

        The warm-up's last answer decides whether rounds are run, and these decide whether quality is scored.
        """
        if self._baseline is None or live.last is None:
            return ()
        if not dominated([self._warm(live, self._baseline, live.last)], False):
            return ()
        taken = [self._short(live, w) for w in self.workloads]
        why = dominated(taken, True)
        if why:
            unscored = "absent: not scored, since nothing it could be would have mattered"
            live.notes["quality"] = self.quality.reason if self.quality.data is None else unscored
        if not why and dominated(taken, False):
            live.score(self.quality)
            taken = [replace(m, readings={**live.readings, **m.readings}) for m in taken]
            why = dominated(taken, False)
        return tuple(replace(m, notes={**_noted(live), SCREENED: why}) for m in taken) if why else ()

    def _warm(self, live: Live, baseline: Live, answer: Answer) -> Measurement:
        """Return measurements from the warm-up's last answer, relative to the baseline's pace."""
        workload = self.workloads[0]
        pace = self._pace(baseline, workload)
        whole = [a.ttft_s + a.tpot_s * (workload.output - 1) for a in (answer, pace)]
        mine = {
            "ttft_s": answer.ttft_s,
            "tpot_s": answer.tpot_s,
            "e2e_s": whole[0],
            "output_tokens_per_s": 1 / whole[0],
        }
        theirs = {"ttft_s": pace.ttft_s, "tpot_s": pace.tpot_s, "e2e_s": whole[1], "output_tokens_per_s": 1 / whole[1]}
        ratios = {name: statistics.exact(mine[name] / theirs[name]) for name in mine if theirs[name] > 0}
        rounds = Rounds(workload, self._order, self.protocol)
        return replace(self._bare(live, rounds, dict(live.readings)), ratios=ratios)

    def _short(self, live: Live, workload: Workload) -> Measurement:
        """Return measurements from a few rounds of short answers with the baseline."""
        baseline = self._baseline
        assert baseline is not None
        live.decode_steps = baseline.decode_steps = min(LEAST_TOKENS, workload.output)
        rounds = Rounds(workload, self._order, replace(self.protocol, reopen_s=0.0))
        for _ in range(BRIEF):
            rounds.run([baseline, live])
        live.decode_steps = WHOLE
        mine, theirs = rounds.taken[live], rounds.taken[baseline]
        names = [name for name in TIMED if min(*mine[name], *theirs[name]) > 0]
        ratios = {
            name: statistics.few_of([a / b for a, b in zip(mine[name], theirs[name], strict=True)]) for name in names
        }
        return replace(
            self._bare(live, rounds, {**live.readings, **{name: statistics.few_of(mine[name]) for name in names}}),
            ratios=ratios,
        )

    def race(self, subjects: Sequence[Subject], contenders: Contenders | None = None) -> list[tuple[Measurement, ...]]:
        """Measure the survivors again, all of them and the baseline in every round; the baseline is measured too.

        Time left after the common rounds goes to the variants that `contenders` returns, until it returns none.
        Everything from the first worker's start on counts as time of the race, which has `race_seconds` for each
        workload; a variant that is too slow for it is left out of the result (see `budget`).
        """
        begin = monotonic()
        asked = [s for s in subjects if not self._is_baseline(s)]
        racers = self._affordable(asked)
        slow = len(asked) - len(racers)
        told = f"the {slow} slowest of {len(asked)} survivors stand as they were screened" if slow else ""
        fresh = [Live(s, self.limits) for s in racers]
        lives = [*([self._baseline] if self._baseline else []), *fresh]
        try:
            for live in fresh:
                self._enter(live)
            ends = [begin + self.protocol.race_seconds * (i + 1) for i in range(len(self.workloads))]
            by_workload = [
                self._race(lives, w, end, contenders, told) for w, end in zip(self.workloads, ends, strict=True)
            ]
        except ChildFailed:
            return []  # earlier measurements remain valid; a survivor that fails now has a complete one
        finally:
            for live in fresh:
                live.child.close()
        return [tuple(of_live) for of_live in zip(*by_workload, strict=True)]

    def _affordable(self, subjects: Sequence[Subject]) -> list[Subject]:
        """Return the subjects that the race has time for on every workload; one with an unknown pace takes part."""
        out: set[str] = set()
        for workload in self.workloads:
            known = [s for s in subjects if (s.variant, workload.name) in self._paces]
            if len(known) < len(subjects):
                continue
            planned = self._plan(known, workload, self.protocol.race_seconds, starts=True)
            out |= {s.variant for i, s in enumerate(known) if i not in planned.racers}
        return [s for s in subjects if s.variant not in out] if len(out) < len(subjects) - 1 else list(subjects[:2])

    def _plan(self, subjects: Sequence[Subject], workload: Workload, seconds: float, starts: bool) -> Plan:
        baseline = None if self._baseline is None else self._pace(self._baseline, workload)
        paces = [self._paces[s.variant, workload.name] for s in subjects]
        return plan(paces, baseline, workload.output, seconds, self.protocol, starts)

    def _pace(self, live: Live, workload: Workload) -> Pace:
        """Return a variant's pace: from its screening, else from one short answer."""
        key = live.subject.variant, workload.name
        if key not in self._paces:
            live.decode_steps = LEAST_TOKENS
            answer = live.answers(workload, 0.0)[0]
            self._keep_pace(live, workload, answer.ttft_s, answer.tpot_s)
        return self._paces[key]

    def _keep_pace(self, live: Live, workload: Workload, ttft_s: float, tpot_s: float) -> None:
        reopen = live.load_s if live.load_s < self.protocol.reopen_s else 0.0
        self._paces[live.subject.variant, workload.name] = Pace(ttft_s, tpot_s, reopen)

    def _enter(self, live: Live) -> None:
        known = self._prepared.get(live.subject.variant)
        if known is None:
            live.prepare(self.workloads[0], self.quality, self.protocol.warmup_s)
            return
        live.decode_steps = LEAST_TOKENS  # each visit begins with untimed work: this only checks that the variant runs
        live.resume(known, self.workloads[0], self.protocol.warmup_s)

    def _is_baseline(self, subject: Subject) -> bool:
        return self._baseline is not None and subject.variant == self._baseline.subject.variant

    def close(self) -> None:
        """End the baseline's worker."""
        if self._baseline is not None:
            self._baseline.child.close()
            self._baseline = None

    def _fit_baseline(self, workload: Workload) -> str:
        """Shorten the baseline's rounds where a whole answer takes too long; return a note if so."""
        if self._baseline is None:
            return ""
        pace = self._pace(self._baseline, workload)
        steps = baseline_tokens(pace, workload.output, self.protocol)
        self._baseline.decode_steps = steps
        return self._shortened(workload)

    def _shortened(self, workload: Workload) -> str:
        if self._baseline is None or self._baseline.decode_steps >= workload.output:
            return ""
        return f"baseline rounds shortened to {self._baseline.decode_steps} of {workload.output} output tokens"

    # --- rounds --------------------------------------------------------------------------------------------------

    def _screen(self, live: Live, workload: Workload) -> Measurement:
        """Measure one variant with the baseline, or the baseline alone with whole answers."""
        alone, protocol = live is self._baseline, self.protocol
        notes = {"baseline": "" if alone else self._fit_baseline(workload)}
        if alone:
            live.decode_steps = WHOLE
        live.warm(workload, 0.0)
        entrants = list(dict.fromkeys([*([self._baseline] if self._baseline else []), live]))
        rounds, end = Rounds(workload, self._order, protocol), monotonic() + protocol.seconds
        while rounds.done < protocol.rounds or (rounds.done < protocol.most_rounds and monotonic() < end):
            rounds.run(entrants)
        energy = EnergyRounds(workload, self._order)
        energy.run(entrants, protocol.energy_windows, SCREEN_STEPS, protocol.energy_seconds)
        notes["noise"] = rounds.noisy(self._baseline)
        made = self._measurement(live, rounds, energy, notes)
        self._keep_pace(live, workload, made.readings["ttft_s"].median, made.readings["tpot_s"].median)
        return made

    def _race(
        self, lives: Sequence[Live], workload: Workload, end: float, contenders: Contenders | None, told: str
    ) -> list[Measurement]:
        protocol, racers = self.protocol, [live for live in lives if live is not self._baseline]
        for live in lives:
            self._pace(live, workload)
        planned = self._plan([live.subject for live in racers], workload, end - monotonic(), starts=False)
        for live in racers:
            live.decode_steps = planned.tokens
        if self._baseline is not None:
            self._baseline.decode_steps = planned.baseline_tokens
            pace = self._pace(self._baseline, workload)
            end -= planned.last_visits * pace.visit_s(planned.baseline_tokens, protocol.visit_s)
        notes = {"baseline": self._shortened(workload), "race": "; ".join(t for t in (told, planned.note) if t)}
        begin, rounds = monotonic(), Rounds(workload, self._order, protocol)
        entrants = list(lives)
        for look in protocol.looks():
            while rounds.done < look and (rounds.done < protocol.rounds or monotonic() + rounds.last_s <= end):
                rounds.run(entrants)
            if rounds.done < look or contenders is None:
                break
            visit = (monotonic() - begin) / sum(len(rounds.taken[live]["tpot_s"]) for live in lives)
            reach = rounds.done + (end - monotonic()) / (2 * visit)
            left = contenders([self._sampled(live, rounds) for live in lives], reach)
            entrants = [live for live in entrants if live.subject.variant in left]
            if len(entrants) < 2:
                break
        if self._baseline is not None and self._baseline not in entrants:
            rounds.close(self._baseline, planned.last_visits)
        energy = EnergyRounds(workload, self._order)
        energy.run(lives, protocol.race_energy_windows, RANK_STEPS, protocol.race_energy_seconds)
        notes["noise"] = rounds.noisy(self._baseline)
        return [self._measurement(live, rounds, energy, notes) for live in lives]

    # --- measurements --------------------------------------------------------------------------------------------

    def _sampled(self, live: Live, rounds: Rounds) -> Measurement:
        """Return intermediate results of a race: medians and samples, without intervals."""
        taken = rounds.samples(live, self.protocol.rounds)
        middle = {name: statistics.middle(taken[name]) for name in TIMED}
        timed = {name: Reading(m, m, m, tuple(taken[name])) for name, m in middle.items()}
        return self._bare(live, rounds, {**live.readings, **timed})

    def _bare(self, live: Live, rounds: Rounds, readings: dict[str, Reading]) -> Measurement:
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

    def _measurement(self, live: Live, rounds: Rounds, energy: EnergyRounds, notes: dict[str, str]) -> Measurement:
        taken = self._samples(live, rounds, energy)
        timed = {name: statistics.median_of(values) for name, values in taken.items()}
        gaps = statistics.percentile_of(rounds.gaps_s[live], 0.99)
        tail = {} if gaps is None else {"itl_p99_s": gaps}
        absent = self._without_energy(live, energy)
        if self.roofline is None:
            busy = "the machine was busy or its limits could not be measured"
            cpu = shares_memory(live.subject.driver)
            absent["limits"] = f"absent: {busy if cpu else 'limits are measured of CPUs alone'}"
        bare = self._bare(live, rounds, {**live.readings, **timed, **tail, **self._fractions(live, rounds, timed)})
        source = live.meter().source
        noisy = ", ".join(t for t in (notes["noise"], energy.noisy(live)) if t)
        return replace(
            bare,
            ratios=self._ratios(live, taken, rounds, energy),
            notes={**_noted(live), **{k: v for k, v in {**notes, "noise": noisy}.items() if v}, **absent},
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

    def _ratios(self, live: Live, mine: Samples, rounds: Rounds, energy: EnergyRounds) -> dict[str, Reading]:
        """Return the ratios to the baseline over the common rounds; energy only where one meter read both."""
        baseline = self._baseline
        if baseline is None:
            return {}
        theirs = self._samples(baseline, rounds, energy)
        if live.meter().source != baseline.meter().source:
            theirs.pop(ENERGY, None)
        both = {name: list(zip(mine[name], theirs[name], strict=False)) for name in mine if name in theirs}
        return {
            name: statistics.paired_ratio([a for a, _ in pairs], [b for _, b in pairs])
            for name, pairs in both.items()
            if pairs
        }

    def _fractions(self, live: Live, rounds: Rounds, timed: dict[str, Reading]) -> dict[str, Reading]:
        """Return the shares of the machine's limits that a variant reaches; nothing where the limits are unknown."""
        if self.roofline is None:
            return {}
        subject = live.subject
        done = work(abi_from(subject.abi), subject.parameter_bytes, rounds.workload)
        found = fractions(self.roofline.of(subject.driver, subject.workers), done, timed["tpot_s"], timed["ttft_s"])
        integer = found.prefill_of_int8 if subject.integer else None
        return {"bandwidth_fraction": found.decode_of_bandwidth, "peak_fraction": integer or found.prefill_of_f32}


def _noted(live: Live) -> dict[str, str]:
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
