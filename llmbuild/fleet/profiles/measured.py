"""Profiles from a catalog's rows: what was measured on a machine of the fleet, and not beyond.

A row knows the time of a prompt and of a decode step at one batch, so a profile's batch limit is the largest batch that
was measured: one, unless the recipe asked for more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llmbuild.runtime import reader
from llmbuild.spec.fleet import Line, NodeClass, Profile, StepPower, StepTime
from llmbuild.spec.measurement import ESTIMATES
from llmbuild.spec.rows import Row, reading
from llmbuild.system.strict_json import loads

_BODIES = "SELECT DISTINCT workload, workload_body FROM measurements"


def measured(catalog: Path, classes: Iterable[NodeClass], models: Iterable[str]) -> list[Profile]:
    """Return a profile for each variant on the front of a model, on each machine that a class of nodes names.

    Raises:
        CatalogError: the catalog cannot be read.
    """
    named = [each for each in classes if each.machine]
    if not named:
        return []
    bodies = _workloads(catalog)
    rows = [row for model in dict.fromkeys(models) for row in reader.variants(catalog, model=model)]
    found = []
    for kind in named:
        on_it = [row for row in rows if row["machine_digest"].startswith(kind.device)]
        for variant in dict.fromkeys(row["variant"] for row in on_it):
            made = _profile(kind, [row for row in on_it if row["variant"] == variant], bodies)
            found += [made] if made else []
    return found


def _workloads(catalog: Path) -> Mapping[str, Mapping[str, Any]]:
    with reader.opened(catalog) as connection:
        return {str(row[0]): loads(row[1]) for row in connection.execute(_BODIES).fetchall()}


def _profile(kind: NodeClass, rows: list[Row], bodies: Mapping[str, Mapping[str, Any]]) -> Profile | None:
    """Return what a variant's rows say; None where a time is missing."""
    known = [row for row in rows if reading(row, "tpot_s") and reading(row, "ttft_s") and row["workload"] in bodies]
    if not known:
        return None
    row = max(known, key=lambda each: int(bodies[each["workload"]]["prompt"]))  # its prompt says most of long ones
    body = bodies[row["workload"]]
    batch, tpot_s, ttft_s = int(body.get("batch", 1)), row["tpot_s"] or 0.0, row["ttft_s"] or 0.0
    power, basis = _power(kind, row, tpot_s, batch)
    return Profile(
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
