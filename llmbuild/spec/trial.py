"""One evaluated point, and its standing."""

from __future__ import annotations

from dataclasses import dataclass

from llmbuild.spec.measurement import Measurement
from llmbuild.spec.space import Point
from llmbuild.spec.variant import Failure

UNDECIDED = "undecided"
FRONT = ("pareto", UNDECIDED)
"""The statuses on a front: no variant is proven better."""
USABLE = (*FRONT, "dominated")
"""The statuses of variants that meet the recipe's bounds."""
FAILED = "failed"
"""The status of a variant that could not be built or measured."""


@dataclass(frozen=True)
class Trial:
    """The result of a point: a measurement for each workload, or a failure.

    `scope` is the digest of all inputs of the outcome except the point. `program` and `artifact` are absent where they
    could not be made.
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
    """The data of a trial from which a build sees whether it has anything to do; `reused` ones cost no evaluation."""

    point: Point
    variant: str
    is_default: bool
    reused: bool


@dataclass(frozen=True)
class Standing:
    """The standing of a variant on one workload: `pareto`, `undecided`, `dominated`, `infeasible` or `failed`."""

    variant: str
    workload: str
    status: str
    confidence: float | None
    reason: str
    measurement: str | None
