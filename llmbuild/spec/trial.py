"""One evaluated point, and where it stands among the others."""

from __future__ import annotations

from dataclasses import dataclass

from llmbuild.spec.measurement import Measurement
from llmbuild.spec.space import Point
from llmbuild.spec.variant import Failure

UNDECIDED = "undecided"
FRONT = ("pareto", UNDECIDED)
"""Where a variant stands that belongs to a front: nothing is proven to beat it."""
USABLE = (*FRONT, "dominated")
"""Where a variant stands that meets the recipe's bounds."""
FAILED = "failed"
"""Where a variant stands that could not be made or measured."""


@dataclass(frozen=True)
class Trial:
    """What came of a point: a measurement for each workload, or a failure.

    `scope` is the digest of everything that decides the outcome but the point. `program` and `artifact` are absent
    where making them failed.
    """

    scope: str
    number: int
    point: Point
    variant: str
    is_default: bool
    program: str | None
    artifact: str | None
    artifact_bytes: int | None
    parameter_bytes: int | None
    measurements: tuple[Measurement, ...]
    failure: Failure | None
    seconds: float


@dataclass(frozen=True)
class Finished:
    """What a build must know of a trial to see whether it has anything to do; `reused` ones cost no evaluation."""

    point: Point
    variant: str
    is_default: bool
    reused: bool


@dataclass(frozen=True)
class Standing:
    """Where a variant stands on one workload: `pareto`, `undecided`, `dominated`, `infeasible` or `failed`."""

    variant: str
    workload: str
    status: str
    confidence: float | None
    reason: str
    measurement: str | None
