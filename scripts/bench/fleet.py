"""Policies over a trace: SLO attainment and energy with seeds and intervals; or how long plans take by size.

    python scripts/bench/fleet.py FLEET --trace [SERVICE=]FILE... [--rate N] [--lengths N] [--seconds S] [--seeds N]
                                  [--policy P]... [--context N] [--day] [--every S] [--save FILE] [--json]
    python scripts/bench/fleet.py --from FILE... [--plot FILE] [--plot-day FILE] [--json]
    python scripts/bench/fleet.py --sizes [--json]

Figures are simulated; their basis is in the table. Seeds turn the trace to another beginning. `--sizes` plans for
made-up fleets whose profiles are the published ones at random speeds: seconds of this machine, and the gap to the
bound.

--save keeps the outcomes, with power and replicas in intervals of --every seconds, and --from makes tables and plots of
them again: --plot has energy against attainment, a panel for each file; --plot-day has power and replicas over the
time of the first file, of static-peak, of adaptive, and of the best policy that is in use today.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from time import perf_counter

from comparison import fleet_plot, fleet_runs
from comparison.fleet_runs import Simulated
from comparison.plot import needs_matplotlib
from comparison.script import end, say

from llmbuild.errors import InputError
from llmbuild.fleet.plan.load import stated
from llmbuild.fleet.plan.plan import plan
from llmbuild.fleet.plan.program import program
from llmbuild.fleet.policies.named import ORACLE, POLICIES, policy
from llmbuild.fleet.profiles.gather import profiles_of
from llmbuild.fleet.profiles.published import published
from llmbuild.fleet.simulate.outcome import Outcome
from llmbuild.fleet.simulate.run import Setting, simulate
from llmbuild.fleet.simulate.trace import Trace, asked, read_trace
from llmbuild.report.fleet import outcome_json, outcomes_table, trace_lines
from llmbuild.report.table import table
from llmbuild.runtime import reader
from llmbuild.spec.files.fleet import read_fleet
from llmbuild.spec.fleet import Fleet, NodeClass, Profile, RequestClass, Service, StepTime

SIZES = ((3, 3, 9), (4, 8, 30), (6, 20, 100), (6, 50, 1000), (6, 50, 10_000))
"""Classes of nodes, services, nodes."""


def options(words: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fleet", type=Path, nargs="?")
    parser.add_argument("--trace", action="append", default=[], help="of all services, or of one: SERVICE=FILE")
    parser.add_argument("--policy", action="append", help=" ".join(POLICIES))
    parser.add_argument("--rate", type=float, default=1.0)
    parser.add_argument("--lengths", type=float, default=1.0)
    parser.add_argument("--context", type=int)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--day", action="store_true", help="a made-up day in the length of the trace")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--every", type=float, default=0.0, help="seconds of intervals of power; 0: none")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--from", dest="sources", action="append", default=[], type=Path, help="what was saved")
    parser.add_argument("--plot", type=Path, help="energy against attainment, such as energy.svg")
    parser.add_argument("--plot-day", type=Path, help="power and replicas over time, such as day.svg")
    parser.add_argument("--sizes", action="store_true", help="time plans instead")
    parser.add_argument("-C", "--catalog", type=Path, default=Path(reader.default_location()))
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(words)


def made_up(kinds: int, services: int, nodes: int, seed: int = 0) -> tuple[Fleet, list[Profile]]:
    """Return a fleet of so many classes, services and nodes whose load takes about half of it."""
    rng = random.Random(seed)
    classes, profiles = [], []
    for k in range(kinds):
        base, speed = published()[k % 3], rng.uniform(0.7, 1.4)
        watts = {"host_w": rng.uniform(50, 300), "bare_w": 60.0, "parked_w": 100.0, "active_w": 0.0}
        slots = rng.choice((1, 4))
        classes.append(
            NodeClass(
                f"n{k}", nodes // kinds, f"d{k}", False, slots, 80e9, **watts, boot_s=300, watts_basis="estimated"
            )
        )
        for s in range(services):
            slower = speed * rng.uniform(0.8, 1.2)
            step = StepTime(base.step.rows_s.times(slower), base.step.context_s * slower, base.step.prompt_s * slower)
            profiles.append(replace(base, device=f"d{k}", model=f"m{s}", step=step))
    slots_of_all = sum(node.count * node.slots for node in classes)
    asked_for = []
    for s in range(services):
        kind = RequestClass(
            "all", 1.0, rng.uniform(100, 1500), rng.uniform(30, 300), 1.0, rng.uniform(1, 3), rng.uniform(0.05, 0.2)
        )
        asked_for.append(Service(f"s{s}", f"m{s}", slots_of_all * 2 * rng.uniform(0.5, 1.5) / services, (kind,)))
    return Fleet("made-up", tuple(classes), tuple(asked_for)), profiles


def sizes() -> list[dict[str, object]]:
    """Return how long plans take, and how far they are from the bound, by size."""
    rows = []
    for kinds, services, nodes in SIZES:
        made, profiles = made_up(kinds, services, nodes)
        began = perf_counter()
        options_ = len(program(made, profiles, stated(made)).options)
        table_s = perf_counter() - began  # later plans of the same lengths find it done
        found = plan(made, profiles, stated(made))
        rows.append(
            {
                "classes": kinds,
                "services": services,
                "nodes": nodes,
                "options": options_,
                "capacities_s": round(table_s, 2),
                "plan_s": round(found.seconds, 2),
                "gap": round(found.gap, 4) if found.feasible else None,
                "method": found.method,
            }
        )
        say(f"{kinds} classes, {services} services, {nodes} nodes: {found.seconds:.2f} s")
    return rows


def simulated(args: argparse.Namespace) -> Simulated:
    """Run every policy under every seed."""
    if args.fleet is None or not args.trace:
        raise InputError("name a fleet and a --trace, or --from, or --sizes")
    fleet = read_fleet(args.fleet, tuple(POLICIES))
    profiles = profiles_of(fleet, args.catalog)
    traces = traces_of(fleet, args)
    found = list[Outcome]()
    for seed in range(args.seeds):
        requests, setting = asked(fleet, traces, seed), Setting(seed, every_s=args.every)
        for name in args.policy or POLICIES:
            made, began = policy(name), perf_counter()
            found.append(simulate(fleet, profiles, requests, name, made.make, made.router(fleet), setting))
            say(
                f"seed {seed} {name}: {len(requests)} requests in {perf_counter() - began:.1f} s; {found[-1].explained}"
            )
    most = max(service.attainment for service in fleet.services)
    clocks = any(node.clocks for node in fleet.nodes)
    seconds = max(trace.seconds for trace in traces.values())
    return Simulated(fleet.name, most, clocks, args.day, seconds, tuple(trace_lines(traces)), tuple(found))


def traces_of(fleet: Fleet, args: argparse.Namespace) -> dict[str, Trace]:
    """Return the traces by the names of services, scaled as asked for; the empty name is for all others."""
    traces = {}
    for text in args.trace:
        service, sign, file = text.partition("=")
        name = service if sign and service in {s.name for s in fleet.services} else ""
        trace = read_trace(Path(file if name else text)).window(args.seconds)
        scaled = trace.lengths(args.lengths, args.context).at_rate(args.rate)
        traces[name] = scaled.day() if args.day else scaled
    return traces


def policies(args: argparse.Namespace) -> None:
    """Simulate, or read what was saved, and print the tables or the document; write the plots."""
    if (args.plot or args.plot_day) and (why := needs_matplotlib()):
        raise InputError(why)
    fleets = [fleet_runs.read(path) for path in args.sources] or [simulated(args)]
    if args.save:
        fleet_runs.write(fleets[0], args.save)
    if args.plot:
        fleet_plot.energy(fleets, args.plot)
    if args.plot_day:
        fleet_plot.day(fleets[0], args.plot_day)
    if args.json:
        shown = [{"traces": made.traces, "runs": [outcome_json(one) for one in made.outcomes]} for made in fleets]
        print(json.dumps(shown[0] if len(shown) == 1 else shown))
        return
    print("\n\n".join(map(text, fleets)))


def text(made: Simulated) -> str:
    """Return the table of a fleet."""
    seeds = len({one.seed for one in made.outcomes})
    return "\n".join([*made.traces, f"{seeds} seeds", outcomes_table(made.outcomes, ORACLE)])


def main() -> int:
    """Run what was asked."""
    args = options()
    if not args.sizes:
        policies(args)
        return 0
    rows = sizes()
    if args.json:
        print(json.dumps(rows))
    else:
        print(table(list(rows[0]), [list(row.values()) for row in rows], (7,)))
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    end(main)
