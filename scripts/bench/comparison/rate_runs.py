"""Runs of requests at rates as they are saved, and what came of those at one rate: goodput, percentiles, what holds."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from math import ceil, inf
from pathlib import Path
from statistics import fmean
from typing import Any

from comparison import saved
from comparison.nodes import Seen
from llmbuild.digest import plain
from llmbuild.errors import InputError
from llmbuild.profiler.statistics import least_samples
from llmbuild.serve.capacity import Lengths
from llmbuild.serve.drive import Heard, Sending
from llmbuild.spec.load_curve import LoadCurve, curve_from
from llmbuild.spec.slo import Bound, load_metric, parse_load

FORMAT = "goodput 1"
FIRST_SEED = 100
"""Of runs. `pick --rate` draws its arrivals from lower ones."""


@dataclass(frozen=True)
class Sampling:
    """How many runs there are at a rate, and how long they are."""

    seconds: float
    longest: float
    """Seconds of a run that has fewer requests than the percentiles need."""
    runs: int
    lengths: Lengths

    def draws(self, rate: float, bounds: Sequence[Bound], context: int) -> tuple[tuple[Sending, ...], ...]:
        """Return the requests of each run."""
        least = least_requests(bounds)
        return tuple(self._draw(rate, least, context, FIRST_SEED + number) for number in range(self.runs))

    def _draw(self, rate: float, least: int, context: int, seed: int) -> tuple[Sending, ...]:
        """Return requests that come independently of each other: of a seed alike at all rates, but for their times."""
        draw, now = random.Random(seed), 0.0
        found = list[Sending]()
        while not found or now < self.seconds or (len(found) < least and now < self.longest):
            now += draw.expovariate(1.0) / rate
            found.append(Sending(now, *self.lengths.drawn(draw, context)))
        return tuple(found)


@dataclass(frozen=True)
class Variant:
    """A variant that is served, its readings in the catalog, and its load curve."""

    name: str
    variant: str
    form: str
    """The format of its weights."""
    sequences: int
    readings: Mapping[str, float]
    curve: LoadCurve


@dataclass(frozen=True)
class Run:
    """Requests to a variant at a rate, and what came of them."""

    name: str
    rate: float
    stolen_share: float
    """Of the machine's CPU time, what its hypervisor gave to others."""
    sends: tuple[Sending, ...]
    seen: Seen


@dataclass(frozen=True)
class Measured:
    """All that was measured."""

    machine: str
    slo: tuple[str, ...]
    sampling: Sampling
    variants: tuple[Variant, ...] = ()
    runs: tuple[Run, ...] = ()

    @property
    def bounds(self) -> tuple[Bound, ...]:
        """Return the bounds on requests."""
        return bounds_of(self.slo)

    @property
    def least(self) -> int:
        """Return how many requests a run must have at least for the percentiles that are bounded."""
        return least_requests(self.bounds)


def bounds_of(texts: Sequence[str]) -> tuple[Bound, ...]:
    """Return the bounds on requests.

    Raises:
        InputError: one is not of requests.
    """
    bounds, others = parse_load(texts)
    if others:
        raise InputError(f"--slo {others[0]}: give bounds on requests, such as ttft_s_p95<=1")
    return bounds


def least_requests(bounds: Sequence[Bound]) -> int:
    """Return how many requests the percentiles of bounds need: 90 for a 95th, 459 for a 99th."""
    return max(least_samples(load_metric(bound.metric).share) for bound in bounds)


# --- saved -----------------------------------------------------------------------------------------------------------


def write(made: Measured, path: Path) -> None:
    """Save all that was measured; what is infinite, because nothing came, is null."""
    body = {"format": FORMAT, **saved.finite(asdict(replace(made, variants=())))}
    body["variants"] = [plain(one) for one in made.variants]
    path.write_text(json.dumps(body))


def read(path: Path) -> Measured:
    """Return what was saved.

    Raises:
        InputError: there is no such file, or it is another one.
    """
    return saved.read(path, FORMAT, _measured)


def _measured(body: Mapping[str, Any]) -> Measured:
    return Measured(
        body["machine"],
        tuple(body["slo"]),
        Sampling(**{**body["sampling"], "lengths": Lengths(**body["sampling"]["lengths"])}),
        tuple(Variant(**{**one, "curve": curve_from(one["curve"])}) for one in body["variants"]),
        tuple(map(_run, body["runs"])),
    )


def _run(body: Mapping[str, Any]) -> Run:
    heard = tuple(map(_heard, body["seen"]["heard"]))
    sends = tuple(Sending(*one) for one in body["sends"])
    return Run(**{**body, "sends": sends, "seen": Seen(**{**body["seen"], "heard": heard})})


def _heard(body: Mapping[str, Any]) -> Heard:
    known: dict[str, Any] = {name: inf if value is None else value for name, value in body.items()}
    return Heard(**{**known, "came_s": tuple(known.get("came_s", ()))})


# --- what came of them -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AtRate:
    """What came of all runs of a variant at a rate.

    `values` are percentiles over the requests of all runs, infinite where too many were not answered. The rate `holds`
    where they keep all bounds. `goodput` has for each run the requests a second that keep all bounds.
    """

    name: str
    rate: float
    requests: tuple[int, ...]
    goodput: tuple[float, ...]
    values: Mapping[str, float]
    holds: bool
    runs_held: int
    client_share: float
    """The largest of a run."""
    stolen_share: float
    """The largest of a run."""

    @property
    def mean(self) -> float:
        """Return the mean goodput."""
        return fmean(self.goodput)


def at_rates(made: Measured) -> tuple[AtRate, ...]:
    """Return what came of the runs, by variant in the order of measuring, and by rate."""
    order = [one.name for one in made.variants]
    runs = sorted(made.runs, key=lambda run: (order.index(run.name), run.rate))
    return tuple(at_rate(list(group), made.bounds) for _, group in groupby(runs, lambda run: (run.name, run.rate)))


def at_rate(runs: Sequence[Run], bounds: Sequence[Bound]) -> AtRate:
    """Return what came of the runs of a variant at a rate."""
    values = percentiles([one for run in runs for one in run.seen.heard], bounds)
    return AtRate(
        runs[0].name,
        runs[0].rate,
        tuple(len(run.seen.heard) for run in runs),
        tuple(run.rate * fmean(keeps(one, bounds) for one in run.seen.heard) for run in runs),
        values,
        hold(values, bounds),
        sum(hold(percentiles(run.seen.heard, bounds), bounds) for run in runs),
        max(run.seen.client_cpu_s / run.seen.seconds for run in runs),
        max(run.stolen_share for run in runs),
    )


def keeps(one: Heard, bounds: Sequence[Bound]) -> bool:
    """Return whether a request keeps all bounds as a single one."""
    return all(bound.holds(_times(one)[load_metric(bound.metric).base]) for bound in bounds)


def percentiles(heard: Sequence[Heard], bounds: Sequence[Bound]) -> dict[str, float]:
    """Return the percentile that each bound is on."""
    return {bound.metric: _percentile(heard, bound) for bound in bounds}


def _percentile(heard: Sequence[Heard], bound: Bound) -> float:
    metric = load_metric(bound.metric)
    values = sorted(_times(one)[metric.base] for one in heard if _counts(one, metric.base))
    return values[ceil(metric.share * len(values)) - 1] if values else inf


def _counts(one: Heard, base: str) -> bool:
    """Return whether a request has such a time: an answer of one token has none between tokens."""
    return base != "tpot_s" or one.end != "answered" or one.tokens > 1


def _times(one: Heard) -> dict[str, float]:
    """Return the times of a request; infinite where it was not answered."""
    good = one.end == "answered"
    return {
        "ttft_s": one.ttft_s if good else inf,
        "tpot_s": one.tpot_s if good else inf,
        "e2e_s": one.last_s if good else inf,
    }


def hold(values: Mapping[str, float], bounds: Sequence[Bound]) -> bool:
    """Return whether percentiles keep all bounds."""
    return all(bound.holds(values[bound.metric]) for bound in bounds)


def cannot_hold(runs: Sequence[Run], requests: int, bounds: Sequence[Bound]) -> bool:
    """Return whether so many requests in all cannot hold the bounds any more, whatever the rest of them will see."""
    heard = [one for run in runs for one in run.seen.heard]
    for bound in bounds:
        metric = load_metric(bound.metric)
        missed = sum(not bound.holds(_times(one)[metric.base]) for one in heard if _counts(one, metric.base))
        if missed > requests - ceil(metric.share * requests):
            return True
    return False
