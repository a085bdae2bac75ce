"""What placing operators apart would save for the services of a fleet, as a table and JSON, with the basis."""

from __future__ import annotations

from collections.abc import Sequence

from llmbuild.fleet.operators.plan import CellPlan
from llmbuild.fleet.operators.published import SOURCE
from llmbuild.fleet.operators.services import Compared, Unknown
from llmbuild.report.table import table, terminal

WATTS_BASIS = "estimated"
"""Boards' watts are a rule over the work of a call."""


def operators_json(found: Sequence[Compared | Unknown]) -> list[dict[str, object]]:
    """Return comparisons as plain data; `known` says whether there is one."""
    return [_compared_json(one) if isinstance(one, Compared) else _unknown_json(one) for one in found]


def operators_table(found: Sequence[Compared | Unknown]) -> str:
    """Return comparisons as a table, and a line for each that is not known."""
    known = [one for one in found if isinstance(one, Compared)]
    header = ["service", "node", "link", "replicas", "J/token", "models", "J/token", "operators", "J/token"]
    header += ["devices saved", "joules saved", "cells", "basis"]
    rows = [
        [
            one.service.name,
            one.node,
            one.link.name,
            *_figures(one, one.replicas),
            *_figures(one, one.models),
            *_figures(one, one.operators),
            _share(one.saved_devices),
            _share(one.saved_joules),
            one.operators.told,
            f"{one.basis}; watts {WATTS_BASIS}",
        ]
        for one in known
    ]
    lines = [table(header, rows, (0, 1, 2, 11, 12), terminal(), (12, 11))] if known else []
    unknown = [one for one in found if isinstance(one, Unknown)]
    lines += [f"operators of {one.service.name} on {one.node}: not known: {one.reason}" for one in unknown]
    if known:
        lines.append(
            "operators apart against models, whole or with matrices divided: computed, each service alone on all"
            f" devices of a class, weights in 16 bits; nothing here serves them apart. Tables: {SOURCE}"
        )
    return "\n".join(lines)


def _compared_json(one: Compared) -> dict[str, object]:
    return {
        "service": one.service.name,
        "node": one.node,
        "known": True,
        "rate_per_s": one.service.rate,
        "link": one.link.name,
        "devices_of_a_cell": one.within,
        "replicas": _plan_json(one, one.replicas),
        "models": _plan_json(one, one.models),
        "operators": _plan_json(one, one.operators),
        "devices_saved": one.saved_devices,
        "joules_saved": one.saved_joules,
        "basis": one.basis,
        "watts_basis": WATTS_BASIS,
        "source": SOURCE,
    }


def _unknown_json(one: Unknown) -> dict[str, object]:
    return {"service": one.service.name, "node": one.node, "known": False, "reason": one.reason}


def _plan_json(one: Compared, plan: CellPlan) -> dict[str, object] | None:
    if not plan.feasible:
        return None
    cells = {choice.name: count for choice, count in plan.cells}
    return {"devices": plan.devices, "watts": plan.watts, "joules_per_token": one.joules(plan), "cells": cells}


def _figures(one: Compared, plan: CellPlan) -> tuple[str, str]:
    """Return the devices and the joules for each token of a plan."""
    joules = one.joules(plan)
    return (str(plan.devices), f"{joules:.3g}") if joules is not None else ("-", "-")


def _share(saved: float | None) -> str:
    return "-" if saved is None else f"{saved:.1%}"
