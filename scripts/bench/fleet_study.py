"""Static plans against adaptive ones: all policies on three fleets under all traces, over a made-up day.

    python scripts/bench/fleet_study.py TRACES --out FOLDER [--only NAME]... [--seeds N] [--policy P]... [--parts]

TRACES is a folder with Azure's traces of 2023 and Mooncake's conversation trace, under the names that they were
published with. Each run is kept in FOLDER when it ends, so the same command goes on where it was interrupted. Then
tables are printed, and FOLDER/NAME.json is what `fleet.py --from` makes tables and plots of. `--parts` also runs
`adaptive` without each of its parts.

Figures are simulated; their basis is in the table. A seed begins at another hour of the day, and keeps other requests.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import process_time

from comparison import fleet_runs
from comparison.fleet_ablation import ABLATIONS, named
from comparison.fleet_pieces import Pieces, against, with_all
from comparison.fleet_runs import OURS, Simulated
from comparison.fleet_settings import STUDIES, Study
from comparison.script import end, say

from llmbuild.fleet.policies.named import ORACLE, POLICIES
from llmbuild.fleet.profiles.gather import profiles_of
from llmbuild.fleet.simulate.outcome import Outcome
from llmbuild.fleet.simulate.run import Setting, simulate
from llmbuild.report.fleet import outcomes_table, trace_lines
from llmbuild.report.table import table
from llmbuild.runtime import reader
from llmbuild.spec.files.fleet import read_fleet
from llmbuild.spec.fleet import Fleet, Profile

RECIPES = Path(__file__).parents[2] / "recipes" / "fleets"
EVERY_S = 60.0
"""Seconds of the intervals of power, which the first seed has."""


def options(words: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path, help="a folder")
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    parser.add_argument("--only", action="append", help=" ".join(one.name for one in STUDIES))
    parser.add_argument("--policy", action="append", help=" ".join(POLICIES))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--parts", action="store_true", help="`adaptive` without each of its parts too")
    parser.add_argument("-C", "--catalog", type=Path, default=Path(reader.default_location()))
    return parser.parse_args(words)


@dataclass(frozen=True)
class Bench:
    """A study with its fleet, and the runs of it that are there."""

    study: Study
    fleet: Fleet
    profiles: tuple[Profile, ...]
    pieces: Pieces

    def run(self, traces: Path, seed: int, policies: Sequence[str]) -> None:
        """Run what is not there yet, of one seed."""
        missing = [name for name in policies if not self.pieces.has(name, seed)]
        requests = self.study.requests(self.fleet, traces, seed) if missing else []
        for name in missing:
            made, began = named(name), process_time()
            setting = Setting(seed, every_s=EVERY_S if seed == 0 else 0.0)
            one = simulate(self.fleet, self.profiles, requests, name, made.make, made.router(self.fleet), setting)
            self.pieces.add(one)
            say(f"{self.study.name} seed {seed} {name}: {process_time() - began:.1f} s of CPU; {_told(one)}")

    def simulated(self, traces: Path, policies: Sequence[str]) -> Simulated:
        """Return all that was run of these policies."""
        found = self.study.traces(traces, 0)
        most = max(service.attainment for service in self.fleet.services)
        seconds = max(trace.seconds for trace in found.values())
        kept = self.pieces.of(policies)
        return Simulated(self.study.name, most, _clocks(self.fleet), True, seconds, tuple(trace_lines(found)), kept)


def _clocks(fleet: Fleet) -> bool:
    return any(node.clocks for node in fleet.nodes)


def _told(one: Outcome) -> str:
    met = " ".join(f"{each.attainment:.2%}" for each in one.classes)
    return f"{one.arrivals} requests, met {met}, {one.joules_per_token:.4g} J/token; {one.explained}"


def benches(args: argparse.Namespace) -> list[Bench]:
    """Return the studies that are asked for."""
    found = []
    for study in STUDIES:
        if not args.only or study.name in args.only:
            recipe = read_fleet(RECIPES / f"{study.fleet}.yaml", tuple(POLICIES))
            fleet = study.fleet_with(recipe, study.requests(recipe, args.traces, 0))
            pieces = Pieces(args.out / f"{study.name}.jsonl")
            found.append(Bench(study, fleet, tuple(profiles_of(fleet, args.catalog)), pieces))
    return found


def asked(args: argparse.Namespace, fleet: Fleet) -> list[str]:
    """Return the policies to run: without clocks the lowest one is the static plan again, and left out."""
    names = [*(args.policy or POLICIES), *(ABLATIONS if args.parts else ())]
    without = set() if _clocks(fleet) else {"lowest-clock", "without clocks"}
    return [name for name in names if name not in without]


def text(made: Simulated) -> str:
    """Return the tables of a study: the policies, ours against others, and ours without its parts.

    A table has the seeds with which all its policies were run.
    """
    whole = replace(made, outcomes=with_all([one for one in made.outcomes if one.policy in POLICIES]))
    lines = [made.fleet, *made.traces, _seeds(whole.outcomes), outcomes_table(whole.outcomes, ORACLE)]
    rows = [[a.other, f"{a.attained:.2%}", f"{a.less:.1%} [{a.low:.1%}, {a.high:.1%}]"] for a in against(whole)]
    lines += ["", table([f"{OURS} against", "met, worst class", "less J/token"], rows, (0,))]
    if any(one.policy in ABLATIONS for one in made.outcomes):
        parts = with_all([one for one in made.outcomes if one.policy in (OURS, ORACLE, *ABLATIONS)])
        lines += ["", f"{OURS} without its parts, {_seeds(parts)}", outcomes_table(parts, ORACLE)]
    return "\n".join(lines)


def _seeds(outcomes: Sequence[Outcome]) -> str:
    return f"{len({one.seed for one in outcomes})} seeds"


def main() -> int:
    """Run what is missing, seed by seed, and print the tables."""
    args = options()
    args.out.mkdir(parents=True, exist_ok=True)
    made = benches(args)
    for seed in range(args.seeds):
        for bench in made:
            bench.run(args.traces, seed, asked(args, bench.fleet))
    shown = []
    for bench in made:
        whole = bench.simulated(args.traces, [*POLICIES, *ABLATIONS])
        fleet_runs.write(whole, args.out / f"{bench.study.name}.json")
        shown.append(text(whole))
    print("\n\n".join(shown))
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    end(main)
