"""Which trials are not dominated: pure functions over trials."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal

from llmbuild.digest import short
from llmbuild.search import pairs
from llmbuild.search.pairs import TIE
from llmbuild.spec.measurement import ESTIMATES, SCREENED, Measurement, Reading
from llmbuild.spec.slo import ENERGY, METRICS, Bound, is_quality
from llmbuild.spec.trial import FAILED, Standing, Trial

FLOORS = {"quality_kl": 1e-4, "quality_top1": 0.005, "quality_perplexity": 0.005}
"""Absolute differences that held-out text of some hundred tokens cannot resolve."""

BEATEN = 2.0
"""Factor between the nearest ends of both intervals by which a variant must be worse for the short screen to end it."""
TIMED = ("ttft_s", "tpot_s", "e2e_s", "output_tokens_per_s")
PERFECT = {"quality_kl": 0.0, "quality_top1": 1.0, "quality_perplexity": 1.0}

Comparison = Literal["better", "worse", "tied", "undecided"]


@dataclass(frozen=True)
class Entrant:
    """One variant's readings of the objectives, as factors of the baseline where they are noisy.

    `samples` of entrants of one `session` are paired by index. `size` breaks ties: less memory, then the smaller
    artifact.
    """

    variant: str
    readings: dict[str, Reading]
    session: str | None = None
    samples: dict[str, tuple[float, ...]] = field(default_factory=dict)
    size: tuple[float, float] = (0.0, 0.0)


def standings(
    trials: Sequence[Trial], workload: str, objectives: Sequence[str], bounds: Sequence[Bound]
) -> list[Standing]:
    """Return the standing of every trial on one workload.

    A variant is `dominated` only if another beats it in every objective beyond the interval, or beats it in one and
    equals it in the rest. A variant that is worse only at the median is `undecided`, and so is the larger of two that
    are equal in every objective. Confidence is 0.95 where the intervals decide, 0.5 where they do not.
    """
    out: list[Standing] = []
    feasible: list[tuple[Trial, Measurement]] = []
    for trial in trials:
        found = next((m for m in trial.measurements if m.workload.name == workload), None)
        if trial.failure is not None or found is None:
            reason = f"{trial.failure.stage}: {trial.failure.reason}" if trial.failure else "not measured"
            out.append(Standing(trial.variant, workload, FAILED, None, reason, None))
            continue
        by = dominated(trial, found, trials, objectives, bounds, True, 1.0) if SCREENED in found.notes else ""
        if by:
            out.append(Standing(trial.variant, workload, "dominated", 0.95, f"screened: {by}", found.key))
            continue
        broken = [*_unscored(found, objectives, bounds), *missed(trial, found, bounds)]
        if broken:
            out.append(Standing(trial.variant, workload, "infeasible", None, "; ".join(broken), found.key))
        else:
            feasible.append((trial, found))
    entrants = _entrants(feasible, objectives)
    for (_, measurement), entrant in zip(feasible, entrants, strict=True):
        status, confidence, reason = _status(entrant, entrants)
        out.append(Standing(entrant.variant, workload, status, confidence, reason, measurement.key))
    return out


def _unscored(found: Measurement, objectives: Sequence[str], bounds: Sequence[Bound]) -> list[str]:
    """Return why unscored quality (left out by the short screen) excludes a variant, where quality is an objective."""
    asked = any(map(is_quality, (*objectives, *(b.metric for b in bounds))))
    if SCREENED not in found.notes or not asked or "quality_kl" in found.readings:
        return []
    return [f"quality was not scored, since {found.notes[SCREENED]}; `llmbuild build -B` measures it whole"]


def dominated(
    trial: Trial,
    brief: Measurement,
    known: Sequence[Trial],
    objectives: Sequence[str],
    bounds: Sequence[Bound],
    perfect: bool,
    beaten: float = BEATEN,
) -> str:
    """Return which variant surely dominates this one in every timed objective and is not worse in others; or ''.

    `brief` holds the readings of a few answers; `trial` has the variant's sizes. Quality that is not scored yet counts
    as `perfect`, or as the worst possible. An objective without a reading, such as energy, counts as possibly better.
    "Surely" means `beaten` times worse, between the nearest ends of both intervals.
    """
    for other in known:
        found = next((m for m in other.measurements if m.workload.name == brief.workload.name), None)
        if found is None or SCREENED in found.notes or other.failure is not None or missed(other, found, bounds):
            continue
        factors = [_factor(trial, brief, other, found, name, perfect) for name in objectives]
        timed = [f for f, name in zip(factors, objectives, strict=True) if name in TIMED and f is not None]
        rest = [f for f, name in zip(factors, objectives, strict=True) if name not in TIMED and f is not None]
        if timed and min(timed) >= beaten and all(f >= 1 for f in rest):
            return f"{short(other.variant)} is {min(timed):.1f} times as fast at least, and no worse in the rest"
    return ""


def decided(
    trial: Trial, reached: Measurement, known: Sequence[Trial], objectives: Sequence[str], bounds: Sequence[Bound]
) -> bool:
    """Return whether further rounds cannot change a variant's standing on a workload.

    That is so where its intervals hold it apart from every known variant of the front: each objective is decided, or
    each of the two is better in one. A bound within an interval is undecided; one on what is not timed is not.
    """
    broken = [b for b in bounds if b.metric not in TIMED and b.metric != ENERGY and missed(trial, reached, [b])]
    if broken:
        return True
    timed = [
        (b.limit, reached.readings[b.metric]) for b in bounds if b.metric in TIMED and b.metric in reached.readings
    ]
    if any(r.low <= limit <= r.high for limit, r in timed):
        return False
    others = [(t, m) for t in known for m in t.measurements if m.workload.name == reached.workload.name]
    feasible = [(t, m) for t, m in others if SCREENED not in m.notes and not missed(t, m, bounds)]
    mine, *theirs = _entrants([(trial, reached), *feasible], objectives)
    front = [one for one in theirs if not any(dominates(other, one) for other in theirs if other is not one)]
    orders = [{compare(mine, rival, name) for name in mine.readings} for rival in front]
    return bool(orders) and all("undecided" not in found or {"better", "worse"} <= found for found in orders)


def _factor(
    trial: Trial, brief: Measurement, other: Trial, found: Measurement, name: str, perfect: bool
) -> float | None:
    """Return the least factor by which a variant is worse; 1: not better, 0: maybe better, None: not compared."""
    if name in TIMED:
        mine, theirs = brief.ratios.get(name), found.ratios.get(name)
        if mine is None or theirs is None:
            return 0.0
        return mine.low / theirs.high if METRICS[name].direction == "min" else theirs.low / mine.high
    theirs_at, mine_at = value_of(other, found, name), value_of(trial, brief, name)
    if theirs_at is None:
        return None  # absent there, so that it does not rank
    if mine_at is None and name in PERFECT:
        if not perfect:
            return 1.0
        mine_at = PERFECT[name]
    if mine_at is None:
        return 0.0
    sign = 1.0 if METRICS[name].direction == "min" else -1.0
    allowed = max(TIE * abs(mine_at), FLOORS.get(name, 0.0))
    return 1.0 if sign * theirs_at <= sign * mine_at + allowed else 0.0


def contenders(
    trials: Sequence[Trial], measured: Sequence[Measurement], objectives: Sequence[str], reach: float = math.inf
) -> set[str]:
    """Return the variants of a race that need further rounds: first those whose pairs decide the front.

    A pair matters while some objective is undecided and one of the two may still dominate the other. Without such
    pairs, the pairs count that are undecided in any objective. A pair that needs more than `reach` rounds is given up:
    it stays undecided.
    """
    by_variant = {m.variant: m for m in measured}
    racing = [(t, by_variant[t.variant]) for t in trials if t.variant in by_variant]
    couples = list(combinations(_entrants(racing, objectives), 2))
    orders = [[compare(a, b, name) for name in a.readings] for a, b in couples]
    loose = [
        (pair, found)
        for pair, found in zip(couples, orders, strict=True)
        if any(o == "undecided" and _needed(*pair, n) <= reach for o, n in zip(found, pair[0].readings, strict=True))
    ]
    matter = [pair for pair, found in loose if not {"better", "worse"} <= set(found)]
    return {entrant.variant for pair in matter or [pair for pair, _ in loose] for entrant in pair}


def _needed(a: Entrant, b: Entrant, metric: str) -> float:
    return pairs.needed(a.samples.get(metric, ()), b.samples.get(metric, ()))


def _entrants(found: Sequence[tuple[Trial, Measurement]], objectives: Sequence[str]) -> list[Entrant]:
    used = usable_objectives([m for _, m in found], objectives)
    paired = {name for name in used if all(name in m.ratios for _, m in found)}
    return [
        Entrant(
            t.variant,
            {name: reading(t, m, name, name in paired) for name in used},
            m.session,
            {name: m.readings[name].samples for name in used if name in m.readings},
            (value_of(t, m, "peak_memory_bytes") or math.inf, float(t.artifact_bytes or math.inf)),
        )
        for t, m in found
    ]


def usable_objectives(measured: Sequence[Measurement], objectives: Sequence[str]) -> list[str]:
    """Return the objectives that every measurement has; an objective that one of them lacks cannot rank.

    Energy ranks only where all readings have one source: an estimate never does, and two sources are not compared.
    """
    static = ("artifact_bytes", "parameter_bytes")
    sources = {m.energy_source for m in measured}
    mixed = len(sources) > 1 or bool(sources & set(ESTIMATES))
    wanted = [name for name in objectives if not (name == ENERGY and mixed)]
    return [name for name in wanted if all(name in m.readings or name in static for m in measured)]


def missed(trial: Trial, measurement: Measurement, bounds: Sequence[Bound]) -> list[str]:
    """Return the bounds that a measurement breaks. Unscored quality breaks none: it is marked absent."""
    told = []
    for bound in bounds:
        if is_quality(bound.metric) and "quality" in measurement.notes:
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
    """Return the value to compare: the paired ratio to the baseline where all have one, else the reading itself."""
    if paired:
        return measurement.ratios[metric]
    value = value_of(trial, measurement, metric)
    if metric in measurement.readings:
        return measurement.readings[metric]
    return Reading(float(value or 0.0), float(value or 0.0), float(value or 0.0), ())


def compare(a: Entrant, b: Entrant, metric: str) -> Comparison:
    """Return whether `a` is better than `b`, worse, practically equal, or undecided.

    Entrants of one session are compared round by round; others by their intervals, which must be a tie apart.
    """
    mine, theirs = a.readings[metric], b.readings[metric]
    if a.session is not None and a.session == b.session and a.samples.get(metric) and b.samples.get(metric):
        found = pairs.order(a.samples[metric], b.samples[metric])
    elif noiseless(mine) and noiseless(theirs):
        if tied(mine, theirs, metric):
            return "tied"
        found = "less" if mine.median < theirs.median else "greater"
    elif min(mine.low, theirs.low) <= 0:
        found = "undecided"
    else:
        found = pairs.place(math.log(mine.low / theirs.high), math.log(mine.high / theirs.low))
    if found == "tied" or found == "undecided":
        return found
    return "better" if (found == "less") == (METRICS[metric].direction == "min") else "worse"


def tied(a: Reading, b: Reading, metric: str) -> bool:
    """Return whether two medians are too close to distinguish, whatever their intervals."""
    allowed = max(TIE * max(abs(a.median), abs(b.median)), FLOORS.get(metric, 0.0))
    return math.isclose(a.median, b.median, rel_tol=0.0, abs_tol=allowed)


def noiseless(r: Reading) -> bool:
    """Return whether a reading has no interval, as sizes and quality have none."""
    return r.low == r.high


def dominates(a: Entrant, b: Entrant) -> bool:
    """Return whether `a` beats `b` in every objective, or beats it in one and is practically equal in the rest.

    Its sum must be better too: otherwise three entrants could dominate each other in a cycle of ties and leave no
    front.
    """
    found = {compare(a, b, name) for name in a.readings}
    return found <= {"better", "tied"} and "better" in found and _sum(a) < _sum(b)


def equal(a: Entrant, b: Entrant) -> bool:
    """Return whether two entrants are practically equal in every objective."""
    return all(compare(a, b, name) == "tied" for name in a.readings)


def _sum(entrant: Entrant) -> float:
    """Return a number that is lower for the better entrant: a tie in any objective weighs the same in it."""
    return sum(_weight(r.median, name) for name, r in entrant.readings.items())


def _weight(value: float, metric: str) -> float:
    """Return the logarithm of a value; with a floor, linear in steps of the floor below `floor / TIE`."""
    sign = 1.0 if METRICS[metric].direction == "min" else -1.0
    knee = FLOORS.get(metric, 0.0) / TIE
    if knee and value <= knee:
        return sign * value / knee
    return sign * (math.log(max(value, sys.float_info.min) / (knee or 1.0)) + (1.0 if knee else 0.0))


def better_at_median(a: Entrant, b: Entrant) -> bool:
    """Return whether `a` is no worse than `b` in every median and better in one, which the intervals do not prove."""
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
        even = any(compare(by, entrant, name) == "tied" for name in entrant.readings)
        beaten = "beats it or equals it" if even else "beats it"
        return "dominated", 0.95, f"{by.variant[:12]} {beaten} in every objective"
    twin = next(
        (o for o in others if (o.size, o.variant) < (entrant.size, entrant.variant) and equal(o, entrant)), None
    )
    if twin is not None:
        return "undecided", 0.5, f"equals {twin.variant[:12]} within {TIE:.0%} in every objective"
    ahead = next((o for o in others if better_at_median(o, entrant)), None)
    if ahead is not None:
        return "undecided", 0.5, f"{ahead.variant[:12]} is ahead at the median, within the intervals"
    return "pareto", 0.95, ""
