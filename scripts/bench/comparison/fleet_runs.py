"""Policies over a trace as they are saved, and which of those that are in use today is the best."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import nan
from pathlib import Path
from statistics import mean
from typing import Any

from comparison import saved
from llmbuild.digest import plain
from llmbuild.fleet.simulate.outcome import ClassOutcome, Moment, Outcome

FORMAT = "fleet 1"
STATIC, OURS = "static-peak", "adaptive"
IN_USE = ("reactive", "lowest-clock")
"""Published policies that need to know no rate beforehand, or of it the peak alone, and change what runs."""


@dataclass(frozen=True)
class Simulated:
    """Policies over a trace on a fleet."""

    fleet: str
    asked: float
    """Share of the requests of a service that must meet their SLO, at least: the largest of all services."""
    clocks: bool
    """Whether clocks of nodes may be set."""
    day: bool
    """Whether the trace has a made-up day in its length."""
    seconds: float
    """The length of the longest trace."""
    traces: tuple[str, ...]
    """What each is, and what was done to it."""
    outcomes: tuple[Outcome, ...]

    @property
    def policies(self) -> tuple[str, ...]:
        """Return the policies in their order; without clocks, the lowest one is the static plan again, and left out."""
        names = dict.fromkeys(one.policy for one in self.outcomes)
        return tuple(name for name in names if self.clocks or name != "lowest-clock")

    def of(self, policy: str) -> tuple[Outcome, ...]:
        """Return the outcomes of a policy, by seed."""
        return tuple(one for one in self.outcomes if one.policy == policy)

    @property
    def best_in_use(self) -> str | None:
        """Return the policy in use with the least energy for each token of those that attain what is asked; else the
        one that attains most. None where none was run.
        """
        there = [name for name in IN_USE if name in self.policies]
        if not there:
            return None
        good = [name for name in there if attained(self.of(name)) >= self.asked]
        if good:
            return min(good, key=lambda name: mean(one.joules_per_token for one in self.of(name)))
        return max(there, key=lambda name: attained(self.of(name)))


def attained(those: Sequence[Outcome]) -> float:
    """Return the mean attainment of the worst class."""
    return mean(one.worst for one in those)


def write(made: Simulated, path: Path) -> None:
    """Save the outcomes."""
    path.write_text(json.dumps({"format": FORMAT, **saved.finite(plain(made))}))


def read(path: Path) -> Simulated:
    """Return what was saved.

    Raises:
        InputError: there is no such file, or it is another one.
    """
    return saved.read(path, FORMAT, _simulated)


def _simulated(body: Mapping[str, Any]) -> Simulated:
    known = {name: value for name, value in body.items() if name != "format"}
    made = Simulated(**{**known, "traces": tuple(body["traces"]), "outcomes": ()})
    return replace(made, outcomes=tuple(map(outcome_of, body["outcomes"])))


def outcome_of(body: Mapping[str, Any]) -> Outcome:
    """Return an outcome from plain data."""
    classes = tuple(
        ClassOutcome(**{**one, "ttft_s": _numbers(one["ttft_s"]), "tpot_s": _numbers(one["tpot_s"])})
        for one in body["classes"]
    )
    return Outcome(**{**body, "classes": classes, "moments": tuple(Moment(**one) for one in body["moments"])})


def _numbers(values: Sequence[float | None]) -> tuple[float, ...]:
    return tuple(nan if value is None else value for value in values)
