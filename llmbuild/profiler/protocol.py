"""What is measured and for how long: plain data, so that a build with nothing to measure imports no library for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmbuild.system.strict_json import JsonObject


@dataclass(frozen=True)
class Protocol:
    """How long to measure: least and most rounds, and the seconds after which no further round begins.

    A round visits every participant once, for `visit_s` of answers, and reopens the artifact where that takes less
    than `reopen_s`: the same artifact opened twice may differ by a tenth, for as long as it stays open. The race has
    `race_rounds` with all participants, and as many more for the undecided ones as fit into `race_seconds`, up to
    `race_most_rounds`; where not even those fit, `budget` decides what is left out. Energy is measured in separate
    windows, where there is a meter.
    """

    warmup_s: float = 0.3
    rounds: int = 5
    most_rounds: int = 15
    seconds: float = 2.0
    visit_s: float = 0.05
    reopen_s: float = 0.2
    baseline_round_s: float = 1.0
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


@dataclass(frozen=True)
class Subject:
    """What is measured: files, call contract and run-time settings of one variant."""

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


@dataclass(frozen=True)
class Quality:
    """The reference data on held-out text, or the reason why there is none."""

    data: Path | None
    reason: str
