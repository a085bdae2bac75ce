"""The highest rate of requests that a variant holds within bounds, by its load curve and a simulated clock."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from llmbuild.errors import InputError
from llmbuild.serve.cores import Cores
from llmbuild.serve.schedule.state import Scheduler
from llmbuild.serve.simulate import Arrival, Host, Simulated, simulate
from llmbuild.spec.load_curve import LoadCurve, Work
from llmbuild.spec.slo import Bound, LoadMetric, load_metric

SEEDS, REQUESTS = (0, 1, 2), 200
"""Draws of arrivals, and requests of each: 600 together, of which a 99th percentile needs 459."""
SPREAD = 0.6
"""Standard deviation of the logarithm of lengths."""
_STEPS = 5
"""Halvings of a factor of two in which the highest rate lies: to 2 %."""
_ALONE = 1 / 512
"""At this part of a full server's rate, requests hardly meet: what is not held there is not held."""
_GROWTH = 2.0
"""A queue that is longer by this factor in the last quarter of a run than in the second grows without end."""


@dataclass(frozen=True)
class Lengths:
    """Medians of the tokens of prompts and answers; both are log-normal, and cut to the context."""

    prompt: int = 128
    output: int = 64

    def __str__(self) -> str:
        return f"prompts of {self.prompt} and answers of {self.output} tokens (medians, log-normal, sigma {SPREAD})"

    def drawn(self, draw: random.Random, context: int) -> tuple[int, int]:
        """Return the lengths of one request."""
        prompt = round(self.prompt * math.exp(draw.gauss(0.0, SPREAD)))
        prompt = min(max(prompt, 1), context - 1)
        output = round(self.output * math.exp(draw.gauss(0.0, SPREAD)))
        return prompt, min(max(output, 1), context - prompt)


def parse_lengths(text: str) -> Lengths:
    """Return the lengths of `PROMPT:OUTPUT`.

    Raises:
        InputError: not two positive numbers.
    """
    prompt, _, output = text.partition(":")
    if not (prompt.isascii() and prompt.isdigit() and output.isascii() and output.isdigit()):
        raise InputError(f"cannot read --lengths {text!r}: write PROMPT:OUTPUT in tokens, such as 128:64")
    found = Lengths(int(prompt), int(output))
    if not (0 < found.prompt <= 1 << 20 and 0 < found.output <= 1 << 20):
        raise InputError(f"--lengths {text}: give 1 to {1 << 20} tokens each")
    return found


def parse_rate(text: str) -> float:
    """Return the requests per second of `5/s`.

    Raises:
        InputError: not a positive rate.
    """
    try:
        found = float(text.removesuffix("/s"))
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise InputError(f"cannot read --rate {text!r}: write requests per second, such as 5/s")
    return found


@dataclass(frozen=True)
class Server:
    """A server that may be: its curve, what it has, and how it schedules."""

    curve: LoadCurve
    host: Host
    scheduler: Scheduler
    name: str = ""
    """The scheduler's name."""
    slower: float = 1.0
    """By which factor steps take longer than the curve says."""

    def step_s(self, work: Work) -> float:
        """Return the seconds of a step, with what the server itself takes."""
        return self.curve.served_s(work) * self.slower

    @property
    def request_s(self) -> float:
        """Return the seconds that the server takes for a request besides its steps."""
        return (self.curve.own.request_s + self.curve.own.end_s) * self.slower


@dataclass(frozen=True)
class Outcome:
    """What requests at a rate would see: percentiles by the names of `LoadMetric`, NaN where there is nothing."""

    rate: float
    values: dict[str, float]
    steady: bool
    """Whether the queue does not grow without end."""
    output_tokens_per_s: float
    sequences: float
    """Mean number of sequences in a step."""
    outside: float
    """Share of steps that are larger than those that were measured."""

    def misses(self, bounds: Sequence[Bound]) -> list[str]:
        """Return what is not held."""
        told = [] if self.steady else ["the queue grows without end"]
        for bound in bounds:
            if not bound.holds(self.values[bound.metric]):
                told.append(f"{bound.metric} is {self.values[bound.metric]:.4g}, {bound} asked")
        return told


@dataclass(frozen=True)
class Capacity:
    """The highest rate that is held within bounds, and what requests see at it.

    `sure` is the rate that is held where every step takes longer by the curve's error.
    """

    server: Server
    lengths: Lengths
    bounds: tuple[Bound, ...]
    rate: float
    sure: float
    outcome: Outcome | None


def outcome(
    server: Server, rate: float, lengths: Lengths, bounds: Sequence[Bound] = (), seeds: Sequence[int] = SEEDS
) -> Outcome:
    """Return what Poisson arrivals at a rate see of a server, over all seeds."""
    runs = [_run(server, rate, lengths, seed) for seed in seeds]
    lives = [life for run in runs for life in run.lives]
    wanted = {bound.metric for bound in bounds} | {"ttft_s_p99", "tpot_s_p99", "e2e_s_p99", "ttft_s_p50", "tpot_s_p50"}
    taken: dict[str, list[float]] = {
        "ttft_s": sorted(one.ttft_s for one in lives),
        "tpot_s": sorted(one.tpot_s for one in lives if one.tpot_s is not None),
        "e2e_s": sorted(one.e2e_s for one in lives),
    }
    seconds, steps = sum(run.end_s for run in runs), sum(run.steps for run in runs)
    tokens = sum(one.tokens for one in lives)
    return Outcome(
        rate,
        {name: _percentile(taken, load_metric(name)) for name in sorted(wanted)},
        all(_steady(run) for run in runs),
        tokens / seconds,
        tokens / steps,
        sum(run.outside for run in runs) / steps,
    )


def _run(server: Server, rate: float, lengths: Lengths, seed: int) -> Simulated:
    draw, now = random.Random(seed), 0.0
    arrivals = []
    for _ in range(REQUESTS):
        now += draw.expovariate(1.0) / rate
        prompt, output = lengths.drawn(draw, server.host.context)
        arrivals.append(Arrival(now, prompt, output))
    of = server
    cores = Cores(of.curve.own)
    return simulate(arrivals, of.scheduler, of.host, of.step_s, of.curve.covers, request_s=of.request_s, cores=cores)


def _percentile(taken: dict[str, list[float]], metric: LoadMetric) -> float:
    values = taken[metric.base]
    return values[math.ceil(metric.share * len(values)) - 1] if values else math.nan


def _steady(run: Simulated) -> bool:
    count = len(run.waiting) // 4
    second, last = run.waiting[count : 2 * count], run.waiting[-count:]
    return sum(last) / count <= _GROWTH * (sum(second) / count + 1)


def capacity(server: Server, lengths: Lengths, bounds: Sequence[Bound]) -> Capacity:
    """Return the highest rate that a server holds, to 2 %; 0 where it holds none."""
    limits = tuple(bounds)
    begun = roughly(server, lengths, limits) or _guess(server, lengths)
    rate, seen = _highest(server, lengths, limits, begun, SEEDS)
    slower = replace(server, slower=server.slower * (1 + server.curve.error_p95))
    sure = _highest(slower, lengths, limits, rate, SEEDS)[0] if rate else 0.0
    return Capacity(server, lengths, limits, rate, sure, seen)


def roughly(server: Server, lengths: Lengths, bounds: Sequence[Bound]) -> float:
    """Return about the highest rate that a server holds, by the arrivals of one seed."""
    return _highest(server, lengths, tuple(bounds), _guess(server, lengths), SEEDS[:1])[0]


def _guess(server: Server, lengths: Lengths) -> float:
    """Return a rate that is hardly held: requests at the pace of full steps."""
    host, middle = server.host, server.host.context // 2
    slots = max(1, min(host.slots, server.curve.decodes_most))
    full = server.step_s(Work.of([(middle, 1)] * slots)) / slots
    prompt = server.step_s(Work.of([(0, min(lengths.prompt, host.context))]))
    return 1.0 / (prompt + full * lengths.output)


def _highest(
    server: Server, lengths: Lengths, bounds: tuple[Bound, ...], first: float, seeds: Sequence[int]
) -> tuple[float, Outcome | None]:
    """Return the highest rate that is held, and what it comes to; the search begins at `first`."""

    def at(rate: float) -> Outcome:
        return outcome(server, rate, lengths, bounds, seeds)

    low, held = first, at(first)
    if held.misses(bounds):
        if at(first * _ALONE).misses(bounds):
            return 0.0, None
        while held.misses(bounds):
            low /= 2
            held = at(low)
    else:
        while not (higher := at(low * 2)).misses(bounds):
            low, held = low * 2, higher
    factor = 2.0
    for _ in range(_STEPS):
        factor = math.sqrt(factor)
        found = at(low * factor)
        if not found.misses(bounds):
            low, held = low * factor, found
    return low, held
