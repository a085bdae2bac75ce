"""Goodput against rate: variants on a core each under Poisson arrivals, beside what `pick --rate` says of them.

    python scripts/bench/goodput.py --node MODEL/VARIANT[:SEQUENCES][@CATALOG]... --slo BOUND...
        [--lengths PROMPT:OUTPUT] [--share N...] [--all] [--seconds S] [--budget TIME] [--core N] [--work DIR]
        [--plot FILE] [--save FILE] [--json]
    python scripts/bench/goodput.py --from FILE [--plot FILE] [--json]

Nodes are taken one after another: each is profiled by `llmbuild profile --load` on the core, and serves on it; the
client runs on that core in both. The rate that is picked is the highest at which the simulator holds all bounds, for
lengths of the same law as those that are sent. Requests are then sent at shares of it, each for --seconds; with
--all also at the rates of the nodes before. Goodput is requests a second that keep all
bounds, of those that were sent. The measured rate is the highest at which the bounds hold over all requests of a run,
between the last run that holds them and the first that does not.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from math import ceil, inf, isfinite
from pathlib import Path
from typing import Any

import fleet_reality as reality
from comparison.nodes import Place, Server, driven, serving
from comparison.plot import needs_matplotlib
from comparison.script import end, say

from llmbuild.digest import plain
from llmbuild.errors import InputError
from llmbuild.profiler import noise
from llmbuild.report.table import table
from llmbuild.runtime import reader
from llmbuild.serve import capacity
from llmbuild.serve.capacity import Capacity, Lengths, parse_lengths
from llmbuild.serve.drive import Heard, Sending
from llmbuild.serve.schedule.fcfs import Fcfs
from llmbuild.serve.simulate import Host
from llmbuild.spec.load_curve import LoadCurve, curve_from
from llmbuild.spec.slo import Bound, load_metric, parse_load

SHARES = (0.6, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5)
"""Of the rate that is picked."""
PAGE = 16
"""Positions of a block; with memory for all sequences it does not matter."""
Run = dict[str, Any]


def bounds_of(texts: Sequence[str]) -> tuple[Bound, ...]:
    """Return the bounds on requests.

    Raises:
        InputError: one is not of requests.
    """
    bounds, others = parse_load(texts)
    if others:
        raise InputError(f"--slo {others[0]}: give bounds on requests, such as ttft_s_p95<=1")
    return bounds


def picked(curve: LoadCurve, sequences: int, lengths: Lengths, bounds: Sequence[Bound]) -> Capacity:
    """Return the highest rate by the curve."""
    return capacity.capacity(server_of(curve, sequences), lengths, bounds)


def server_of(curve: LoadCurve, sequences: int) -> capacity.Server:
    """Return the server, with memory for all of its sequences."""
    slots = min(sequences, curve.decodes_most)
    return capacity.Server(curve, Host(slots, slots * -(-curve.context // PAGE), PAGE, curve.context), Fcfs(), "fcfs")


def arrivals(rate: float, seconds: float, lengths: Lengths, context: int, seed: int) -> list[Sending]:
    """Return requests that come independently of each other."""
    draw, now = random.Random(seed), 0.0
    found = list[Sending]()
    while (now := now + draw.expovariate(1.0) / rate) < seconds or len(found) < reality.LEAST:
        found.append(Sending(now, *lengths.drawn(draw, context)))
    return found


def runs_of(server: Server, rates: Sequence[float], curve: LoadCurve, asked: argparse.Namespace) -> Iterator[Run]:
    """Yield what was measured at each rate."""
    for number, rate in enumerate(rates):
        sends = arrivals(rate, asked.seconds, asked.lengths, curve.context, number)
        say(f"{server.place.name}: {rate:.3g}/s, {len(sends)} requests")
        before = noise.snapshot()
        (seen,) = driven([server], [sends], seed=number)
        after = noise.snapshot()
        yield {
            "node": f"{server.place.model}/{server.place.variant[:6]} x{server.place.sequences}",
            "rate": rate,
            "seconds": sends[-1].at_s,
            "stolen_share": (after.stolen - before.stolen) / max(1, after.total - before.total),
            "client_share": seen.client_cpu_s / seen.seconds,
            **reality.saved(sends, seen),
        }


def measured(asked: argparse.Namespace) -> list[Run]:
    """Profile and serve all nodes, and return their runs, each with its curve."""
    found, others = list[Run](), set[float]()
    with tempfile.TemporaryDirectory(dir=asked.work) as name:
        for number, text in enumerate(asked.node):
            place = reality.place_of(text, asked.core, asked.catalog, Path(name) / str(number))
            (curve,) = reality.profiled([place], asked)
            of = picked(curve, place.sequences, asked.lengths, bounds_of(asked.slo))
            say(f"{place.name}: picked {of.rate:.3g}/s; error p95 of the curve {curve.error_p95:.1%}; {curve.doubt}")
            if not of.rate:
                raise InputError(f"{place.name} holds {' '.join(asked.slo)} at no rate: give looser bounds")
            rates = {share * of.rate for share in asked.share}
            with serving([place]) as servers:
                driven(servers, [reality.WARM], seed=1)
                for run in runs_of(servers[0], sorted(rates | others), curve, asked):
                    told = {"curve": plain(curve), "sequences": place.sequences, "form": form_of(place)}
                    found.append(
                        {**run, **told, "slo": asked.slo, "lengths": [asked.lengths.prompt, asked.lengths.output]}
                    )
                    if asked.save:
                        asked.save.write_text(json.dumps({"runs": found}))
            others |= rates if asked.all else set()
    return found


def form_of(place: Place) -> str:
    """Return the weight format of a variant."""
    choices = reader.find_variant(place.catalog, place.variant)[0]["point"]
    found = json.loads(choices) if isinstance(choices, str) else choices
    return str(found.get("weight_format", "f32"))


# --- the comparison --------------------------------------------------------------------------------------------------


def values_of(heard: Sequence[Run]) -> dict[str, list[float]]:
    """Return the sorted times of requests; infinite for what was not answered."""
    ones = [Heard(**{name: inf if value is None else value for name, value in one.items()}) for one in heard]
    good = [one if one.end == "answered" else None for one in ones]
    return {
        "ttft_s": sorted(one.ttft_s if one else inf for one in good),
        "tpot_s": sorted(one.tpot_s if one else inf for one in good if one is None or one.tokens > 1),
        "e2e_s": sorted(one.last_s if one else inf for one in good),
    }


def kept(one: Run, bounds: Sequence[Bound]) -> bool:
    """Return whether a request keeps the bounds as single ones."""
    heard = Heard(**{name: inf if value is None else value for name, value in one.items()})
    times = {"ttft_s": heard.ttft_s, "tpot_s": heard.tpot_s, "e2e_s": heard.last_s}
    return heard.end == "answered" and all(bound.holds(times[load_metric(bound.metric).base]) for bound in bounds)


def compared(run: Run) -> Run:
    """Return goodput and percentiles at a rate, measured and simulated."""
    bounds = bounds_of(run["slo"])
    server, lengths = server_of(curve_from(run["curve"]), run["sequences"]), Lengths(*run["lengths"])
    seen = capacity.outcome(server, run["rate"], lengths, bounds)
    values, count = values_of(run["heard"]), len(run["heard"])
    real = {b.metric: _percentile(values[load_metric(b.metric).base], load_metric(b.metric).share) for b in bounds}
    good = sum(kept(one, bounds) for one in run["heard"])
    return {
        "node": run["node"],
        "form": run["form"],
        "rate": run["rate"],
        "requests": count,
        "goodput": good / count * run["rate"],
        "holds": all(bound.holds(real[bound.metric]) for bound in bounds),
        "measured": {name: value if isfinite(value) else None for name, value in real.items()},
        "simulated": {bound.metric: seen.values[bound.metric] for bound in bounds},
        "client_share": run["client_share"],
        "stolen_share": run["stolen_share"],
    }


def _percentile(values: Sequence[float], share: float) -> float:
    return values[ceil(share * len(values)) - 1] if values else inf


def rates_of(runs: Sequence[Run], found: Sequence[Run]) -> list[Run]:
    """Return, for each node, the rate that is picked and the one that was measured."""
    made = []
    for node in dict.fromkeys(one["node"] for one in found):
        of = next(run for run in runs if run["node"] == node)
        bounds = bounds_of(of["slo"])
        best = picked(curve_from(of["curve"]), of["sequences"], Lengths(*of["lengths"]), bounds)
        ones = sorted((one for one in found if one["node"] == node), key=lambda one: one["rate"])
        failing = next((i for i, one in enumerate(ones) if not one["holds"]), len(ones))
        low = ones[failing - 1]["rate"] if failing else 0.0
        high = ones[failing]["rate"] if failing < len(ones) else inf
        made.append(
            {"node": node, "form": of["form"], "picked": best.rate, "sure": best.sure, "low": low, "high": high}
        )
    return made


def readable(runs: Sequence[Run], found: Sequence[Run]) -> str:
    """Return both tables."""
    names = list(found[0]["measured"])
    header = [
        "node",
        "format",
        "requests/s",
        "sent",
        "goodput/s",
        "holds",
        *(f"{n}, simulated" for n in names),
        "client %",
    ]
    lines = []
    for one in found:
        cells = [f"{_shown(one['measured'][name])}, {_shown(one['simulated'][name])}" for name in names]
        begin = [one["node"], one["form"], f"{one['rate']:.2f}", one["requests"], f"{one['goodput']:.2f}"]
        lines.append([*begin, "yes" if one["holds"] else "no", *cells, f"{100 * one['client_share']:.0f}"])
    rates = [
        [
            one["node"],
            one["form"],
            f"{one['picked']:.2f}",
            f"{one['sure']:.2f}",
            f"{one['low']:.2f} to {one['high']:.2f}",
        ]
        for one in rates_of(runs, found)
    ]
    return "\n\n".join(
        [table(header, lines, (0, 1)), table(["node", "format", "picked/s", "sure/s", "measured/s"], rates, (0, 1))]
    )


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{1000 * value:.0f} ms"


def plotted(found: Sequence[Run], path: Path) -> None:
    """Write the plot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for node in dict.fromkeys(one["node"] for one in found):
        ones = sorted((one for one in found if one["node"] == node), key=lambda one: one["rate"])
        axes.plot([o["rate"] for o in ones], [o["goodput"] for o in ones], "o-", label=f"{ones[0]['form']} {node}")
    most = max(one["rate"] for one in found)
    axes.plot([0, most], [0, most], ":", color="gray", label="all requests")
    axes.set(xlabel="requests a second", ylabel="requests a second within the bounds", xlim=(0, None), ylim=(0, None))
    axes.legend()
    figure.savefig(path)


def main() -> int:
    """Measure, or read what was measured, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--node", action="append", default=[])
    parser.add_argument("--slo", action="append", default=[], help="such as ttft_s_p95<=1")
    parser.add_argument("--lengths", type=parse_lengths, default=Lengths())
    parser.add_argument("--share", type=float, nargs="+", default=SHARES)
    parser.add_argument("--all", action="store_true", help="also at the rates of the nodes before")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--budget", default="45s", help="of a load curve")
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("-C", "--catalog", type=Path, default=Path(reader.default_location()))
    parser.add_argument("--from", dest="source", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    asked.apart = False
    if asked.plot and (why := needs_matplotlib()):
        raise InputError(why)
    if not asked.source and not (asked.node and asked.slo):
        raise InputError("give --node and --slo, or --from")
    bounds_of(asked.slo)
    runs = json.loads(asked.source.read_text())["runs"] if asked.source else measured(asked)
    found = [compared(run) for run in runs]
    if asked.plot:
        plotted(found, asked.plot)
    print(json.dumps({"compared": found, "rates": rates_of(runs, found)}) if asked.json else readable(runs, found))
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    end(main)
