"""Plans of fleets and outcomes of simulations as tables and JSON; every number has its basis beside it."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping, Sequence
from statistics import mean
from typing import Literal

from llmbuild.fleet.actuators.interface import NAMES, Intended
from llmbuild.fleet.loop import told_of
from llmbuild.fleet.plan.plan import Assignment, Plan
from llmbuild.fleet.simulate.outcome import Outcome
from llmbuild.fleet.simulate.trace import Trace
from llmbuild.report.table import table, terminal
from llmbuild.spec.fleet import Fleet

RESAMPLES = 2000
FACTORS = {"grams": "CO2e g", "money": "electricity"}
"""What energy emits and costs, by the names of the fields, where the fleet file says it."""


def plan_json(plan: Plan, whole: Plan | None = None) -> dict[str, object]:
    """Return a plan as plain data; `whole` is the best one without partitions."""
    found = _plan_json(plan)
    if whole is not None:
        found["layouts"] = {
            node.name: [{"layout": layout.name, "nodes": count} for layout, count in layouts]
            for node, layouts in zip(plan.fleet.nodes, plan.layouts, strict=True)
            if node.partitions is not None
        }
        found["without_partitions"] = {
            "feasible": whole.feasible,
            "cost": whole.cost,
            "bound": whole.bound,
            "watts": whole.watts,
            "price_per_h": whole.price_per_h,
            "nodes": {node.name: count for node, count in zip(whole.fleet.nodes, whole.nodes, strict=True)},
            "basis": whole.basis,
        }
    return found


def _plan_json(plan: Plan) -> dict[str, object]:
    return {
        "fleet": plan.fleet.name,
        "objective": plan.fleet.objective,
        "feasible": plan.feasible,
        "method": plan.method,
        "seconds": plan.seconds,
        "watts": plan.watts,
        "price_per_h": plan.price_per_h,
        "co2e_g_per_h": _per_hour(plan, "carbon"),
        "electricity_per_h": _per_hour(plan, "price"),
        "tariff_basis": plan.fleet.tariff and plan.fleet.tariff.basis,
        "cost": plan.cost,
        "bound": plan.bound,
        "gap": plan.gap if plan.feasible else None,
        "shortage": plan.shortage,
        "least_shortage": plan.least_shortage,
        "basis": plan.basis,
        "nodes": {node.name: count for node, count in zip(plan.fleet.nodes, plan.nodes, strict=True)},
        "assignments": [_assignment_json(each) for each in plan.assignments],
        "shortages": [
            {"service": s.service, "class": s.kind.name, "missing_per_s": s.rate, "of_per_s": s.of, "remedy": s.told}
            for s in plan.shortages
        ],
    }


def _assignment_json(one: Assignment) -> dict[str, object]:
    return {
        "service": one.service,
        "node": one.point.node.name,
        "slice": one.point.part.name if one.point.part else None,
        "variant": one.point.profile.variant,
        "replicas": one.replicas,
        "batch": one.point.batch,
        "clock_mhz": one.point.clock.mhz or None,
        "used": one.used,
        "watts": one.watts,
        "basis": one.point.profile.told,
        "clock_basis": one.point.clock.basis if one.point.clock.mhz else None,
        "fit_error": None if one.point.profile.estimate else one.point.profile.error,
        "expected_error": one.point.profile.error if one.point.profile.estimate else None,
        "source": one.point.profile.source,
        "classes": [{"class": s.kind.name, "rate_per_s": s.rate, "expected_miss": s.miss} for s in one.served],
        "why": one.why,
    }


def plan_table(plan: Plan, whole: Plan | None = None) -> str:
    """Return a plan as a table and a summary; `whole` is the best one without partitions."""
    header = [
        "service",
        "replicas",
        "node",
        "variant",
        "batch",
        "clock",
        "rate",
        "used",
        "miss",
        "watts",
        "basis",
        "why",
    ]
    lines = [
        [
            a.service,
            a.replicas,
            a.point.place,
            a.point.profile.variant,
            a.point.batch,
            f"{a.point.clock.mhz} MHz" if a.point.clock.mhz else "-",
            f"{sum(s.rate for s in a.served):.3g}/s",
            f"{a.used:.0%}",
            f"{max((s.miss for s in a.served), default=0):.1%}",
            f"{a.watts:.0f}",
            a.point.profile.told + (f"; clock {a.point.clock.basis}" if a.point.clock.mhz else ""),
            a.why,
        ]
        for a in plan.assignments
    ]
    told = [table(header, lines, (0, 2, 3, 10, 11), terminal(), (11, 8, 5))] if lines else []
    return "\n".join([*told, *_summary(plan), *(_layouts(plan, whole) if whole is not None else ())])


_UNIT = {"energy": "W", "cost": "an hour", "nodes": "nodes"}


def _layouts(plan: Plan, whole: Plan) -> list[str]:
    """Return which layouts nodes have, and what the best plan without partitions comes to."""
    lines = []
    for node, layouts in zip(plan.fleet.nodes, plan.layouts, strict=True):
        if node.partitions is None:
            continue
        told = ", ".join(f"{count} of {layout.name}" for layout, count in layouts) or "no node is on"
        fixed = "set_partition" not in plan.fleet.actuators
        stay = f"; all stay {node.partitions.now.name}: add `actuators: [set_partition]` for others" if fixed else ""
        lines.append(f"layouts of {node.name}: {told}{stay}")
    nodes = zip(whole.fleet.nodes, whole.nodes, strict=True)
    told = f"without partitions: {', '.join(f'{count} {node.name}' for node, count in nodes)}, {whole.watts:.0f} W"
    if not whole.feasible:
        return [*lines, f"{told}, and no place for {whole.shortage:.3g} requests/s, weighted by priority"]
    cost = f"{whole.cost:.4g} {_UNIT[whole.fleet.objective]}, at least {whole.bound:.4g} by the bound"
    if not plan.feasible:
        return [*lines, f"{told}: {cost}; it has a place for every request"]
    saved = 1 - plan.cost / whole.cost
    verdict = f"partitions save {saved:.1%}" if saved > 1e-6 else f"partitions cost {-saved:.1%} more"
    return [*lines, f"{told}: {cost}; {verdict}, by profiles of basis {plan.basis}"]


def _summary(plan: Plan) -> list[str]:
    nodes = zip(plan.fleet.nodes, plan.nodes, strict=True)
    told = ", ".join(f"{count} of {node.count} {node.name}" for node, count in nodes)
    price = f", {plan.price_per_h:.2f} an hour" if plan.price_per_h else ""
    lines = [f"{plan.load.rate:.3g} requests/s on {told} nodes: {plan.watts:.0f} W{price}; basis: {plan.basis}"]
    emitted, paid = _per_hour(plan, "carbon"), _per_hour(plan, "price")
    factors = [f"{emitted:.4g} g of CO2 equivalent"] if emitted is not None else []
    factors += [f"{paid:.4g} for electricity"] if paid is not None else []
    if plan.fleet.tariff and factors:
        lines.append(f"{' and '.join(factors)} an hour in the mean of a day; basis: {plan.fleet.tariff.basis}")
    unit = _UNIT[plan.fleet.objective]
    if plan.feasible:
        gap = f"{plan.cost:.4g} {unit}, at least {plan.bound:.4g} by the bound: gap {plan.gap:.1%}"
    else:
        least = f"no plan for less than {plan.least_shortage:.3g} by the bound"
        gap = f"no place for {plan.shortage:.3g} requests/s, weighted by priority; {least}"
    lines.append(f"{plan.method}: {gap}; {plan.seconds:.2f} s")
    return lines


def _per_hour(plan: Plan, factor: Literal["carbon", "price"]) -> float | None:
    """Return what the watts of a plan emit or cost in the mean hour of a day, where the fleet file says it."""
    series = getattr(plan.fleet.tariff, factor, None)
    return None if series is None else plan.watts / 1000 * series.mean


def shortage_lines(plan: Plan) -> list[str]:
    """Return what finds no place, and what would help."""
    return [
        f"{s.service}/{s.kind.name}: no place for {s.rate:.3g} of {s.of:.3g} requests/s: {s.told}"
        for s in plan.shortages
    ]


# --- live fleets -----------------------------------------------------------------------------------------------------


def actions_json(fleet: Fleet, actions: Sequence[Intended]) -> list[dict[str, object]]:
    """Return actions as plain data."""
    return [
        {
            "action": NAMES[type(one.action)],
            "what": _what(fleet, one),
            "outcome": one.answer.outcome,
            "reason": one.answer.reason,
            "why": one.action.why,
        }
        for one in actions
    ]


def actions_table(fleet: Fleet, actions: Sequence[Intended]) -> str:
    """Return actions as a table."""
    if not actions:
        return "nothing to do: what runs is what is wanted"
    lines = [[NAMES[type(one.action)], _what(fleet, one), one.answer.outcome, one.action.why] for one in actions]
    return table(["action", "what", "answer", "why"], lines, (0, 1, 2, 3), terminal(), (3,))


def _what(fleet: Fleet, one: Intended) -> str:
    return told_of(fleet, one.action).partition(" ")[2].strip()


# --- nodes -----------------------------------------------------------------------------------------------------------


def nodes_json(fleet: Fleet, out: Collection[str]) -> list[dict[str, object]]:
    """Return the nodes of a fleet as plain data."""
    return [
        {"node": name, "class": kind.name, "in_service": name not in out} for kind in fleet.nodes for name in kind.nodes
    ]


def nodes_table(fleet: Fleet, out: Collection[str]) -> str:
    """Return how many nodes of each class are in service, and which are not."""
    lines = []
    for kind in fleet.nodes:
        gone = [name for name in kind.nodes if name in out]
        lines.append([kind.name, kind.count - len(gone), len(gone), " ".join(gone) or "-"])
    return table(["class", "in service", "out", "which are out"], lines, (0, 3), terminal(), (3,))


# --- simulations -----------------------------------------------------------------------------------------------------


def outcome_json(one: Outcome) -> dict[str, object]:
    """Return an outcome as plain data."""
    return {
        "policy": one.policy,
        "seed": one.seed,
        "requests": one.arrivals,
        "attainment": one.attainment,
        "joules": dict(one.joules),
        "joules_per_output_token": one.joules_per_token,
        "idle_share": one.idle_share,
        "switching_share": one.switching_share,
        "co2e_g": one.grams,
        "electricity_price": one.money,
        "tariff_basis": one.tariff_basis,
        "output_tokens": one.output_tokens,
        "prompt_tokens": one.prompt_tokens,
        "node_hours": one.node_hours,
        "switches": dict(one.switches),
        "seconds": one.seconds,
        "decide_s": one.decide_s,
        "basis": one.basis,
        "explained": one.explained,
        "classes": [
            {
                "service": c.service,
                "class": c.kind,
                "arrivals": c.arrivals,
                "attainment": c.attainment,
                "good_minutes": c.good_minutes,
                "rejected": c.rejected,
                "lost": c.lost,
                "unfinished": c.unfinished,
                "ttft_s_p50_p95_p99": list(c.ttft_s),
                "tpot_s_p50_p95_p99": list(c.tpot_s),
            }
            for c in one.classes
        ],
    }


def outcomes_table(outcomes: Sequence[Outcome], oracle: str) -> str:
    """Return a row for each policy: means over seeds, with 95 % bootstrap intervals where there are several.

    Regret is the energy for each token over the oracle's, seed by seed.
    """
    by_policy: dict[str, list[Outcome]] = {}
    for one in outcomes:
        by_policy.setdefault(one.policy, []).append(one)
    names = [f"{c.service}/{c.kind}" for c in outcomes[0].classes]
    figures = ["J/token", "idle", "switching", "node-h", "changes", "regret", "basis"]
    header = ["policy", *(f"met {name}" for name in names), *figures]
    factors = [name for name in FACTORS if getattr(outcomes[0], name) is not None]
    header[len(names) + 2 : len(names) + 2] = [f"{FACTORS[name]} ({outcomes[0].tariff_basis})" for name in factors]
    lines = [_line(policy, those, by_policy.get(oracle, ()), factors) for policy, those in by_policy.items()]
    return table(header, lines, (0, len(header) - 1), terminal())


def _line(policy: str, those: Sequence[Outcome], best: Sequence[Outcome], factors: Sequence[str]) -> list[object]:
    attained = [_interval([one.classes[i].attainment for one in those], ".2%") for i in range(len(those[0].classes))]
    regret = "-"
    if best and policy != best[0].policy:
        theirs = {one.seed: one.joules_per_token for one in best}
        paired = [one.joules_per_token / theirs[one.seed] - 1 for one in those if one.seed in theirs]
        regret = _interval(paired, "+.1%") if paired else "-"
    return [
        policy,
        *attained,
        _interval([one.joules_per_token for one in those], ".3f"),
        *(_interval([getattr(one, name) for one in those], ".4g", False) for name in factors),
        _interval([one.idle_share for one in those], ".0%", False),
        _interval([one.switching_share for one in those], ".1%", False),
        _interval([one.node_hours for one in those], ".2f", False),
        _interval([float(one.changes) for one in those], ".0f", False),
        regret,
        those[0].basis,
    ]


def _interval(values: Sequence[float], form: str, bounds: bool = True) -> str:
    """Return the mean, and its bootstrap interval."""
    middle = format(mean(values), form)
    if len(values) < 3 or not bounds or not all(map(math.isfinite, values)):
        return middle
    low, high = bootstrap(values)
    return f"{middle} [{low:{form}}, {high:{form}}]"


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean; the draws are always the same."""
    rng = random.Random(0)
    means = sorted(mean(rng.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES) - 1]


def trace_lines(traces: Mapping[str, Trace]) -> list[str]:
    """Return what each trace is, and what was done to it."""
    return [
        f"{name + ': ' if name else ''}{trace.name}: {len(trace.arrivals)} requests in {trace.seconds:.0f} s, "
        f"{trace.rate:.3g}/s, CV of gaps {trace.variation:.1f}; {'; '.join(trace.told) or 'as it is'}"
        for name, trace in traces.items()
    ]
