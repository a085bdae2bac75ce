"""What is to be built: data only, so that it can be hashed, diffed and stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from llmbuild.spec.slo import Bound
from llmbuild.spec.space import Value
from llmbuild.spec.workload import Workload

Sampler = Literal["auto", "gp", "tpe", "nsga2", "random"]
SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)
AUTO: Sampler = "gp"
"""The sampler that `auto` is."""


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from. `location` is an absolute folder or a hub id; it is never part of a key."""

    kind: str
    location: str
    random_init: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Quality:
    """The gate a variant must pass on held-out text: `stdlib` module names, or one text file.

    `tokens` is how many are scored. A bound is a quality metric with a limit.
    """

    stdlib: tuple[str, ...] = ()
    file: str = ""
    tokens: int = 512
    bounds: tuple[Bound, ...] = ()


@dataclass(frozen=True)
class Calibration:
    """The text that weights are rounded for: `stdlib` module names, or one text file; `tokens` is how much is read.

    It must not be the text that quality is measured on.
    """

    stdlib: tuple[str, ...] = ()
    file: str = ""
    tokens: int = 4096


@dataclass(frozen=True)
class Budget:
    """How much a build may spend: unique evaluations, and seconds."""

    trials: int = 12
    seconds: float = 1200.0


@dataclass(frozen=True)
class Recipe:
    """Model, workloads, objectives, gate and budget; `knobs` narrows or pins a knob to these values."""

    name: str
    model: ModelSource
    workloads: tuple[Workload, ...]
    objectives: tuple[str, ...]
    constraints: tuple[Bound, ...]
    quality: Quality
    budget: Budget
    knobs: tuple[tuple[str, tuple[Value, ...]], ...] = ()
    calibration: Calibration | None = None
    sampler: Sampler = "auto"
    """What chooses the next point: our own (`gp`, which `auto` takes), or one of Optuna's."""

    @property
    def context(self) -> int:
        """Tokens of KV cache that every workload fits in."""
        return max(w.context for w in self.workloads)

    @property
    def batch(self) -> int:
        """Sequences that every workload answers together."""
        return self.workloads[0].batch
