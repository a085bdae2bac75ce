"""What came of a simulated trace: how many requests met their SLO, and what it took."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmbuild.fleet.simulate.meter import Use
from llmbuild.fleet.simulate.replica import Job
from llmbuild.spec.fleet import Basis, Fleet

MINUTE_S = 60.0


@dataclass(frozen=True)
class ClassOutcome:
    """The requests of one class. All arrivals count: what was rejected, lost or not finished has missed its SLO."""

    service: str
    kind: str
    arrivals: int
    met: int
    rejected: int
    lost: int
    unfinished: int
    good_minutes: float
    """Share of the minutes with arrivals in which the service's attainment held."""
    ttft_s: tuple[float, float, float]
    """50th, 95th and 99th percentile of what finished."""
    tpot_s: tuple[float, float, float]

    @property
    def attainment(self) -> float:
        """Return the share of arrivals that met the SLO; 1 where none came."""
        return self.met / self.arrivals if self.arrivals else 1.0


@dataclass(frozen=True)
class Moment:
    """An interval of simulated time."""

    begin_s: float
    seconds: float
    """The last one is shorter: nothing runs after its end."""
    requests: int
    """That came in it."""
    joules: float
    replicas: int
    """That served or were starting when it began."""

    @property
    def watts(self) -> float:
        """Return the mean power."""
        return self.joules / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Outcome:
    """A policy over a trace with one seed."""

    policy: str
    seed: int
    classes: tuple[ClassOutcome, ...]
    seconds: float
    """Simulated, until the last request ended."""
    joules: Mapping[Use, float]
    slot_seconds: Mapping[Use, float]
    prompt_tokens: int
    output_tokens: int
    """Of what finished."""
    node_hours: float
    switches: Mapping[str, int]
    basis: Basis
    """Weakest of what ran and drew."""
    decide_s: float
    """Seconds of this machine for all decisions."""
    explained: str
    grams: float | None = None
    """CO2 equivalent of the energy, where the fleet file knows it."""
    money: float | None = None
    """Price of the energy."""
    tariff_basis: Basis | None = None
    """Of both."""
    moments: tuple[Moment, ...] = ()
    """In their order, where the setting asks for them."""

    @property
    def arrivals(self) -> int:
        """Return all requests."""
        return sum(each.arrivals for each in self.classes)

    @property
    def attainment(self) -> float:
        """Return the share of all arrivals that met their SLO."""
        return sum(each.met for each in self.classes) / max(1, self.arrivals)

    @property
    def worst(self) -> float:
        """Return the least attainment of a class."""
        return min((each.attainment for each in self.classes), default=1.0)

    @property
    def total_j(self) -> float:
        """Return all joules."""
        return sum(self.joules.values())

    @property
    def joules_per_token(self) -> float:
        """Return joules for each output token, idle power and starts included."""
        return self.total_j / self.output_tokens if self.output_tokens else math.inf

    @property
    def idle_share(self) -> float:
        """Return the share of the joules that no step drew."""
        return 1 - (self.joules["decode"] + self.joules["prompt"]) / self.total_j if self.total_j else 0.0

    @property
    def switching_share(self) -> float:
        """Return the share of the joules of boots, new layouts and loads; `idle_share` has it too."""
        switching = self.joules.get("boot", 0.0) + self.joules.get("change", 0.0) + self.joules.get("load", 0.0)
        return switching / self.total_j if self.total_j else 0.0

    @property
    def changes(self) -> int:
        """Return starts, stops, and changes of clocks and layouts."""
        return sum(self.switches.get(name, 0) for name in ("start", "stop", "clock", "partition"))


def classes_of(fleet: Fleet, jobs: Sequence[Job]) -> tuple[ClassOutcome, ...]:
    """Return the outcome of each class."""
    sorted_: dict[tuple[int, int], list[Job]] = {
        (s, c): [] for s, service in enumerate(fleet.services) for c in range(len(service.classes))
    }
    for job in jobs:
        sorted_[job.ask.service, job.ask.kind].append(job)
    return tuple(_class(fleet, s, c, those) for (s, c), those in sorted_.items())


def _class(fleet: Fleet, s: int, c: int, jobs: Sequence[Job]) -> ClassOutcome:
    service = fleet.services[s]
    kind = service.classes[c]
    done = [job for job in jobs if job.ended == "finished"]
    good = {job.ask.number for job in done if job.ttft_s <= kind.ttft_s and job.tpot_s <= kind.tpot_s}
    minutes: dict[int, list[bool]] = {}
    for job in jobs:
        minutes.setdefault(int(job.ask.at_s // MINUTE_S), []).append(job.ask.number in good)
    held = [sum(met) >= service.attainment * len(met) for met in minutes.values()]
    return ClassOutcome(
        service=service.name,
        kind=kind.name,
        arrivals=len(jobs),
        met=len(good),
        rejected=sum(job.ended == "rejected" for job in jobs),
        lost=sum(job.ended == "lost" for job in jobs),
        unfinished=sum(not job.ended for job in jobs),
        good_minutes=sum(held) / len(held) if held else 1.0,
        ttft_s=_percentiles([job.ttft_s for job in done]),
        tpot_s=_percentiles([job.tpot_s for job in done if job.ask.output > 1]),
    )


def _percentiles(values: list[float]) -> tuple[float, float, float]:
    """Return the 50th, 95th and 99th percentile; NaN without values."""
    if not values:
        return math.nan, math.nan, math.nan
    ordered = sorted(values)
    found = [ordered[min(len(ordered) - 1, math.ceil(q * len(ordered)) - 1)] for q in (0.5, 0.95, 0.99)]
    return found[0], found[1], found[2]
