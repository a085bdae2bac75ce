"""A model of a CPU's power without a meter, enabled only by the user: an estimate, good to a factor.

At full load it is time multiplied by a constant, so it adds nothing to seconds: it has its own metric and never ranks,
bounds or decides anything.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

from llmbuild.errors import InputError
from llmbuild.profiler import noise
from llmbuild.profiler.meters.meter import Boundary, Clock, Energy, Source, Window

VARIABLE = "LLMBUILD_ENERGY_ESTIMATE"
STEP_S = 0.01
"""CPU time is counted in hundredths of a second."""

_SHAPE = re.compile(r"(\d+(?:\.\d+)?):(\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class LinearModel:
    """Power that grows with the busy share of the CPUs, from `idle_w` to `max_w`; `busy_s` counts CPU seconds.

    Watts, `cpus` and `busy_s` are of the whole machine, whichever of its CPUs this process may use.
    """

    idle_w: float
    max_w: float
    cpus: int
    busy_s: Callable[[], float]
    clock: Clock = monotonic
    source: Source = "model"
    boundary: Boundary = "package"
    step_s: float = STEP_S

    def describe(self) -> str:
        """Return the description that accompanies every estimated value."""
        return f"estimate (linear model, idle {self.idle_w:g} W, full load {self.max_w:g} W, ±50 %), not measured"

    def window(self) -> Window:
        """Start counting busy CPU time."""
        return _ModelWindow(self)

    def conditions(self) -> dict[str, float | str]:
        """Return the model's inputs."""
        return {"model": self.describe()}


class _ModelWindow:
    def __init__(self, model: LinearModel) -> None:
        self._model = model
        self._begin, self._busy = model.clock(), model.busy_s()

    def keep(self) -> None:
        """Do nothing: this window needs no intermediate reads."""

    def close(self) -> Energy:
        model = self._model
        seconds, busy = model.clock() - self._begin, model.busy_s() - self._busy
        share = min(busy / model.cpus, seconds)
        return Energy(model.idle_w * seconds + (model.max_w - model.idle_w) * share, seconds)


def asked() -> bool:
    """Return whether the user enabled estimates."""
    return VARIABLE in os.environ


def find() -> LinearModel:
    """Return the model of `LLMBUILD_ENERGY_ESTIMATE=IDLE_W:FULL_LOAD_W`.

    Raises:
        InputError: not two numbers of watts, the second above the first.
    """
    text = os.environ.get(VARIABLE, "")
    match = _SHAPE.fullmatch(text.strip())
    if not match or float(match[1]) >= float(match[2]):
        raise InputError(f"{VARIABLE}={text!r}: write IDLE_WATTS:FULL_LOAD_WATTS, such as 20:65")
    return LinearModel(float(match[1]), float(match[2]), noise.cpus(), _busy_s)


def _busy_s() -> float:
    return noise.snapshot().busy / os.sysconf("SC_CLK_TCK")
