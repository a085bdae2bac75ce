"""The readings of a variant on a machine."""

from __future__ import annotations

from dataclasses import dataclass

from llmbuild.digest import plain
from llmbuild.spec.workload import Workload

PROTOCOL = 3
"""Version of the measurement protocol; readings of different versions are never compared."""

ESTIMATES = ("model",)
"""Energy sources without a meter: their values are shown as estimates, and decide nothing."""

SCREENED = "screened"
"""The note of a measurement that was cut short: which variant dominates this one, and by how much."""

MEDIANS = (
    "ttft_s",
    "tpot_s",
    "itl_p99_s",
    "e2e_s",
    "output_tokens_per_s",
    "energy_j_per_token",
    "peak_memory_bytes",
    "load_s",
    "dispatches_per_token",
    "bandwidth_fraction",
    "peak_fraction",
    "quality_kl",
    "quality_top1",
    "quality_perplexity",
)
"""Metrics whose medians have a column of their own in a catalog."""


@dataclass(frozen=True)
class Reading:
    """One metric: its median, the 95 % bootstrap interval of that median, and every sample in the order taken."""

    median: float
    low: float
    high: float
    samples: tuple[float, ...]


@dataclass(frozen=True)
class Operator:
    """All dispatches of one kind in a decode step: how many, and their seconds together on one thread."""

    name: str
    calls: int
    seconds: float


@dataclass(frozen=True)
class Measurement:
    """Readings of an artifact under a workload on a machine.

    `ratios` holds, per metric, this variant over the baseline measured in the same rounds (paired), with its interval.
    `notes` explain the numbers: why energy is absent, why quality is absent, what was noisy. Measurements of one
    `session` were taken in the same rounds: their samples of equal index are paired. `energy` holds the joules' source
    and windows, and the machine's idle power.
    """

    key: str
    variant: str
    artifact: str
    workload: Workload
    machine: str
    readings: dict[str, Reading]
    ratios: dict[str, Reading]
    notes: dict[str, str]
    energy_source: str | None = None
    operators: tuple[Operator, ...] = ()
    session: str | None = None
    energy: dict[str, float | str] | None = None
    protocol: int = PROTOCOL


def row_of(scope: str, m: Measurement) -> dict[str, object]:
    """Return the cells of a catalog's `measurement`, except `created_at`: medians as columns, the rest as JSON."""
    return {
        "key": m.key,
        "scope": scope,
        "variant": m.variant,
        "artifact": m.artifact,
        "machine": m.machine,
        "workload": m.workload.name,
        "workload_body": plain(m.workload),
        "protocol": m.protocol,
        **{name: m.readings[name].median if name in m.readings else None for name in MEDIANS},
        "energy_source": m.energy_source,
        "energy": m.energy,
        "session": m.session,
        "operators": plain(m.operators),
        "intervals": {k: [r.low, r.high] for k, r in m.readings.items()},
        "ratios": {k: [r.median, r.low, r.high] for k, r in m.ratios.items()},
        "samples": {k: list(r.samples) for k, r in m.readings.items()},
        "notes": dict(m.notes),
    }
