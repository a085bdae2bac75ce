"""Who is not dominated: pure functions over trials."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llmbuild.spec.measurement import Measurement, Reading
from llmbuild.spec.slo import METRICS, Bound
from llmbuild.spec.trial import Standing, Trial

TIE = 0.01
"""Relative difference below which two readings without an interval are equal; for quality the floors below apply."""

FLOORS = {"quality_kl": 1e-4, "quality_top1": 0.005, "quality_perplexity": 0.005}
"""Absolute differences that held-out text of some hundred tokens cannot tell apart."""


@dataclass(frozen=True)
class Entrant:
    """One variant's readings of the objectives, as factors of the baseline where they are noisy."""

    variant: str
    readings: dict[str, Reading]


def standings(
    trials: Sequence[Trial], workload: str, objectives: Sequence[str], bounds: Sequence[Bound]
) -> list[Standing]:
    """Return where every trial stands on one workload.

    `dominated` is only who another beats in every objective beyond the interval; who is merely worse at the median is
    `undecided`. Confidence is the share of objectives in which no other variant beats it at the median: 1 on the front.
    """
    out: list[Standing] = []
    feasible: list[tuple[Trial, Measurement]] = []
    for trial in trials:
        found = next((m for m in trial.measurements if m.workload.name == workload), None)
        if trial.failure is not None or found is None:
            reason = f"{trial.failure.stage}: {trial.failure.reason}" if trial.failure else "not measured"
            out.append(Standing(trial.variant, workload, "failed", None, reason, None))
            continue
        broken = missed(trial, found, bounds)
        if broken:
            out.append(Standing(trial.variant, workload, "infeasible", None, "; ".join(broken), found.key))
        else:
            feasible.append((trial, found))
    used = usable_objectives([m for _, m in feasible], objectives)
    paired = {name for name in used if all(name in m.ratios for _, m in feasible)}
    entrants = [Entrant(t.variant, {name: reading(t, m, name, name in paired) for name in used}) for t, m in feasible]
    for (_, measurement), entrant in zip(feasible, entrants, strict=True):
        status, confidence, reason = _status(entrant, entrants)
        out.append(Standing(entrant.variant, workload, status, confidence, reason, measurement.key))
    return out


def usable_objectives(measured: Sequence[Measurement], objectives: Sequence[str]) -> list[str]:
    """Return the objectives that every measurement has; one that is absent somewhere cannot rank anything."""
    static = ("artifact_bytes", "parameter_bytes")
    return [name for name in objectives if all(name in m.readings or name in static for m in measured)]


def missed(trial: Trial, measurement: Measurement, bounds: Sequence[Bound]) -> list[str]:
    """Return the bounds a measurement breaks. Quality that could not be scored breaks none: it is marked absent."""
    told = []
    for bound in bounds:
        if bound.metric.startswith("quality_") and "quality" in measurement.notes:
            continue
        value = value_of(trial, measurement, bound.metric)
        if not bound.holds(value):
            told.append(f"{bound.metric} is {'absent' if value is None else format(value, '.4g')}, {bound} asked")
    return told


def value_of(trial: Trial, measurement: Measurement, metric: str) -> float | None:
    """Return the median of a metric, static sizes included; None where it is absent."""
    static = {"artifact_bytes": trial.artifact_bytes, "parameter_bytes": trial.parameter_bytes}
    if metric in static:
        size = static[metric]
        return None if size is None else float(size)
    found = measurement.readings.get(metric)
    return None if found is None else found.median


def reading(trial: Trial, measurement: Measurement, metric: str, paired: bool) -> Reading:
    """Return what to compare: the paired ratio to the baseline where all have one, else the reading itself."""
    if paired:
        return measurement.ratios[metric]
    value = value_of(trial, measurement, metric)
    if metric in measurement.readings:
        return measurement.readings[metric]
    return Reading(float(value or 0.0), float(value or 0.0), float(value or 0.0), ())


def beats(a: Reading, b: Reading, metric: str) -> bool:
    """Say whether `a` is better than `b` beyond both intervals and beyond a tie."""
    sign = 1.0 if METRICS[metric].direction == "min" else -1.0
    a_worst = max(sign * a.low, sign * a.high)
    b_best = min(sign * b.low, sign * b.high)
    return a_worst < b_best and not tied(a, b, metric)


def tied(a: Reading, b: Reading, metric: str) -> bool:
    """Say whether two medians are too close to be told apart, whatever their intervals."""
    allowed = max(TIE * max(abs(a.median), abs(b.median)), FLOORS.get(metric, 0.0))
    return math.isclose(a.median, b.median, rel_tol=0.0, abs_tol=allowed)


def noiseless(r: Reading) -> bool:
    """Say whether a reading has no interval, as sizes and quality have none."""
    return r.low == r.high


def dominates(a: Entrant, b: Entrant) -> bool:
    """Say whether `a` beats `b` in every objective beyond the interval.

    Two noiseless readings that are tied count as beaten, provided `a` truly beats `b` in some other objective.
    """
    won = False
    for name, mine in a.readings.items():
        theirs = b.readings[name]
        if beats(mine, theirs, name):
            won = True
        elif not (tied(mine, theirs, name) and noiseless(mine) and noiseless(theirs)):
            return False
    return won


def better_at_median(a: Entrant, b: Entrant) -> bool:
    """Say whether `a` is no worse than `b` in every median and better in one: what the intervals do not yet prove."""
    better = False
    for name, mine in a.readings.items():
        theirs = b.readings[name]
        sign = 1.0 if METRICS[name].direction == "min" else -1.0
        if tied(mine, theirs, name):
            continue
        if sign * mine.median > sign * theirs.median:
            return False
        better = True
    return better


def _status(entrant: Entrant, everyone: Sequence[Entrant]) -> tuple[str, float, str]:
    others = [e for e in everyone if e is not entrant]
    by = next((o for o in others if dominates(o, entrant)), None)
    if by is not None:
        return "dominated", 0.95, f"{by.variant[:12]} beats it in every objective"
    ahead = next((o for o in others if better_at_median(o, entrant)), None)
    if ahead is not None:
        return "undecided", 0.5, f"{ahead.variant[:12]} is ahead at the median, within the intervals"
    return "pareto", 0.95, ""
