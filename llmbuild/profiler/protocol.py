"""What is measured and for how long: plain data, so that a build with nothing to measure imports no library for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llmbuild.spec.measurement import PROTOCOL, SCREENED, Measurement, Operator, Reading
from llmbuild.system.strict_json import JsonObject


@dataclass(frozen=True)
class Protocol:
    """How long to measure: least and most rounds, and the seconds after which no further round begins.

    A round visits every participant once, for `visit_s` of answers, and reopens the artifact where that takes less
    than `reopen_s`: the same artifact opened twice may differ by a tenth, for as long as it stays open. The race has
    `race_rounds` with all participants, and as many more for the undecided ones as fit into `race_seconds`, up to
    `race_most_rounds`; where not even those fit, `budget` decides what is left out. Energy is measured in separate
    windows, where there is a meter.

    A variant whose rounds do not fit into `screen_s` answers with fewer tokens, then in fewer rounds. A baseline whose
    answer takes longer than `baseline_round_s` is read in few tokens beside others; where its prompt alone takes
    longer, that is read once, and it is paired by decoding.
    """

    warmup_s: float = 0.3
    rounds: int = 5
    most_rounds: int = 15
    seconds: float = 2.0
    screen_s: float = 8.0
    visit_s: float = 0.05
    reopen_s: float = 0.2
    baseline_round_s: float = 0.5
    race_rounds: int = 12
    race_most_rounds: int = 768
    race_seconds: float = 20.0
    energy_windows: int = 3
    energy_seconds: float = 20.0
    race_energy_windows: int = 5
    race_energy_seconds: float = 120.0

    def looks(self) -> list[int]:
        """Return the numbers of rounds of a race after which undecided variants are determined: each doubles."""
        found = [self.race_rounds]
        while found[-1] < self.race_most_rounds:
            found.append(min(self.race_most_rounds, found[-1] * 2))
        return found


KEPT_READINGS = (
    "load_s",
    "peak_memory_bytes",
    "dispatches_per_token",
    "quality_kl",
    "quality_top1",
    "quality_perplexity",
)
"""Readings of a variant that hold for every process that opens it."""

KEPT_NOTES = ("check", "quality", "load", "operators", "reused")
TIMED_ALONE = ("ttft_s", "tpot_s")


@dataclass(frozen=True)
class Prepared:
    """What is known of a variant: nothing of it is measured again.

    `timed` are its seconds to the first token and per later one by the name of the workload: they say how long its
    rounds will take.
    """

    readings: Mapping[str, Reading]
    notes: Mapping[str, str]
    operators: tuple[Operator, ...] = ()
    timed: Mapping[str, Mapping[str, Reading]] = field(default_factory=dict)

    @staticmethod
    def of(measured: Sequence[Measurement]) -> Prepared | None:
        """Return what the measurements of one variant, one for each workload, say of it; None without any.

        Measurements of another version of the protocol say nothing. Quality that the short screen left out is unknown,
        and so are seconds of opening that were read while the machine was held back.
        """
        if not measured or any(m.protocol != PROTOCOL for m in measured):
            return None
        first = measured[0]
        unknown = {"quality"} if SCREENED in first.notes else set[str]()
        unknown |= {"load_s", "load"} if any("held back" in m.notes for m in measured) else set()
        return Prepared(
            {name: first.readings[name] for name in KEPT_READINGS if name in first.readings and name not in unknown},
            {name: first.notes[name] for name in KEPT_NOTES if name in first.notes and name not in unknown},
            first.operators,
            {m.workload.name: {n: m.readings[n] for n in TIMED_ALONE if n in m.readings} for m in measured},
        )


@dataclass(frozen=True)
class Subject:
    """What is measured: files, call contract and run-time settings of one variant, and what is known of it."""

    variant: str
    artifact: str
    artifact_path: Path
    parameters_path: Path
    check_path: Path
    abi: JsonObject
    driver: str
    workers: int
    tolerance: float
    parameter_bytes: int = 0
    meters: tuple[str, ...] = ()
    """Sources of energy readings for the artifact's device."""
    integer: bool = False
    """Whether the weights are integers: the prompt is then compared with the integer peak where it is known."""
    known: Prepared | None = None


@dataclass(frozen=True)
class Quality:
    """The reference data on held-out text, or the reason why there is none."""

    data: Path | None
    reason: str


@dataclass(frozen=True)
class Stage:
    """What a bench does now: `check` (opening, numerics, quality), `measure` or `race`; of the latter, its rounds."""

    name: str
    done: int = 0
    total: int = 0


Tell = Callable[[Stage], None]

Decided = Callable[[Measurement], bool]
"""Returns whether a variant's standing is decided on its workload, from the measurement so far: more rounds add
nothing."""

Contenders = Callable[[Sequence[Measurement], float], set[str]]
"""Returns which variants of a race are undecided and can be decided within that many rounds in all."""

Dominated = Callable[[Sequence[Measurement], bool], str]
"""Returns which variant surely dominates one, from a brief measurement for each workload; empty for none. The flag
selects whether unscored quality counts as perfect, or as the worst.
"""
