"""Operators against whole models: devices and energy of plans over windows of traces, and plans run call by call.

    python scripts/bench/operators.py --trace chat=FILE --trace code=FILE [--device NAME]... [--model NAME]...
                                      [--rate N] [--window S] [--seeds N] [--most N] [--links] [--estimated]
                                      [--check S] [--json]

Figures are simulated; those of devices are published (`llmbuild/fleet/operators`), or with `--estimated` rooflines.
Classes, their SLOs and the watts of boards that wait are those of recipes/fleets/gpus.yaml. A seed lays the trace over
itself at other offsets. A window is planned for the largest rate of its 10 s, at every level alike, and draws what its
mean rate takes.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from statistics import mean
from time import perf_counter

from comparison.script import end, say

from llmbuild.errors import InputError
from llmbuild.fleet.operators.cell import ETHERNET, FREE, NETWORK, NVLINK, Link
from llmbuild.fleet.operators.plan import APART, LAYERS, MODELS, MOST, OPERATORS, REPLICAS, CellPlan, Table
from llmbuild.fleet.operators.plan import table as choices
from llmbuild.fleet.operators.published import SHAPES, published
from llmbuild.fleet.operators.queues import Request, attained, run
from llmbuild.fleet.operators.roofline import roofline
from llmbuild.fleet.policies.named import POLICIES
from llmbuild.fleet.simulate.trace import Trace, read_trace
from llmbuild.report.fleet import bootstrap
from llmbuild.report.table import table
from llmbuild.spec.files.fleet import read_fleet
from llmbuild.spec.fleet import Fleet, NodeClass, RequestClass

LEVELS = {
    "replicas": REPLICAS,
    "replicas, operators": APART,
    "replicas, tensor": MODELS,
    "and pipelines": LAYERS,
    "and operators": OPERATORS,
}
"""Levels of cells that a plan may choose from; the last two may choose what those before them may."""
NAMES = {
    "devices/replicas": ("replicas", 0),
    "energy/replicas": ("replicas", 1),
    "devices/tensor": ("replicas, tensor", 0),
    "energy/tensor": ("replicas, tensor", 1),
}
"""Columns: of which level, devices or watts."""
BIN_S = 10.0
GRID = 1.02
"""Ratio between two rates that plans are made for."""
DEVICES = 2000
"""More than any plan takes."""
MEMORY_BYTES = 80e9
"""Of each device, by its name."""
FLEET = Path(__file__).parents[2] / "recipes/fleets/gpus.yaml"


@dataclass(frozen=True)
class Case:
    """One model on one kind of device, asked for by one trace."""

    trace: str
    model: str
    device: str
    link: Link
    kind: RequestClass
    most: int
    estimated: bool = False
    """Whether rooflines of the same operators stand for the published tables."""

    @property
    def node(self) -> NodeClass:
        """Return one device: a slot of the fleet file's class of the same board, with its share of the host."""
        one = next(node for node in fleet().nodes if board(node.device) == board(self.device))
        return replace(
            one,
            name=self.device,
            device=self.device,
            count=DEVICES,
            slots=1,
            memory_bytes=MEMORY_BYTES,
            host_w=one.host_w / one.slots,
            clocks=(),
        )

    def table(self) -> Table:
        """Return its choices."""
        found = [p for (device, model, _), p in published().items() if (device, model) == (self.device, self.model)]
        if not found:
            raise InputError(f"no published operators of {self.model} on {self.device}")
        if self.estimated:
            found = [roofline(each.shape, each.machine) for each in found]
        return choices(tuple(found), self.node, self.link, ((self.kind, 1.0),), 0.99, self.most)


def board(device: str) -> str:
    """Return a device's name without its memory."""
    return device.rpartition("-")[0]


def options(words: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", action="append", required=True, help="CLASS=FILE, of a class of the fleet file")
    parser.add_argument("--device", action="append", choices=list(NVLINK))
    parser.add_argument("--model", action="append", choices=list(SHAPES))
    parser.add_argument("--rate", type=float, default=8.0, help="times the requests of the trace")
    parser.add_argument("--window", type=float, default=60.0)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--most", type=int, default=MOST, help="devices of a cell, at most")
    parser.add_argument("--estimated", action="store_true", help="take rooflines in place of the published tables")
    parser.add_argument("--links", action="store_true", help="vary the link too")
    parser.add_argument("--check", type=float, default=0.0, help="simulate so many seconds of the busiest window")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(words)


@cache
def fleet() -> Fleet:
    """Return the fleet file, which says watts and classes."""
    return read_fleet(FLEET, tuple(POLICIES))


def kinds() -> dict[str, RequestClass]:
    """Return the classes of the fleet file."""
    return {kind.name: kind for one in fleet().services for kind in one.classes}


def windows(trace: Trace, seconds: float) -> list[tuple[float, float]]:
    """Return for each window the largest rate of its bins, and its mean rate."""
    counts = [0] * math.ceil(trace.seconds / BIN_S)
    for arrival in trace.arrivals:
        counts[int(arrival.at_s / BIN_S)] += 1
    each = max(1, round(seconds / BIN_S))
    parts = [counts[i : i + each] for i in range(0, len(counts) - each + 1, each)]
    return [(max(part) / BIN_S, mean(part) / BIN_S) for part in parts]


@lru_cache(1 << 14)
def planned(case: Case, level: str, step: int) -> CellPlan:
    """Return the plan for a rate of the grid."""
    return case.table().plan(GRID**step, LEVELS[level])


def plan_for(case: Case, level: str, rate: float) -> CellPlan:
    """Return the plan for the rate of the grid above this one."""
    return planned(case, level, math.ceil(math.log(max(rate, 0.1)) / math.log(GRID)))


def hours(case: Case, parts: Sequence[tuple[float, float]], level: str) -> tuple[float, float] | None:
    """Return the mean devices and the mean watts over windows; None where one has no plan."""
    plans = [(plan_for(case, level, peak), rate) for peak, rate in parts]
    if not all(each.feasible for each, _ in plans):
        return None
    return mean(each.devices for each, _ in plans), mean(each.watts_at(rate) for each, rate in plans)


def interval(values: Sequence[float], form: str) -> str:
    """Return a mean with its 95 % bootstrap interval."""
    if len(values) < 3:
        return format(mean(values), form)
    low, high = bootstrap(list(values))
    return f"{mean(values):{form}} [{low:{form}}, {high:{form}}]"


def rows_of(case: Case, traces: Sequence[Trace], seconds: float) -> list[dict[str, object]]:
    """Return a row for each level, with differences paired by seed."""
    began = perf_counter()
    parts = [windows(trace, seconds) for trace in traces]
    found = {level: [hours(case, part, level) for part in parts] for level in LEVELS}
    rows: list[dict[str, object]] = []
    for level, values in found.items():
        row: dict[str, object] = {
            "trace": case.trace,
            "model": case.model,
            "device": case.device.partition("-")[0],
            "link": case.link.name,
            "cells": level,
        }
        known = [each for each in values if each is not None]
        if len(known) < len(values):
            rows.append(row | dict.fromkeys(("devices", "kW", *NAMES), "-"))
            continue
        row |= {"devices": interval([d for d, _ in known], ".1f"), "kW": f"{mean(w for _, w in known) / 1e3:.2f}"}
        for name, (base, which) in NAMES.items():
            row[name] = less(known, found[base], which)
        rows.append(row)
    busiest = max((peak for part in parts for peak, _ in part), default=0.0)
    say(f"{case}: {perf_counter() - began:.0f} s")
    say(f"  at {busiest:.1f}/s: " + "; or ".join(plan_for(case, level, busiest).told for level in LEVELS))
    return rows


def less(mine: Sequence[tuple[float, float]], base: Sequence[tuple[float, float] | None], which: int) -> str:
    """Return how much more, or less, than the base, seed by seed."""
    if any(each is None for each in base):
        return "-"
    ratios = [a[which] / b[which] - 1 for a, b in zip(mine, base, strict=True) if b]
    return interval(ratios, "+.1%") if any(ratios) else "0"


def check(case: Case, trace: Trace, seconds: float) -> list[dict[str, object]]:
    """Return how plans of the busiest bin do when its rate lasts: Poisson arrivals with lengths of the trace."""
    peak = max(windows(trace, BIN_S))[0]
    rng = random.Random("check")
    requests, at = [], rng.expovariate(peak)
    while at < seconds:
        _, prompt, output = rng.choice(trace.arrivals)
        requests.append(Request(at, prompt, output))
        at += rng.expovariate(peak)
    rows: list[dict[str, object]] = []
    for level in LEVELS:
        plan = plan_for(case, level, peak)
        if plan.feasible and not any(row["plan"] == plan.told for row in rows):
            answered = run(plan, requests, case.node, case.kind)
            row = {"trace": case.trace, "model": case.model, "rate": f"{peak:.1f}", "cells": level}
            met = attained(answered, case.kind)
            rows.append(
                row | {"devices": plan.devices, "requests": len(requests), "met": f"{met:.2%}", "plan": plan.told}
            )
    return rows


def main() -> int:
    """Run what was asked."""
    args = options()
    classes = kinds()
    rows: list[dict[str, object]] = []
    checks: list[dict[str, object]] = []
    told = []
    for text in args.trace:
        name, _, file = text.partition("=")
        if name not in classes or not file:
            raise InputError(f"--trace {text}: give CLASS=FILE, with a class of {FLEET.name}: {', '.join(classes)}")
        traces = [read_trace(Path(file)).at_rate(args.rate, seed) for seed in range(args.seeds)]
        told.append(f"{name}: {traces[0].name}, {'; '.join(traces[0].told)}; {traces[0].rate:.1f} requests/s")
        for device in args.device or ["H100-SXM-80GB"]:
            for model in args.model or SHAPES:
                links = (NVLINK[device], *((FREE, NETWORK, ETHERNET) if args.links else ()))
                for link in links:
                    case = Case(name, model, device, link, classes[name], args.most, args.estimated)
                    rows += rows_of(case, traces, args.window)
                    if args.check and link is links[0]:
                        checks += check(case, traces[0], args.check)
    told.append(f"operators: {'rooflines, estimated' if args.estimated else 'published tables'}")
    if args.json:
        print(json.dumps({"traces": told, "rows": rows, "checks": checks}))
        return 0
    same = {name: rows[0][name] for name in ("trace", "device", "link") if len({row[name] for row in rows}) == 1}
    told.append(f"{args.seeds} seeds, windows of {args.window:g} s, cells of {args.most} devices at most")
    print("\n".join([*told, *(f"{name}: {value}" for name, value in same.items() if name != "trace")]))
    shown = [name for name in rows[0] if name not in same]
    print(table(shown, [[row[name] for name in shown] for row in rows], range(shown.index("devices"))))
    if checks:
        print(f"\n{args.check:g} s at the rate of the busiest {BIN_S:g} s, call by call:")
        print(table(list(checks[0]), [list(row.values()) for row in checks], (0, 1, 3, 7)))
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    end(main)
