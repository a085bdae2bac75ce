"""Profiles of models on devices where nothing was measured or published: estimates, with the error to expect.

What a fleet file gives of other models or devices counts as observations, where their figures are known by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llmbuild.errors import InputError
from llmbuild.fleet.estimate.estimator import Estimator, shipped
from llmbuild.fleet.estimate.figures import WIDTHS, Observation, Point, machines, models
from llmbuild.fleet.estimate.figures import observations as batches
from llmbuild.fleet.profiles.published import LOAD_S
from llmbuild.spec.figures import Architecture, Machine
from llmbuild.spec.fleet import Fleet, Line, Profile, StepPower, StepTime

ENGINE, KIND = "vllm", "batch"
"""What is estimated: static batches of vLLM, as the published profiles are."""
ROWS = (1, 4, 16, 64)
"""Rows that are estimated: beyond them few batches are known."""
PROMPT = 2048
"""Tokens of the prompt whose time is taken for all."""
SEEN = (256, 2048)
"""Positions for each row between which the time of a position is taken."""
NINE_IN_TEN = 1.645
"""Standard deviations that nine of ten are within."""
_LEAST_PROMPT = 0.2
"""Share of a prompt's step that is its tokens' at least."""
_LOAD_BYTES = 16.06e9
"""Of the weights that were loaded in LOAD_S."""


@dataclass(frozen=True)
class _Both:
    """Estimators of seconds and of watts, and what refined them."""

    seconds: Estimator
    watts: Estimator
    seen: tuple[str, ...]


def estimated(fleet: Fleet, known: Iterable[Profile]) -> list[Profile]:
    """Return profiles for each model of a fleet on each device that has none; machines of a catalog have no figures.

    Raises:
        InputError: the figures of a device or of a model are not known.
    """
    there = {(profile.device, profile.model) for profile in known}
    devices = dict.fromkeys(node.device for node in fleet.nodes if not node.machine)
    wanted = dict.fromkeys((device, service.model) for service in fleet.services for device in devices)
    missing = [pair for pair in wanted if pair not in there]
    if not missing:
        return []
    on = machines() | {each.name: each for each in fleet.machines}
    of = models() | {each.name: each for each in fleet.architectures}
    for device, model in missing:
        _known("device", device, on)
        _known("model", model, of)
    both = _refined(fleet.profiles, on, of)
    return [made for device, model in missing for made in _profiles(both, on[device], of[model])]


def _known(what: str, name: str, there: Iterable[str]) -> None:
    if name not in there:
        told = f"no figures of {what} {name} to estimate a profile from: there are {', '.join(there)}"
        raise InputError(f"{told}; give them in `figures`, or all its profiles in `profiles`")


def _refined(given: Sequence[Profile], on: Mapping[str, Machine], of: Mapping[str, Architecture]) -> _Both:
    """Return the estimators, refined by the profiles of a fleet file that are no estimates."""
    seen = [p for p in given if p.device in on and p.model in of and p.variant in WIDTHS]
    steps = [(p, _steps(p, on[p.device], of[p.model])) for p in seen]
    timed = [each for _, found in steps for each in found]
    both = _Both(shipped("seconds"), shipped("watts"), tuple(f"{p.model} on {p.device}" for p, found in steps if found))
    if not timed:
        return both
    drawn = [each for each in timed if each.watts]
    watts = both.watts.refined(drawn) if drawn else both.watts
    return _Both(both.seconds.refined(timed), watts, both.seen)


def _steps(profile: Profile, machine: Machine, model: Architecture) -> list[Observation]:
    """Return the steps of a profile that were measured or published."""
    found = []
    power = profile.power if profile.power_basis != "estimated" else None
    if profile.decode_basis != "estimated":
        for rows in profile.step.rows_s.at:
            context = rows * SEEN[0]
            at = Point(machine, model, profile.variant, ENGINE, KIND, 1, rows, context, 0.0)
            if rows:
                watts = power.rows_w(rows) if power else 0.0
                found.append(Observation(at, profile.step.seconds(rows, context, 0), watts, profile.source))
    if profile.prompt_basis != "estimated":
        at = Point(machine, model, profile.variant, ENGINE, KIND, 1, 0.0, 0.0, PROMPT)
        watts = power.prompt_w if power else 0.0
        found.append(Observation(at, profile.step.seconds(0, 0, PROMPT), watts, profile.source))
    return found


def _profiles(both: _Both, machine: Machine, model: Architecture) -> list[Profile]:
    """Return a profile in each precision that the machine multiplies, or in the one that the model comes in."""
    narrow = any(at.model == model and at.precision == "mxfp4" for at in (each.point for each in batches()))
    precisions = ["mxfp4"] if narrow else ["fp16", *(["fp8"] if machine.fp8 > machine.fp16 else [])]
    return [_profile(both, machine, model, precision) for precision in precisions]


def _profile(both: _Both, machine: Machine, model: Architecture, precision: str) -> Profile:
    def at(rows: float, seen: float, prompt: float) -> Point:
        return Point(machine, model, precision, ENGINE, KIND, 1, rows, rows * seen, prompt)

    points = [*(at(rows, SEEN[0], 0.0) for rows in ROWS), at(ROWS[2], SEEN[1], 0.0), at(0.0, 0.0, PROMPT)]
    together = both.seconds.together(points)
    seconds = np.exp(together.logs)
    watts = [float(x) for x in np.exp(both.watts.together([*points[: len(ROWS)], points[-1]]).logs)]
    context_s = max(0.0, float(seconds[-2] - seconds[2])) / (ROWS[2] * (SEEN[1] - SEEN[0]))
    rows_s = np.maximum.accumulate(
        [max(seconds[i] / 2, seconds[i] - context_s * n * SEEN[0]) for i, n in enumerate(ROWS)]
    )
    line = Line(tuple(map(float, ROWS)), tuple(float(x) for x in rows_s))
    prompt_s = max(_LEAST_PROMPT * seconds[-1], seconds[-1] - max(line(0), 0.0)) / PROMPT
    error = float(math.exp(NINE_IN_TEN * together.deviations.max()) - 1)
    weights = model.parameters * WIDTHS[precision]
    return Profile(
        device=machine.name,
        model=model.name,
        variant=precision,
        step=StepTime(line, context_s, float(prompt_s)),
        power=StepPower(Line(line.at, tuple(watts[:-1])), watts[-1]),
        max_rows=ROWS[-1],
        weights_bytes=weights,
        kv_bytes_per_token=model.kv_bytes,
        load_s=LOAD_S * max(1.0, weights / _LOAD_BYTES),
        decode_basis="estimated",
        prompt_basis="estimated",
        power_basis="estimated",
        source=_source(both, machine, model),
        error=error,
        estimate=True,
    )


def _source(both: _Both, machine: Machine, model: Architecture) -> str:
    """Return what an estimate is made of."""
    own = sum((each.point.machine.name, each.point.model.name) == (machine.name, model.name) for each in batches())
    told = f"estimate for {ENGINE} from {len(batches())} published batches, {own} of {model.name} on {machine.name}"
    told += f"; {machine.source}; {model.source}"
    return f"{told}; refined by {', '.join(both.seen)} of the fleet file" if both.seen else told
