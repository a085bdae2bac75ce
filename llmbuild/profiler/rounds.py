"""Interleaved rounds: every participant answers once in every round, in random order.

A participant that leaves does not return, so samples of equal index are of the same round and form pairs.
"""

from __future__ import annotations

import random
import secrets
from collections import defaultdict
from collections.abc import Sequence
from time import monotonic

from llmbuild.profiler import noise, statistics
from llmbuild.profiler.live import Live
from llmbuild.profiler.protocol import Protocol
from llmbuild.spec.workload import Workload

Samples = dict[str, list[float]]

IDLE_STEPS = 10
"""Updates of the meter in the window of idle power, which is shown and ranks nothing."""


class Rounds:
    """The rounds of one workload, with the disturbances of each."""

    def __init__(self, workload: Workload, order: random.Random, protocol: Protocol) -> None:
        self.workload, self.protocol = workload, protocol
        self.name = secrets.token_hex(8)
        self.taken: dict[Live, Samples] = {}
        self.gaps_s: dict[Live, list[float]] = defaultdict(list)
        self.shares: list[noise.Shares] = []
        self.clocks_khz: list[int] = []
        self.last_s = 0.0
        """Seconds of the last round."""
        self._last: list[float] = []
        self._order = order

    @property
    def done(self) -> int:
        """Number of completed rounds."""
        return len(self.shares)

    def run(self, entrants: Sequence[Live]) -> None:
        """Run one round; participants are those of the last one, or fewer."""
        begin, watch = monotonic(), noise.Watch([live.child.pid for live in entrants])
        for live in self._order.sample(list(entrants), len(entrants)):
            if live.load_s < self.protocol.reopen_s:
                live.open(1)
            metrics, gaps = live.visit(self.workload, self.protocol.visit_s)
            samples = self.taken.setdefault(live, defaultdict(list))
            for name, value in metrics.items():
                samples[name].append(value)
            self.gaps_s[live] += gaps
        self.shares.append(watch.shares())
        self.clocks_khz.append(noise.clock_khz())
        self.last_s = monotonic() - begin

    def close(self, baseline: Live, visits: int) -> None:
        """Visit the baseline again at the end, where it had left: these samples are compared with its first ones."""
        name = _whole(baseline)
        self._last = [baseline.visit(self.workload, self.protocol.visit_s)[0][name] for _ in range(visits)]

    def kept(self, live: Live, least: int) -> list[int]:
        """Return the rounds of a subject that count: without disturbed ones, where at least `least` others remain.

        Those who stayed longer than `least` rounds keep the same ones: equal places in their samples are pairs.
        """
        alike = [other for other in self.taken if other is live or self._count(other) > least]
        calm = [i for i in range(self._count(live)) if not self.shares[i].disturbed]
        enough = all(sum(not self.shares[i].disturbed for i in range(self._count(o))) >= least for o in alike)
        return calm if enough else list(range(self._count(live)))

    def samples(self, live: Live, least: int) -> Samples:
        """Return a subject's samples of the rounds that count."""
        kept = self.kept(live, least)
        return {name: [values[i] for i in kept] for name, values in self.taken.get(live, {}).items()}

    def pairs(self, mine: Live, theirs: Live, least: int) -> dict[str, list[tuple[float, float]]]:
        """Return the samples of two subjects in the rounds that count for both."""
        both = [i for i in self.kept(mine, least) if i in set(self.kept(theirs, least))]
        ours, others = self.taken.get(mine, {}), self.taken.get(theirs, {})
        return {name: [(ours[name][i], others[name][i]) for i in both] for name in ours if name in others}

    def _count(self, live: Live) -> int:
        return len(next(iter(self.taken.get(live, {}).values()), []))

    def noisy(self, baseline: Live | None) -> str:
        """Return what disturbed the rounds, or the baseline's drift; empty when there was neither."""
        told = [noise.description(self.shares, self.clocks_khz)]
        if baseline is not None and baseline in self.taken:
            moved = statistics.drift([*self.taken[baseline][_whole(baseline)], *self._last])
            if moved is not None:
                told.append(f"the baseline drifted by {moved - 1:+.0%} between the first and the last half")
        return ", ".join(t for t in told if t)


def _whole(live: Live) -> str:
    """Return the metric that all of a visit's time is in."""
    return "e2e_s" if live.prompt is None else "tpot_s"


class EnergyRounds:
    """Windows of equal length for all participants in turn: joules per output token, and why some have none."""

    def __init__(self, workload: Workload, order: random.Random) -> None:
        self.workload, self._order = workload, order
        self.taken: dict[Live, list[float]] = {}
        self.lost: dict[Live, str] = {}
        self.facts: dict[Live, dict[str, float | str]] = {}

    def run(self, entrants: Sequence[Live], rounds: int, steps: int, seconds: float) -> None:
        """Run up to `rounds`; none begins after `seconds`. A subject without a meter takes no part."""
        metered = [live for live in entrants if live.meter().source]
        end = monotonic() + seconds
        for live in metered:
            self._idle(live)
        for done in range(rounds):
            if done and monotonic() >= end:
                return
            for live in self._order.sample(metered, len(metered)):
                self._window(live, steps)

    def _idle(self, live: Live) -> None:
        found = live.idle(IDLE_STEPS)
        facts = dict(live.meter().facts)
        if found.joules is not None and found.seconds:
            facts["idle_w"] = found.joules / found.seconds
        self.facts[live] = facts

    def _window(self, live: Live, steps: int) -> None:
        if live in self.lost:
            return
        found = live.energy(self.workload, steps)
        if found.joules is None:
            self.lost[live] = found.reason
            self.taken.pop(live, None)
            return
        self.taken.setdefault(live, []).append(found.joules / found.tokens)
        facts = self.facts[live]
        facts |= {"windows": len(self.taken[live]), "window_s": found.seconds, **found.conditions}

    def noisy(self, live: Live) -> str:
        """Return what throttled the metered device; empty when nothing did."""
        held = self.facts.get(live, {}).get("throttled")
        return f"the device was held back: {held}" if held else ""

    def samples(self, live: Live) -> list[float]:
        """Return joules per output token, window by window."""
        return self.taken.get(live, [])
