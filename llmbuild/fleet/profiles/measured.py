"""Profiles from a catalog: what was measured on a machine of the fleet, and not beyond.

A load curve knows steps of many sequences, up to as many as were measured. A row knows the time of a prompt and of a
decode step at one batch: without a curve the batch limit of a profile is the largest batch that was measured, one
unless the recipe asked for more. A row knows nothing of what a server does between two steps: that is taken from the
curves of other variants on the same machine, where there are some, and the profile is then an estimate. Else a variant
would look the faster for not having been measured under load.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from llmbuild.errors import CatalogError
from llmbuild.runtime import host, reader
from llmbuild.runtime import model as loader
from llmbuild.serve import budget
from llmbuild.spec.fleet import HOST, Basis, Line, NodeClass, Profile, StepPower, StepTime
from llmbuild.spec.load_curve import LoadCurve, Work, taken_on
from llmbuild.spec.measurement import ESTIMATES
from llmbuild.spec.program import abi_from
from llmbuild.spec.rows import Row, reading
from llmbuild.system.strict_json import loads

_BODIES = "SELECT DISTINCT workload, workload_body FROM measurements"
_SYNC = "local-sync"
"""The driver that computes on the thread that calls."""
_PROMPT = 512
"""Tokens of the piece of a prompt whose time is taken for all."""


@dataclass(frozen=True)
class _Known:
    """What a catalog knows of one variant on one machine."""

    row: Row
    body: Mapping[str, Any]
    """Of the row's workload."""
    curve: LoadCurve | None
    own_s: float | None
    """What a server does between two steps, by the curves of other variants."""


def measured(catalog: Path, classes: Iterable[NodeClass], models: Iterable[str]) -> list[Profile]:
    """Return a profile for each variant on the front of a model, on each machine that a class of nodes names.

    Raises:
        CatalogError: the catalog cannot be read.
    """
    named = {each.device: each for each in classes if each.machine}
    if not named:
        return []
    bodies = _workloads(catalog)
    rows = [row for model in dict.fromkeys(models) for row in reader.variants(catalog, model=model)]
    curves = reader.load_curves(catalog, [row["variant"] for row in rows])
    found = []
    for kind in named.values():
        digits = machine_of(kind)
        on_it = [row for row in rows if row["machine_digest"].startswith(digits)]
        own = [curve.own.step_s for curve in curves if curve.machine.startswith(digits)]
        own_s = median(own) if own else None
        for variant in dict.fromkeys(row["variant"] for row in on_it):
            known_here = [c for c in curves if c.variant == variant and c.machine.startswith(digits)]
            curve = taken_on(known_here, kind.slot_cores)
            known = _known([row for row in on_it if row["variant"] == variant], bodies, curve, own_s)
            found += [_on_cores(_profile(kind, known), kind, known)] if known else []
    return found


def absent(catalog: Path, profiles: Iterable[Profile]) -> list[Profile]:
    """Return the profiles whose variants a catalog does not have: published ones, estimates, those of a file."""
    found, known = [], dict[str, list[str]]()
    for each in profiles:
        if each.model not in known:
            try:
                known[each.model] = [row["variant"] for row in reader.variants(catalog, model=each.model)]
            except CatalogError:
                known[each.model] = []
        if not any(variant.startswith(each.variant) for variant in known[each.model]):
            found.append(each)
    return found


def machine_of(kind: NodeClass) -> str:
    """Return the first digits of the machine of a class of nodes."""
    name = kind.device.partition("/")[0]
    return loader.host_facts().machine if name == HOST else name


def _workloads(catalog: Path) -> Mapping[str, Mapping[str, Any]]:
    with reader.opened(catalog) as connection:
        return {str(row[0]): loads(row[1]) for row in connection.execute(_BODIES).fetchall()}


def _known(
    rows: list[Row], bodies: Mapping[str, Mapping[str, Any]], curve: LoadCurve | None, own_s: float | None
) -> _Known | None:
    """Return what a variant's rows and curve say; None where a time is missing."""
    timed = [row for row in rows if reading(row, "tpot_s") and reading(row, "ttft_s") and row["workload"] in bodies]
    if not timed:
        return None
    row = max(timed, key=lambda each: int(bodies[each["workload"]]["prompt"]))  # its prompt says most of long ones
    return _Known(row, bodies[row["workload"]], curve, own_s)


def _profile(kind: NodeClass, known: _Known) -> Profile:
    row, body = known.row, known.body
    batch, tpot_s, ttft_s = int(body.get("batch", 1)), row["tpot_s"] or 0.0, row["ttft_s"] or 0.0
    power, basis = _power(kind, row, tpot_s, batch)
    made = Profile(
        device=kind.device,
        model=row["model"],
        variant=row["variant"][:12],
        step=StepTime(_decode_s(tpot_s, batch), 0.0, _prompt_s(body, ttft_s)),
        power=power,
        max_rows=batch,
        weights_bytes=float(row["peak_memory_bytes"] or row["parameter_bytes"] or 0),
        kv_bytes_per_token=0.0,  # in the peak of the process, which ran the whole context
        load_s=reading(row, "load_s") or 0.0,
        decode_basis="measured",
        prompt_basis="measured",
        power_basis=basis,
        source=f"catalog, workload {row['workload']}, {row['machine']}",
        quality_kl=row["quality_kl"],
    )
    if known.curve is not None:
        return _by_curve(made, row, known.curve)
    return made if known.own_s is None else _served(made, known.own_s)


def _served(made: Profile, own_s: float) -> Profile:
    """Return a profile whose steps take what a server does between them, too."""
    rows = made.step.rows_s
    step = replace(made.step, rows_s=Line(rows.at, tuple(seconds + own_s for seconds in rows.values)))
    told = f"{made.source}; a server's own {own_s * 1e6:.0f} us a step by other load curves: it has none"
    return replace(made, step=step, decode_basis="estimated", source=told)


def _by_curve(made: Profile, row: Row, curve: LoadCurve) -> Profile:
    """Return a profile with the times of a load curve, which knows steps of many sequences."""
    most = max(1, curve.decodes_most)
    abi = row.get("abi")
    need = budget.need(row["model"], row, abi_from(abi), most) if abi else None
    return replace(
        made,
        step=step_of(curve),
        max_rows=most,
        weights_bytes=float(need.fixed_bytes) if need else made.weights_bytes,
        kv_bytes_per_token=need.sequence_bytes / curve.context if need else 0.0,
        source=f"catalog, load curve {curve.key[:12]}, {row['machine']}",
        error=curve.error_p95,
    )


def step_of(curve: LoadCurve) -> StepTime:
    """Return the seconds of a server's steps by a load curve: plans take the lines, the simulator the fit itself."""
    most, own = max(1, curve.decodes_most), curve.own
    rows = sorted({1, most, *(n for n in (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96) if n < most)})
    piece = max(1, min(_PROMPT, curve.prompt_most))
    prompt_s = (curve.served_s(Work.of([(0, piece)])) - own.step_s) / piece
    line = Line((0.0, *map(float, rows)), (own.step_s, *(curve.served_s(Work(decodes=n)) for n in rows)))
    fit = curve.served_fit
    return StepTime(line, fit.context_s, prompt_s, own.request_s + own.end_s, fit, own)


def _on_cores(made: Profile, kind: NodeClass, known: _Known) -> Profile:
    """Return a profile for a slot of some cores: what computed on more of them is taken to be slower in proportion."""
    if not kind.slot_cores:
        return made
    point = known.row["point"]
    workers = int(point.get("workers", 0)) or host.machine_cores()
    used, here = 1 if point.get("driver") == _SYNC else workers, kind.slot_cores
    if used <= here or (known.curve is not None and known.curve.cores == here):
        return made
    slower = used / here
    step = made.step.times(slower)
    basis: Basis = "estimated"
    told = f"{made.source}; times x{slower:g}: measured on {used} cores, a slot has {here}"
    return replace(made, step=step, decode_basis=basis, prompt_basis=basis, source=told)


def _decode_s(tpot_s: float, batch: int) -> Line:
    """Return seconds by rows; a call of a batch computes all its rows, whether they are there or not."""
    return Line((0.0, 1.0), (0.0, tpot_s)) if batch == 1 else Line((1.0, float(batch)), (tpot_s, tpot_s))


def _prompt_s(body: Mapping[str, Any], ttft_s: float) -> float:
    return ttft_s / (float(body["prompt"]) * int(body.get("batch", 1)))


def _power(kind: NodeClass, row: Row, tpot_s: float, batch: int) -> tuple[StepPower | None, Any]:
    """Return watts from the row's joules, else those that the class of nodes gives for an active slot."""
    joules = reading(row, "energy_j_per_token")
    if joules is not None and row.get("energy_source") not in ESTIMATES:
        watts = joules * batch / tpot_s
        return StepPower(Line((1.0,), (watts,)), watts), "measured"
    if kind.active_w:
        return StepPower(Line((1.0,), (kind.active_w,)), kind.active_w), kind.watts_basis
    return None, "estimated"
