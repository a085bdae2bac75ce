"""Policies, three fleets and all traces over a made-up day: the study "static against adaptive".

    python scripts/bench/fleet_study.py TRACES --out FOLDER [--only NAME]... [--seeds N] [--policy P]... [--parts]

TRACES is a folder with the traces of Azure of 2023 and of Mooncake. Each run is kept in FOLDER when it ends, so that
the same command goes on after an interruption; then tables are printed, and FOLDER/NAME.json is what `fleet.py --from`
makes plots of. --parts also runs `adaptive` without each of its parts.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from time import perf_counter, process_time

from comparison import fleet_runs, saved
from comparison.fleet_ablation import ABLATIONS, named
from comparison.fleet_runs import Simulated
from comparison.fleet_settings import STUDIES, Study
from comparison.script import end, say

from llmbuild.digest import plain
from llmbuild.errors import InputError
from llmbuild.fleet.policies.named import ORACLE, POLICIES, Named
from llmbuild.fleet.profiles.gather import profiles_of
from llmbuild.fleet.simulate.outcome import Outcome
from llmbuild.fleet.simulate.run import Setting, simulate
from llmbuild.report.fleet import outcomes_table, trace_lines
from llmbuild.runtime import reader
from llmbuild.spec.fleet import Fleet
from llmbuild.spec.files.fleet import read_fleet

RECIPES = Path(__file__).parents[2] / "recipes" / "fleets"
EVERY_S = 60.0
"""Seconds of the intervals of power of the first seed."""


def options(words: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", action="append", choices=[one.name for one in STUDIES])
    parser.add_argument("--policy", action="append", help=" ".join(POLICIES))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--parts", action="store_true", help="`adaptive` without each of its parts too")
    parser.add_argument("-C", "--catalog", type=Path, default=Path(reader.default_location()))
    return parser.parse_args(words)


def main() -> int:
    args = options()
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in range(args.seeds):
        for study in STUDIES:
            if not args.only or study.name in args.only:
                fleet = read_fleet(RECIPES / f"{study.fleet}.yaml", tuple(POLICIES))
                run(study, fleet, seed, args)
    return 0


def run(study, fleet, seed, args):
    profiles = profiles_of(fleet, args.catalog)
    path = args.out / f"{study.name}.jsonl"
    there = {(b["policy"], b["seed"]) for b in map(json.loads, path.read_text().splitlines())} if path.exists() else set()
    requests = None
    for name in args.policy or POLICIES:
        if (name, seed) in there or (name == "lowest-clock" and not any(n.clocks for n in fleet.nodes)): continue
        requests = requests or study.requests(fleet, args.traces, seed)
        made = named(name); began, cpu = perf_counter(), process_time()
        one = simulate(fleet, profiles, requests, name, made.make, made.router(fleet), Setting(seed, every_s=EVERY_S if not seed else 0))
        say(f"{study.name} {seed} {name}: {len(requests)} in {perf_counter()-began:.1f} s, {process_time()-cpu:.1f} CPU (decide {one.decide_s:.1f}); " + " ".join(f"{c.attainment:.2%}" for c in one.classes) + f" {one.joules_per_token:.4f} J idle {one.idle_share:.0%} nh {one.node_hours:.1f} ch {one.changes}; {one.explained}")
        with path.open("a") as f: f.write(json.dumps(saved.finite(plain(one)))+"\n")

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    end(main)
