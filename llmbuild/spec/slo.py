"""Metrics, bounds on them, and the objective."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from llmbuild.errors import InputError
from llmbuild.spec.measurement import ESTIMATES
from llmbuild.spec.rows import reading

Direction = Literal["min", "max"]


@dataclass(frozen=True)
class Metric:
    """A measured quantity in SI units; `direction` is the better direction."""

    name: str
    unit: str
    direction: Direction
    meaning: str


METRICS: dict[str, Metric] = {
    m.name: m
    for m in (
        Metric("ttft_s", "s", "min", "time to first token: from the call of prefill until its token is read"),
        Metric("tpot_s", "s", "min", "time per output token after the first, mean over one answer"),
        Metric(
            "itl_p99_s",
            "s",
            "min",
            "99th percentile of the time between two tokens; NULL with fewer than 459 of them",
        ),
        Metric("e2e_s", "s", "min", "end-to-end time of an answer: prefill and every decode step"),
        Metric("output_tokens_per_s", "1/s", "max", "output tokens over e2e_s"),
        Metric("energy_j_per_token", "J", "min", "energy of one answer per output token; NULL without a counter"),
        Metric("peak_memory_bytes", "B", "min", "peak resident memory of the process that runs the workload"),
        Metric("artifact_bytes", "B", "min", "size of the .vmfb"),
        Metric("parameter_bytes", "B", "min", "size of the parameter archive the artifact maps"),
        Metric("load_s", "s", "min", "time to open the artifact and its parameters, until the first call is possible"),
        Metric("dispatches_per_token", "1", "min", "dispatches of one decode step"),
        Metric(
            "bandwidth_fraction",
            "1",
            "max",
            "least bytes read per decode step, over tpot_s and measured bandwidth; above 1 where they are cached",
        ),
        Metric("peak_fraction", "1", "max", "operations of the prompt over ttft_s and the measured arithmetic peak"),
        Metric("quality_kl", "nat", "min", "mean KL divergence per token from the f32 model on held-out text"),
        Metric("quality_top1", "1", "max", "share of tokens whose most likely next token equals the f32 model's"),
        Metric("quality_perplexity", "1", "min", "perplexity on the held-out text"),
    )
}

ENERGY = "energy_j_per_token"


def is_quality(metric: str) -> bool:
    """Return whether a metric is one of quality: scored on held-out text."""
    return metric.startswith("quality_")


@dataclass(frozen=True)
class LoadMetric:
    """A percentile over requests that come at some rate: `share` of them see at most this."""

    name: str
    base: str
    share: float


LOAD_METRICS: dict[str, LoadMetric] = {
    f"{base}_p{percent}": LoadMetric(f"{base}_p{percent}", base, percent / 100)
    for base in ("ttft_s", "tpot_s", "e2e_s")
    for percent in (50, 90, 95, 99)
}
"""What may be bounded of requests under load; `tpot_s` is a request's mean time per token after the first."""

_SHAPE = re.compile(r"\s*([a-z0-9_]+)\s*(<=|>=|<|>)\s*([-+0-9.eE]+)\s*")


@dataclass(frozen=True)
class Bound:
    """One bound of a metric: `tpot_s <= 0.02`."""

    metric: str
    operator: str
    limit: float

    def __str__(self) -> str:
        return f"{self.metric}{self.operator}{self.limit:g}"

    def holds(self, value: float | None) -> bool:
        """Return whether `value` is inside; an absent or non-finite value never is."""
        if value is None or not math.isfinite(value):
            return False
        return {
            "<=": value <= self.limit,
            "<": value < self.limit,
            ">=": value >= self.limit,
            ">": value > self.limit,
        }[self.operator]

    def distance(self, value: float | None) -> float:
        """Return how far outside `value` is, as a share of the limit: 0 inside, infinite when absent."""
        if value is None or not math.isfinite(value):
            return float("inf")
        if self.holds(value):
            return 0.0
        return abs(value - self.limit) / max(abs(self.limit), 1e-12)


AS_GOOD = (Bound("quality_kl", "<=", 0.01), Bound("quality_top1", ">=", 0.94))
"""What counts as as good as the model, as 8-bit weights are: on SmolLM2-135M-Instruct llama.cpp's Q8_0 has a KL of
0.0050 and a top-1 agreement of 95.5 %."""


@dataclass(frozen=True)
class Slo:
    """The bounds, and the objective among the rows that meet them."""

    bounds: tuple[Bound, ...]
    objective: str

    @property
    def preferred(self) -> Slo:
        """Return the SLO with the bounds of `AS_GOOD`; the same where it says something of quality itself."""
        if any(map(is_quality, (self.objective, *(bound.metric for bound in self.bounds)))):
            return self
        return Slo((*self.bounds, *AS_GOOD), self.objective)

    def misses(self, row: Mapping[str, object]) -> list[str]:
        """Return, for each bound that `row` breaks, its value and the bound."""
        found = []
        for bound in self.bounds:
            value = measured(row, bound.metric)
            if not bound.holds(value):
                have = absence(row, bound.metric) if value is None else f"{value:.4g}"
                found.append(f"{bound.metric} is {have}, {bound} asked")
        return found

    def distance(self, row: Mapping[str, object]) -> float:
        """Return the sum of the bounds' distances; 0 where all hold."""
        return sum(bound.distance(measured(row, bound.metric)) for bound in self.bounds)


def measured(row: Mapping[str, object], metric: str) -> float | None:
    """Return the value of a metric in `row`; None where it is absent, not finite, or estimated energy."""
    value = reading(row, metric)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return None if metric == ENERGY and row.get("energy_source") in ESTIMATES else value


def absence(row: Mapping[str, object], metric: str) -> str:
    """Return why `measured` has no value of a metric."""
    value = row.get(metric)
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value}, which is no reading"
    return "absent" if value is None else "only estimated"


def metric(name: str) -> Metric:
    """Return the metric of that name.

    Raises:
        InputError: no such metric.
    """
    if name in LOAD_METRICS:
        raise InputError(f"{name} is of requests at a rate: only `llmbuild pick --rate` and `llmbuild serve` take it")
    if name not in METRICS:
        raise InputError(f"unknown metric {name!r}; there are {', '.join(METRICS)}")
    return METRICS[name]


def load_metric(name: str) -> LoadMetric:
    """Return the metric of requests under load of that name.

    Raises:
        InputError: no such metric.
    """
    if name not in LOAD_METRICS:
        raise InputError(f"unknown metric {name!r} of requests; there are {', '.join(LOAD_METRICS)}")
    return LOAD_METRICS[name]


def parse_load(bounds: Sequence[str]) -> tuple[tuple[Bound, ...], tuple[str, ...]]:
    """Return the bounds on requests under load, and the texts of all others.

    Raises:
        InputError: such a bound has no upper limit.
    """
    found, rest = [], []
    for text in bounds:
        match = _SHAPE.fullmatch(text)
        if match is None or match[1] not in LOAD_METRICS:
            rest.append(text)
            continue
        if match[2] not in ("<=", "<"):
            raise InputError(f"--slo {text!r}: {match[1]} is better where it is less: write {match[1]}<=SECONDS")
        found.append(Bound(match[1], match[2], _limit(text, match[3])))
    return tuple(found), tuple(rest)


def parse_bound(text: str) -> Bound:
    """Return the bound in `text`.

    Raises:
        InputError: not of the form METRIC<=NUMBER, or an unknown metric.
    """
    match = _SHAPE.fullmatch(text)
    if not match:
        raise InputError(f"cannot read the SLO {text!r}: write METRIC<=NUMBER in SI units, such as 'tpot_s<=0.02'")
    limit = _limit(text, match[3])
    return Bound(metric(match[1]).name, match[2], limit)


def _limit(text: str, number: str) -> float:
    try:
        limit = float(number)
    except ValueError:
        raise InputError(f"cannot read the SLO {text!r}: {number!r} is not a number") from None
    if not math.isfinite(limit):
        raise InputError(f"cannot read the SLO {text!r}: {number} is too large for a number")
    return limit


def parse_slo(bounds: tuple[str, ...] | list[str], objective: str | None) -> Slo:
    """Return the SLO of these bounds; without an objective, the first bound's metric, else `tpot_s`."""
    parsed = tuple(parse_bound(text) for text in bounds)
    chosen = objective or (parsed[0].metric if parsed else "tpot_s")
    return Slo(parsed, metric(chosen).name)


def order(metric: str) -> Callable[[Mapping[str, object]], tuple[bool, float]]:
    """Return the key that sorts rows by a metric, the best first; rows without a reading come last."""
    sign = 1.0 if METRICS[metric].direction == "min" else -1.0
    return lambda row: (row.get(metric) is None, sign * (reading(row, metric) or 0.0))
