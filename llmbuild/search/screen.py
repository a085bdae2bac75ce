"""The short screen: who is beaten beyond doubt after a few answers is not measured in full."""

from __future__ import annotations

from collections.abc import Sequence

from llmbuild.digest import short
from llmbuild.search.front import FLOORS, missed, value_of
from llmbuild.search.pairs import TIE
from llmbuild.spec.measurement import SCREENED, Measurement
from llmbuild.spec.slo import METRICS, Bound
from llmbuild.spec.trial import Trial

BEATEN = 2.0
"""How many times worse, between the nearest ends of both intervals, is beyond doubt."""

TIMED = ("ttft_s", "tpot_s", "e2e_s", "output_tokens_per_s")
PERFECT = {"quality_kl": 0.0, "quality_top1": 1.0, "quality_perplexity": 1.0}


def hopeless(
    trial: Trial,
    brief: Measurement,
    known: Sequence[Trial],
    objectives: Sequence[str],
    bounds: Sequence[Bound],
    perfect: bool,
) -> str:
    """Return who beats a variant beyond doubt in every timed objective and is no worse in any other; empty: nobody.

    `brief` is what a few answers gave; `trial` has the variant's sizes. Quality that is not scored yet counts as
    `perfect`, or as the worst there is. What was not read, such as energy, may always be better.
    """
    for other in known:
        found = next((m for m in other.measurements if m.workload.name == brief.workload.name), None)
        if found is None or SCREENED in found.notes or other.failure is not None or missed(other, found, bounds):
            continue
        factors = [_factor(trial, brief, other, found, name, perfect) for name in objectives]
        timed = [f for f, name in zip(factors, objectives, strict=True) if name in TIMED and f is not None]
        rest = [f for f, name in zip(factors, objectives, strict=True) if name not in TIMED and f is not None]
        if timed and min(timed) >= BEATEN and all(f >= 1 for f in rest):
            return f"{short(other.variant)} is {min(timed):.1f} times as fast at least, and no worse in the rest"
    return ""


def _factor(
    trial: Trial, brief: Measurement, other: Trial, found: Measurement, name: str, perfect: bool
) -> float | None:
    """Return by how much a variant is worse at least; 1 for no better, 0 for perhaps better, None for not compared."""
    if name in TIMED:
        mine, theirs = brief.ratios.get(name), found.ratios.get(name)
        if mine is None or theirs is None:
            return 0.0
        return mine.low / theirs.high if METRICS[name].direction == "min" else theirs.low / mine.high
    theirs_at, mine_at = value_of(other, found, name), value_of(trial, brief, name)
    if theirs_at is None:
        return None  # absent there, so that it ranks nobody
    if mine_at is None and name in PERFECT:
        if not perfect:
            return 1.0
        mine_at = PERFECT[name]
    if mine_at is None:
        return 0.0
    sign = 1.0 if METRICS[name].direction == "min" else -1.0
    allowed = max(TIE * abs(mine_at), FLOORS.get(name, 0.0))
    return 1.0 if sign * theirs_at <= sign * mine_at + allowed else 0.0
