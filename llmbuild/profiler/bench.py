"""Measure variants against the baseline in interleaved rounds: both run in every round, in random order.

Absolute readings drift with the machine; the paired ratio to a baseline of the same round does not.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import monotonic

from llmbuild.process.child import Limits
from llmbuild.profiler import budget, statistics
from llmbuild.profiler.budget import BRIEF, LEAST_TOKENS, Pace, Plan, baseline_tokens, plan
from llmbuild.profiler.child import Child, ChildFailed
from llmbuild.profiler.live import WHOLE, Answer, Live
from llmbuild.profiler.meters import estimate
from llmbuild.profiler.meters.meter import RANK_STEPS, SCREEN_STEPS
from llmbuild.profiler.protocol import (
    Contenders,
    Decided,
    Dominated,
    Prepared,
    Protocol,
    Quality,
    Stage,
    Subject,
    Tell,
)
from llmbuild.profiler.readings import Known, Reader, noted
from llmbuild.profiler.roofline import Roofline
from llmbuild.profiler.rounds import EnergyRounds, Rounds
from llmbuild.runtime.memory import shares_memory
from llmbuild.spec.measurement import SCREENED, Measurement
from llmbuild.spec.variant import Failure
from llmbuild.spec.workload import Workload


@dataclass(frozen=True)
class Spare:
    """A worker that starts while the next variant is compiled, for variants of drivers that `shares` memory or not."""

    shares: bool
    child: Child


class Bench:
    """The meter of one build: keeps the baseline's worker running, so that every candidate is paired with it.

    What a subject is `known` for is not measured again. `tell` is told what is done, for whoever waits. One class: all
    of its steps (check, screen, rounds, race) use the same running workers.
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
        self.tell: Tell = lambda _: None
        self._order = random.Random(0)
        self._baseline: Live | None = None
        self._alone: dict[str, Known] = {}
        """The baseline's readings alone, by workload."""
        self._spare: Spare | None = None
        self._prepared: dict[str, Prepared] = {}
        self._paces: dict[tuple[str, str], Pace] = {}

    @property
    def has_baseline(self) -> bool:
        """Return whether a baseline is open for pairing."""
        return self._baseline is not None

    def measure(
        self,
        subject: Subject,
        baseline: bool = False,
        dominated: Dominated | None = None,
        decided: Decided | None = None,
    ) -> tuple[Measurement, ...] | Failure:
        """Return a measurement for each workload; a `baseline` stays open, and all later ones are paired with it.

        A variant that is `dominated` after a few rounds has only those, with a note and wide intervals. One that is
        `decided` after the least rounds has no more.
        """
        live = self._start(subject)
        try:
            self._open(live)
            brief = () if baseline or dominated is None else self._brief(live, dominated)
            if brief:
                return self._finished(live, brief)
            self.tell(Stage("check"))
            live.complete(self.quality)
            if baseline:
                self._become_baseline(live)
            return self._finished(live, tuple(self._screen(live, w, decided) for w in self.workloads))
        except ChildFailed as error:
            return error.failure
        finally:
            if live is not self._baseline:
                live.child.close()
            self._spare = self._spare or Spare(shares_memory(subject.driver), Live.start(subject.driver, self.limits))

    def open_baseline(self, subject: Subject) -> Failure | None:
        """Open the baseline for pairing without measuring it; return why that failed."""
        live = self._start(subject)
        try:
            self._open(live)
        except ChildFailed as error:
            live.child.close()
            return error.failure
        self._become_baseline(live)
        return None

    def _start(self, subject: Subject) -> Live:
        known = subject.known or self._prepared.get(subject.variant)
        live = Live(replace(subject, known=known), self.limits, self._taken(subject.driver))
        self._learn_paces(live.subject)
        return live

    def _taken(self, driver: str) -> Child | None:
        """Take the spare worker, if it suits a driver and runs."""
        spare, self._spare = self._spare, None
        if spare is None or (spare.shares == shares_memory(driver) and spare.child.running):
            return spare.child if spare else None
        spare.child.close()
        return None

    def _open(self, live: Live) -> None:
        self.tell(Stage("check"))
        workload = self.workloads[0]
        live.begin(workload, self.protocol.warmup_s)
        if live.last is not None and (live.subject.variant, workload.name) not in self._paces:
            self._keep_pace(live.subject, workload, live.last.ttft_s, live.last.tpot_s, live.load_s)

    def _become_baseline(self, live: Live) -> None:
        self._end_baseline()
        self._baseline, known = live, live.subject.known
        self._alone = {
            name: Known(timed["ttft_s"], timed["tpot_s"])
            for name, timed in (known.timed if known else {}).items()
            if "ttft_s" in timed and "tpot_s" in timed
        }

    def _finished(self, live: Live, measured: tuple[Measurement, ...]) -> tuple[Measurement, ...]:
        known = Prepared.of(measured)
        if known is not None:
            self._prepared[live.subject.variant] = known
        return measured

    @property
    def _reader(self) -> Reader:
        return Reader(self.machine, self.protocol, self.roofline, self._baseline, self._alone)

    # --- the short screen ----------------------------------------------------------------------------------------

    def _brief(self, live: Live, dominated: Dominated) -> tuple[Measurement, ...]:
        """Return brief measurements where they show that the variant is dominated, else nothing.

        The warm-up's last answer decides whether rounds are run, and these decide whether quality is scored.
        """
        if self._baseline is None or live.last is None:
            return ()
        if not dominated([self._warm(live, self._baseline, live.last)], False):
            return ()
        self.tell(Stage("measure"))
        taken = [self._short(live, w) for w in self.workloads]
        why = dominated(taken, True)
        if why and "quality_kl" not in live.readings:
            unscored = "absent: not scored, since nothing it could be would have mattered"
            live.notes["quality"] = self.quality.reason if self.quality.data is None else unscored
        if not why and dominated(taken, False):
            live.score(self.quality)
            taken = [replace(m, readings={**live.readings, **m.readings}) for m in taken]
            why = dominated(taken, False)
        return tuple(replace(m, notes={**noted(live), SCREENED: why}) for m in taken) if why else ()

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
        return replace(self._reader.bare(live, rounds, dict(live.readings)), ratios=ratios)

    def _short(self, live: Live, workload: Workload) -> Measurement:
        """Return measurements from a few rounds of short answers with the baseline."""
        baseline = self._baseline
        assert baseline is not None
        self._fit_baseline(workload)
        live.decode_steps = baseline.decode_steps = min(LEAST_TOKENS, workload.output)
        rounds = Rounds(workload, self._order, replace(self.protocol, reopen_s=0.0))
        for _ in range(BRIEF):
            rounds.run([baseline, live])
        live.decode_steps = WHOLE
        return self._reader.brief(live, rounds)

    # --- paces ---------------------------------------------------------------------------------------------------

    def _learn_paces(self, subject: Subject) -> None:
        """Take the paces that are known of a subject."""
        known = subject.known or self._prepared.get(subject.variant)
        if known is None:
            return
        load_s = known.readings["load_s"].median if "load_s" in known.readings else self.protocol.reopen_s
        for workload in self.workloads:
            timed = known.timed.get(workload.name, {})
            if "ttft_s" in timed and "tpot_s" in timed and (subject.variant, workload.name) not in self._paces:
                self._keep_pace(subject, workload, timed["ttft_s"].median, timed["tpot_s"].median, load_s)

    def _pace(self, live: Live, workload: Workload) -> Pace:
        """Return a variant's pace: a known one, that of its screening, else that of one short answer."""
        key = live.subject.variant, workload.name
        if key not in self._paces:
            live.decode_steps, live.prompt = LEAST_TOKENS, None
            answer = live.answers(workload, 0.0)[0]
            live.decode_steps = WHOLE
            self._keep_pace(live.subject, workload, answer.ttft_s, answer.tpot_s, live.load_s)
        return self._paces[key]

    def _keep_pace(self, subject: Subject, workload: Workload, ttft_s: float, tpot_s: float, load_s: float) -> None:
        reopen = load_s if load_s < self.protocol.reopen_s else 0.0
        self._paces[subject.variant, workload.name] = Pace(ttft_s, tpot_s, reopen)

    def _beside(self, workload: Workload) -> Pace | None:
        """Return the baseline's pace beside others: without its prompt, where that is slow and known."""
        if self._baseline is None:
            return None
        pace, known = self._pace(self._baseline, workload), self._alone.get(workload.name)
        slow = known is not None and known.ttft_s.median > self.protocol.baseline_round_s and workload.output > 1
        self._baseline.prompt = known.ttft_s if known is not None and slow else None
        return replace(pace, ttft_s=0.0) if slow else pace

    # --- rounds --------------------------------------------------------------------------------------------------

    def _fit_baseline(self, workload: Workload) -> str:
        """Shorten the baseline's rounds where a whole answer takes too long; return a note if so."""
        pace = self._beside(workload)
        if pace is None or self._baseline is None:
            return ""
        self._baseline.decode_steps = baseline_tokens(pace, workload.output, self.protocol)
        return self._shortened(workload)

    def _shortened(self, workload: Workload) -> str:
        baseline = self._baseline
        if baseline is None or baseline.decode_steps >= workload.output:
            return ""
        told = f"baseline rounds shortened to {baseline.decode_steps} of {workload.output} output tokens"
        if baseline.prompt is None:
            return told
        return f"{told}, without the prompt: it takes {baseline.prompt.median:.2g} s, and was read before"

    def _screen(self, live: Live, workload: Workload, decided: Decided | None) -> Measurement:
        """Measure one variant with the baseline, or the baseline alone with answers as long as there is time for."""
        alone, protocol, pace = live is self._baseline, self.protocol, self._pace(live, workload)
        if alone:
            live.prompt = None
        screen = budget.screen(pace, workload.output, protocol)
        shortened = screen.note(pace, workload.output)
        notes = {"baseline": shortened} if alone else {"baseline": self._fit_baseline(workload), "answers": shortened}
        live.decode_steps = screen.tokens
        entrants = list(dict.fromkeys([*([self._baseline] if self._baseline else []), live]))
        rounds, end = Rounds(workload, self._order, protocol), monotonic() + protocol.seconds
        while rounds.done < screen.rounds or (rounds.done < protocol.most_rounds and monotonic() < end):
            rounds.run(entrants)
            self.tell(Stage("measure", rounds.done, max(rounds.done, screen.rounds)))
            if decided is not None and rounds.done in (screen.rounds, 2 * screen.rounds) and monotonic() < end:
                nothing = EnergyRounds(workload, self._order)
                if decided(self._reader.whole(live, rounds, nothing, {})):
                    break
        energy = EnergyRounds(workload, self._order)
        metered = [one for one in entrants if one.prompt is None]
        energy.run(metered, protocol.energy_windows, SCREEN_STEPS, protocol.energy_seconds)
        notes["noise"] = rounds.noisy(self._baseline)
        made = self._reader.whole(live, rounds, energy, notes)
        ttft, tpot = made.readings["ttft_s"], made.readings["tpot_s"]
        self._keep_pace(live.subject, workload, ttft.median, tpot.median, live.load_s)
        if alone:
            self._alone[workload.name] = Known(ttft, tpot)
        return made

    # --- the race ------------------------------------------------------------------------------------------------

    def race(self, subjects: Sequence[Subject], contenders: Contenders | None = None) -> list[tuple[Measurement, ...]]:
        """Measure the survivors again, all of them and the baseline in every round; the baseline is measured too.

        Time left after the common rounds goes to the variants that `contenders` returns, until it returns none.
        Everything from the first worker's start on counts as time of the race, which has `race_seconds` for each
        workload; a variant that is too slow for it is left out of the result (see `budget`). What is not known of a
        variant is measured first.
        """
        begin = monotonic()
        asked = [s for s in subjects if not self._is_baseline(s)]
        for subject in asked:
            self._learn_paces(subject)
        racers = self._affordable(asked)
        slow = len(asked) - len(racers)
        told = f"the {slow} slowest of {len(asked)} survivors stand as they were screened" if slow else ""
        fresh = [self._start(s) for s in racers]
        lives = [*([self._baseline] if self._baseline else []), *fresh]
        try:
            for live in fresh:
                self._open(live)
            for live in lives:
                live.complete(self.quality)
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
        paces = [self._paces[s.variant, workload.name] for s in subjects]
        return plan(paces, self._beside(workload), workload.output, seconds, self.protocol, starts)

    def _race(
        self, lives: Sequence[Live], workload: Workload, end: float, contenders: Contenders | None, told: str
    ) -> list[Measurement]:
        protocol, racers, baseline = self.protocol, [v for v in lives if v is not self._baseline], self._baseline
        for live in lives:
            self._pace(live, workload)
        planned = self._plan([live.subject for live in racers], workload, end - monotonic(), starts=False)
        for live in racers:
            live.decode_steps = planned.tokens
        if baseline is not None and (pace := self._beside(workload)) is not None:
            baseline.decode_steps = planned.baseline_tokens
            end -= planned.last_visits * pace.visit_s(planned.baseline_tokens, protocol.visit_s)
        notes = {"baseline": self._shortened(workload), "race": "; ".join(t for t in (told, planned.note) if t)}
        begin, rounds = monotonic(), Rounds(workload, self._order, protocol)
        entrants, leaves = list(lives), planned.baseline_rounds < protocol.race_rounds
        for look in protocol.looks():
            while rounds.done < look and (rounds.done < protocol.rounds or monotonic() + rounds.last_s <= end):
                if leaves and rounds.done == planned.baseline_rounds:
                    entrants = [live for live in entrants if live is not baseline]
                rounds.run(entrants)
                self.tell(Stage("race", rounds.done, look))
            if rounds.done < look or contenders is None:
                break
            visit = (monotonic() - begin) / sum(len(rounds.taken[live]["tpot_s"]) for live in lives)
            reach = rounds.done + (end - monotonic()) / (2 * visit)
            left = contenders([self._reader.sampled(live, rounds) for live in lives], reach)
            entrants = [live for live in entrants if live.subject.variant in left]
            if len(entrants) < 2:
                break
        if baseline is not None and baseline not in entrants:
            rounds.close(baseline, planned.last_visits)
        energy = EnergyRounds(workload, self._order)
        energy.run(lives, protocol.race_energy_windows, RANK_STEPS, protocol.race_energy_seconds)
        notes["noise"] = rounds.noisy(baseline)
        return [self._reader.whole(live, rounds, energy, notes) for live in lives]

    def _is_baseline(self, subject: Subject) -> bool:
        return self._baseline is not None and subject.variant == self._baseline.subject.variant

    def close(self) -> None:
        """End the workers."""
        if self._spare is not None:
            self._spare.child.close()
            self._spare = None
        self._end_baseline()

    def _end_baseline(self) -> None:
        if self._baseline is not None:
            self._baseline.child.close()
            self._baseline = None
