"""Outcomes kept one by one, so that an interruption loses none; and what one policy takes against another."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from comparison import fleet_runs, saved
from comparison.fleet_runs import OURS, STATIC, Simulated, attained
from llmbuild.digest import plain
from llmbuild.errors import InputError
from llmbuild.fleet.policies.named import ORACLE
from llmbuild.fleet.simulate.outcome import Outcome
from llmbuild.report.fleet import bootstrap


class Pieces:
    """The outcomes in a file of lines; a line that was cut short is dropped."""

    def __init__(self, path: Path) -> None:
        """Read what is there.

        Raises:
            InputError: a line other than the last is no outcome.
        """
        self._path = path
        self.outcomes = [self._read(number, line) for number, line in enumerate(saved.lines(path), 1)]

    def _read(self, number: int, line: str) -> Outcome:
        try:
            return fleet_runs.outcome_of(json.loads(line))
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{self._path}:{number}: no outcome: {error}: remove the file to begin anew") from None

    def has(self, policy: str, seed: int) -> bool:
        """Return whether a run is there."""
        return any((one.policy, one.seed) == (policy, seed) for one in self.outcomes)

    def add(self, one: Outcome) -> None:
        """Keep an outcome."""
        saved.add(self._path, plain(one))
        self.outcomes.append(one)

    def of(self, policies: Sequence[str]) -> tuple[Outcome, ...]:
        """Return the outcomes of these policies in their order, by seed."""
        those = sorted(self.outcomes, key=lambda one: one.seed)
        return tuple(one for name in policies for one in those if one.policy == name)


def with_all(outcomes: Sequence[Outcome]) -> tuple[Outcome, ...]:
    """Return the outcomes of the seeds with which every policy of them was run."""
    policies = {one.policy for one in outcomes}
    ran = {(one.policy, one.seed) for one in outcomes}
    return tuple(one for one in outcomes if all((name, one.seed) in ran for name in policies))


@dataclass(frozen=True)
class Against:
    """How much less energy for each token ours takes than another policy, seed by seed: the mean and its interval."""

    other: str
    attained: float
    """By the other one, worst class."""
    less: float
    low: float
    high: float


def against(made: Simulated) -> list[Against]:
    """Return ours against the static plan, the best in use, and the clairvoyant one, where they were run."""
    others = dict.fromkeys(name for name in (STATIC, made.best_in_use, ORACLE) if name is not None)
    ours = {one.seed: one.joules_per_token for one in made.of(OURS)}
    found = []
    for name in others:
        less = [1 - ours[one.seed] / one.joules_per_token for one in made.of(name) if one.seed in ours]
        if less:
            low, high = bootstrap(less) if len(less) > 2 else (mean(less), mean(less))
            found.append(Against(name, attained(made.of(name)), mean(less), low, high))
    return found
