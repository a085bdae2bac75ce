"""Goodput against rate: variants on a core each under Poisson arrivals, beside what `pick --rate` says of them.

    python scripts/bench/goodput.py --node MODEL/VARIANT[:SEQUENCES][@CATALOG]... --slo BOUND...
        [--lengths PROMPT:OUTPUT] [--share N...] [--seconds S] [--longest S] [--runs N] [--width N] [--tries N]
        [--objective METRIC] [--budget TIME] [--core N] [--work DIR] [--plot FILE] [--save FILE] [--json]
    python scripts/bench/goodput.py --from FILE [--objective METRIC] [--plot FILE] [--json]

Nodes are taken one after another: each is profiled by `llmbuild profile --load` on the core, and serves on it; the
client runs on that core in both. The rate that is picked is the highest at which the simulator holds all bounds, for
lengths of the same law as those that are sent; the arrivals are other draws. The rate that is replayed is the highest
that holds in the simulator for the very requests that are sent, so its error is the curve's alone. Requests are then
sent at shares of the rate that is picked, each in --runs runs. Goodput is requests a second that keep all bounds, of
those that were sent.

A rate is held where the percentiles over the requests of all its runs keep the bounds. The highest rate is then
searched by bisection, until the one that is held and the one that is not are --width apart or --tries rates were
measured; a rate that cannot hold any more, whatever its other runs give, gets none. A run lasts --seconds, and longer,
up to --longest, where fewer requests than a percentile needs came: 90 for a 95th, 459 for a 99th. Fewer are told.

Of the variants that hold a rate the one that is best in --objective is preferred. Rates at which another one becomes
it are told as the load curves have them and as they were measured.

--save keeps all that was measured, and --from makes the tables and the plot of it again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import fleet_reality as reality
from comparison import rate_plot, rate_runs
from comparison.highest_rate import bracket, next_rate
from comparison.nodes import Place, Server, driven, serving
from comparison.plot import needs_matplotlib
from comparison.rate_judgement import document, judged, picked, text
from comparison.rate_runs import FIRST_SEED, Measured, Run, Sampling, Variant, at_rate, cannot_hold, least_requests
from comparison.script import end, say

from llmbuild.errors import InputError
from llmbuild.profiler import noise
from llmbuild.runtime import host, reader
from llmbuild.runtime import model as loader
from llmbuild.serve.capacity import Lengths, parse_lengths
from llmbuild.serve.drive import Sending
from llmbuild.spec.load_curve import LoadCurve
from llmbuild.spec.rows import reading
from llmbuild.spec.slo import METRICS, Bound

SHARES = (0.6, 0.8, 1.0, 1.2, 1.5)
"""Of the rate that is picked."""


@dataclass
class Client:
    """Sends runs to a server, and tells what was held at which rate so far."""

    server: Server
    variant: Variant
    sampling: Sampling
    bounds: Sequence[Bound]
    held: dict[float, bool] = field(default_factory=dict)
    _sent: int = 0

    def at(self, rate: float, all_runs: bool) -> Iterator[Run]:
        """Yield the runs at a rate: all, or as many as it takes to know that it is not held."""
        draws = self.sampling.draws(rate, self.bounds, self.variant.curve.context)
        runs = list[Run]()
        for sends in draws:
            if runs and not all_runs and cannot_hold(runs, sum(map(len, draws)), self.bounds):
                break
            runs.append(self._run(rate, sends))
            yield runs[-1]
        self.held[rate] = at_rate(runs, self.bounds).holds
        say(f"{self.variant.name}: {rate:.3g}/s is {'held' if self.held[rate] else 'not held'}")

    def _run(self, rate: float, sends: tuple[Sending, ...]) -> Run:
        least = least_requests(self.bounds)
        few = f", fewer than {least}: too few for a percentile that is bounded" if len(sends) < least else ""
        say(f"{self.variant.name}: {rate:.3g}/s, {len(sends)} requests in {sends[-1].at_s:.0f} s{few}")
        self._sent += 1  # no two runs have the same prompts: a server would find them again
        before = noise.snapshot()
        (seen,) = driven([self.server], [sends], seed=FIRST_SEED + self._sent)
        after = noise.snapshot()
        stolen = (after.stolen - before.stolen) / max(1, after.total - before.total)
        return Run(self.variant.name, rate, stolen, sends, seen)


def runs_of(client: Client, first: float, asked: argparse.Namespace) -> Iterator[Run]:
    """Yield the runs at shares of the rate that is picked, and those of the search for the highest one."""
    for share in sorted(asked.share):
        yield from client.at(share * first, all_runs=True)
    for _ in range(asked.tries):
        rate = next_rate(client.held, first, asked.width)
        if rate is None:
            return
        yield from client.at(rate, all_runs=False)
    width = bracket(client.held).width
    if width > asked.width:
        say(f"{client.variant.name}: the bracket is {width:.0%} wide: give more --tries")


def measured(asked: argparse.Namespace) -> Measured:
    """Profile and serve all nodes, and return all runs. What there is so far is saved after each one."""
    sampling = Sampling(asked.seconds, asked.longest, asked.runs, asked.lengths)
    made = Measured(host.machine().describe(), tuple(asked.slo), sampling)
    with tempfile.TemporaryDirectory(dir=asked.work) as name:
        for number, one in enumerate(asked.node):
            place = reality.place_of(one, asked.core, asked.catalog, Path(name) / str(number))
            (curve,) = reality.profiled([place], asked)
            variant = variant_of(place, curve)
            if variant.name in {other.name for other in made.variants}:
                raise InputError(f"--node {one}: {variant.name} is there already")
            best = picked(curve, place.sequences, asked.lengths, made.bounds)
            doubt = f"; {curve.doubt}" if curve.doubt else ""
            say(f"{variant.name}: picked {best.rate:.3g}/s; error p95 of the curve {curve.error_p95:.1%}{doubt}")
            made = replace(made, variants=(*made.variants, variant))
            if not best.rate:
                say(f"{variant.name}: the curve holds the bounds at no rate, so none is measured")
                continue
            with serving([place]) as servers:
                driven(servers, [reality.WARM], seed=1)
                for run in runs_of(Client(servers[0], variant, sampling, made.bounds), best.rate, asked):
                    made = replace(made, runs=(*made.runs, run))
                    if asked.save:
                        rate_runs.write(made, asked.save)
    return made


def variant_of(place: Place, curve: LoadCurve) -> Variant:
    """Return a variant with its readings in the catalog, those of this machine if there are any."""
    rows = [row for row in reader.find_variant(place.catalog, place.variant) if row["model"] == place.model]
    here = loader.host_facts().machine
    row = next((one for one in rows if one["machine_digest"] == here), rows[0])
    readings = {name: value for name in METRICS if (value := reading(row, name)) is not None}
    name = f"{place.model}/{place.variant[:6]} x{place.sequences}"
    form = str(row["point"].get("weight_format", "f32"))
    return Variant(name, place.variant, form, place.sequences, readings, curve)


def options(words: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options.

    Raises:
        InputError: they do not go together.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--node", action="append", default=[], help="MODEL/VARIANT[:SEQUENCES][@CATALOG]")
    parser.add_argument("--slo", action="append", default=[], help="such as ttft_s_p95<=1")
    parser.add_argument("--lengths", type=parse_lengths, default=Lengths(), help="medians of tokens, such as 128:64")
    parser.add_argument("--share", type=float, nargs="+", default=SHARES, help="of the picked rate")
    parser.add_argument("--seconds", type=float, default=30.0, help="of a run")
    parser.add_argument("--longest", type=float, default=180.0, help="seconds of a run where requests are too few")
    parser.add_argument("--runs", type=int, default=3, help="at each rate")
    parser.add_argument("--width", type=float, default=0.1, help="of the bracket of the highest rate")
    parser.add_argument("--tries", type=int, default=8, help="rates beside the shares, at most")
    parser.add_argument("--objective", default="quality_kl", choices=METRICS, metavar="METRIC")
    parser.add_argument("--budget", default="45s", help="of a load curve")
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("-C", "--catalog", type=Path, default=Path(reader.default_location()))
    parser.add_argument("--from", dest="source", type=Path, help="compare what was saved, measure nothing")
    parser.add_argument("--work", type=Path, help="where catalogs are copied to: on their disk blobs are links")
    parser.add_argument("--plot", type=Path, help="write a plot, such as goodput.svg")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(words)
    asked.apart = False
    if not asked.source and not (asked.node and asked.slo):
        raise InputError("give --node and --slo, or --from")
    if min(asked.share) <= 0 or asked.runs < 1 or asked.width <= 0 or asked.seconds <= 0:
        raise InputError("--share, --runs, --width and --seconds are above 0")
    if asked.plot and (why := needs_matplotlib()):
        raise InputError(why)
    rate_runs.bounds_of(asked.slo)
    return asked


def main() -> int:
    """Measure, or read what was measured, and compare."""
    asked = options()
    made = judged(rate_runs.read(asked.source) if asked.source else measured(asked), asked.objective)
    if asked.plot:
        rate_plot.write(made, asked.plot)
    print(json.dumps(document(made)) if asked.json else text(made))
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    end(main)
