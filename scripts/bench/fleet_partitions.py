"""A fleet with its partitions and without: the plan of its load, and what policies attain and draw in the simulator.

    python scripts/bench/fleet_partitions.py FLEET [--trace [SERVICE=]FILE...] [--rate N] [--seconds S] [--seeds N]
                                             [--policy P]... [--json]

Without a trace arrivals are Poisson at the rates of the file. Figures are simulated, and those of slices are estimates
by their shares of a GPU: the table has their basis.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean
from time import perf_counter

from comparison.script import end, say

from llmbuild.errors import InputError
from llmbuild.fleet.plan.load import stated
from llmbuild.fleet.plan.plan import plan
from llmbuild.fleet.policies.named import POLICIES, policy
from llmbuild.fleet.profiles.gather import profiles_of
from llmbuild.fleet.simulate.run import Setting, simulate
from llmbuild.fleet.simulate.trace import Asked, Trace, asked, read_trace, steady_trace
from llmbuild.report.fleet import bootstrap, outcome_json, plan_json
from llmbuild.report.table import table
from llmbuild.runtime import reader
from llmbuild.spec.files.fleet import read_fleet
from llmbuild.spec.fleet import Fleet, Profile


def options(words: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fleet", type=Path)
    parser.add_argument("--trace", action="append", default=[], help="of all services, or of one: SERVICE=FILE")
    parser.add_argument("--policy", action="append", help=" ".join(POLICIES))
    parser.add_argument("--rate", type=float, default=1.0, help="times the requests of the trace")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(words)


def requests_of(args: argparse.Namespace, fleet: Fleet, seed: int) -> list[Asked]:
    """Return the requests of a seed: of traces, or at the rates of the file."""
    if not args.trace:
        return steady_trace(fleet.at_rate(args.rate), args.seconds, seed)
    traces: dict[str, Trace] = {}
    for text in args.trace:
        service, sign, file = text.partition("=")
        traces[service if sign else ""] = read_trace(Path(file or text)).window(args.seconds).at_rate(args.rate)
    return list(asked(fleet, traces, seed))


def interval(values: list[float], form: str) -> str:
    """Return a mean with its 95 % bootstrap interval, where there are enough values."""
    if len(values) < 3:
        return format(mean(values), form)
    low, high = bootstrap(values)
    return f"{mean(values):{form}} [{low:{form}}, {high:{form}}]"


def runs(args: argparse.Namespace, name: str, fleet: Fleet, profiles: tuple[Profile, ...]) -> list[dict[str, object]]:
    """Return a row for each policy, and the documents of its runs."""
    found = plan(fleet, profiles, stated(fleet))
    told = ", ".join(f"{n} {node.name}" for node, n in zip(fleet.nodes, found.nodes, strict=True) if n)
    rows: list[dict[str, object]] = []
    for policy_ in args.policy or ["static-mean", "adaptive"]:
        chosen, outcomes = policy(policy_), []
        for seed in range(args.seeds):
            began, requests = perf_counter(), requests_of(args, fleet, seed)
            one = simulate(fleet, profiles, requests, policy_, chosen.make, chosen.router(fleet), Setting(seed))
            outcomes.append(one)
            say(f"{name} {policy_} seed {seed}: {one.arrivals} requests in {perf_counter() - began:.1f} s")
        rows.append(
            {
                "partitions": name,
                "plan": told + ("" if found.feasible else " (short)"),
                "W": round(found.watts),
                "gap": f"{found.gap:.1%}",
                "policy": policy_,
                "met": interval([one.attainment for one in outcomes], ".2%"),
                "worst class": interval([one.worst for one in outcomes], ".2%"),
                "J/token": interval([one.joules_per_token for one in outcomes], ".2f"),
                "node-h": f"{mean(one.node_hours for one in outcomes):.2f}",
                "changed": f"{mean(one.switches.get('partition', 0) for one in outcomes):.1f}",
                "basis": outcomes[0].basis,
                "plan_json": plan_json(found),
                "runs": [outcome_json(one) for one in outcomes],
            }
        )
    return rows


def main() -> int:
    """Run what was asked."""
    args = options()
    fleet = read_fleet(args.fleet, tuple(POLICIES))
    if not any(node.partitions for node in fleet.nodes):
        raise InputError(f"{args.fleet}: no class of nodes has partitions: there is nothing to compare")
    profiles = profiles_of(fleet, Path(reader.default_location()))
    fixed = replace(fleet, actuators=tuple(each for each in fleet.actuators if each != "set_partition"))
    rows = [
        row
        for name, made in (("chosen", fleet), ("as they are", fixed), ("none", fleet.undivided()))
        for row in runs(args, name, made, profiles)
    ]
    if args.json:
        print(json.dumps(rows))
    else:
        shown = [name for name in rows[0] if name not in ("plan_json", "runs")]
        print(f"{args.seeds} seeds of {args.seconds:g} s")
        print(table(shown, [[row[name] for name in shown] for row in rows], (0, 1, 4, len(shown) - 1)))
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    end(main)
