"""The simulator against reality: servers on a core each under a trace, and the simulator under the same requests.

    python scripts/bench/fleet_reality.py --node MODEL[/VARIANT][:SEQUENCES][@CATALOG]... --trace FILE... [--load N]...
        [--seconds S] [--prompt N] [--output N] [--budget TIME] [--ttft N] [--tpot N] [--cores A,B] [--apart]
        [--work DIR] [--save FILE] [--json]
    python scripts/bench/fleet_reality.py --from FILE [--json]

Nodes are taken in groups of as many as there are cores, each on a core of its own. All of a group are profiled by
`llmbuild profile --load` at the same time, then serve at the same time: so cores share the memory in both. Each has
requests of its own at its own rate. A client runs on its server's core, in the profile as well; its time is told.

Of a trace the first requests are taken, as many as come in --seconds at the wanted rate, with their times stretched
and their lengths scaled to means of --prompt and --output tokens, cut to the context. The capacity of a node is the
largest rate at which 95 % of these requests are in time in the simulator: the first token within --ttft times, and
tokens within --tpot times, of what a mean request takes alone. --load is a share of it.

The simulator gets the requests at the times at which they were really sent. Both are measured from there. --save
keeps all that was measured, and --from compares it again with the simulator as it is now.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from math import inf, isfinite
from pathlib import Path
from typing import Any

from comparison.nodes import Place, Seen, Server, copied, driven, percentiles, serving
from comparison.script import end, say

from llmbuild.digest import plain
from llmbuild.errors import InputError
from llmbuild.fleet.capacity import OperatingPoint
from llmbuild.fleet.profiles.measured import step_of
from llmbuild.fleet.simulate.replay import replay
from llmbuild.fleet.simulate.trace import Arrival, Asked, Trace, read_trace
from llmbuild.process.child import environment
from llmbuild.profiler import noise
from llmbuild.report.table import table
from llmbuild.runtime import model as loader
from llmbuild.runtime import reader
from llmbuild.serve.drive import Sending
from llmbuild.serve.schedule.fcfs import Fcfs
from llmbuild.spec.fleet import NodeClass, Profile
from llmbuild.spec.load_curve import LoadCurve, Work, curve_from, taken_on

_NODE = re.compile(r"([^/:@]+)(?:/(\w+))?(?::(\d+))?(?:@(.+))?")
Run = dict[str, Any]
"""What was measured on a node at a load, or what comes of it, as JSON has it."""
LOADS = (0.5, 0.8, 1.0)
IN_TIME = 0.95
"""Share of requests that are in time at the capacity."""
LEAST, LONGEST = 20, 1.5
"""Requests of a run, at least: where a node is slow, a run lasts longer than was asked for by this factor at most."""


WARM = [Sending(0.1 * i, 16, 8) for i in range(10)]
"""What a server answers before it is measured."""


@dataclass(frozen=True)
class Limits:
    """Seconds to the first token and between tokens within which a request is in time."""

    ttft_s: float
    tpot_s: float


def options(words: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--node", action="append", default=[], help="MODEL[/VARIANT][:SEQUENCES][@CATALOG]")
    parser.add_argument("--trace", action="append", default=[], type=Path)
    parser.add_argument("--load", action="append", type=float, help=f"default: {' '.join(map(str, LOADS))}")
    parser.add_argument("--seconds", type=float, default=40.0, help="of each run")
    parser.add_argument("--prompt", type=float, default=120.0, help="mean tokens; at most 0.3 of the context")
    parser.add_argument("--output", type=float, default=32.0, help="mean tokens; at most 0.15 of the context")
    parser.add_argument("--budget", default="30s", help="of a load curve; its server takes a third of it beside")
    parser.add_argument("--ttft", type=float, default=10.0, help="times of a request alone")
    parser.add_argument("--tpot", type=float, default=3.0)
    parser.add_argument("--cores", help="default: all of this process")
    parser.add_argument("--apart", action="store_true", help="profile one node after another, the other core idle")
    parser.add_argument("-C", "--catalog", type=Path, default=Path(reader.default_location()))
    parser.add_argument("--from", dest="source", type=Path, help="compare what was saved, measure nothing")
    parser.add_argument("--work", type=Path, help="where catalogs are copied to: on their disk blobs are links")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(words)


# --- nodes -----------------------------------------------------------------------------------------------------------


def place_of(text: str, core: int, catalog: Path, folder: Path) -> Place:
    """Return a node that is asked for, with a copy of its catalog; without a variant, the fastest of the front."""
    match = _NODE.fullmatch(text)
    if match is None:
        raise InputError(f"--node {text}: write MODEL[/VARIANT][:SEQUENCES][@CATALOG]")
    model, variant, sequences, where = match.groups()
    source = Path(where) if where else catalog
    rows = reader.find_variant(source, variant) if variant else reader.variants(source, model=model)
    rows = [row for row in rows if row["model"] == model]
    if not rows:
        raise InputError(f"--node {text}: no such variant of {model} in {source}")
    best = min(rows, key=lambda row: row["tpot_s"] or inf)
    return Place(core, copied(source, folder), model, best["variant"], int(sequences or 16))


def profiled(places: Sequence[Place], asked: argparse.Namespace) -> list[LoadCurve]:
    """Measure the load curves of places, all at the same time unless they are asked for apart."""
    groups = [[one] for one in places] if asked.apart else [list(places)]
    for group in groups:
        begun = [subprocess.Popen(one.profiling(asked.budget), env=environment(), stdout=sys.stderr) for one in group]
        if sum(process.wait() != 0 for process in begun):
            raise InputError("a load curve was not measured: why is told above")
    return [curve_of(one) for one in places]


def curve_of(place: Place) -> LoadCurve:
    """Return the curve that was measured on the place's core."""
    machine = loader.host_facts().machine
    known = [one for one in reader.load_curves(place.catalog, [place.variant]) if one.machine == machine]
    found = taken_on(known, 1)
    if found is None:
        raise InputError(f"{place.name} has no load curve")
    return found


def point_of(curve: LoadCurve, sequences: int) -> OperatingPoint:
    """Return the operating point of a curve, with memory for all of its sequences."""
    watts: dict[str, float] = dict.fromkeys(("host_w", "bare_w", "parked_w", "active_w"), 0.0)
    node = NodeClass("core", 1, "host", True, 1, 1e12, **watts, boot_s=0.0, watts_basis="estimated")
    measured = {"decode_basis": "measured", "prompt_basis": "measured", "power_basis": "estimated"}
    most = min(sequences, curve.decodes_most)
    profile = Profile(
        *("host", "model", curve.variant[:12], step_of(curve), None, most, 0.0, 0.0, 0.0),
        source="a load curve",
        **measured,  # type: ignore[arg-type]
    )
    return OperatingPoint(profile, node, most)


# --- requests --------------------------------------------------------------------------------------------------------


def scaled(trace: Trace, context: int, asked: argparse.Namespace) -> Trace:
    """Return a trace whose lengths have the wanted means, cut to a context; the factors are told."""
    prompt = min(asked.prompt, 0.3 * context) * len(trace.arrivals) / sum(one.prompt for one in trace.arrivals)
    output = min(asked.output, 0.15 * context) * len(trace.arrivals) / sum(one.output for one in trace.arrivals)
    found = [
        Arrival(one.at_s, max(1, round(one.prompt * prompt)), max(1, round(one.output * output)))
        for one in trace.arrivals
    ]
    told = f"prompts x{prompt:.3g}, answers x{output:.3g}"
    return replace(trace, arrivals=tuple(found), told=(*trace.told, told)).lengths(1.0, context)


def piece(trace: Trace, rate: float, seconds: float) -> Trace:
    """Return the first requests of a trace, as many as come in some seconds at a rate, with their times stretched; all
    but the last where it has no more.
    """
    few = min(LEAST, round(LONGEST * rate * seconds))
    count = min(max(3, few, round(rate * seconds)), len(trace.arrivals) - 1)
    factor = count / rate / trace.arrivals[count].at_s
    kept = tuple(one._replace(at_s=one.at_s * factor) for one in trace.arrivals[:count])
    return replace(trace, arrivals=kept, seconds=count / rate, told=(*trace.told, f"times x{factor:.3g}"))


def asked_of(requests: Sequence[Sending | Arrival]) -> list[Asked]:
    """Return requests as the simulator takes them, in the order of their times."""
    return [Asked(i, at_s, 0, 0, prompt, output) for i, (at_s, prompt, output) in enumerate(sorted(requests))]


def limits_of(point: OperatingPoint, trace: Trace, asked: argparse.Namespace) -> Limits:
    """Return the times in which a request must be answered: multiples of what a mean request takes alone."""
    count = len(trace.arrivals)
    prompt = round(sum(one.prompt for one in trace.arrivals) / count)
    output = round(sum(one.output for one in trace.arrivals) / count)
    (alone,) = replay(point, [Asked(0, 0.0, 0, 0, prompt, max(2, output))], Fcfs())
    return Limits(asked.ttft * alone.ttft_s, asked.tpot * alone.tpot_s)


def capacity(point: OperatingPoint, trace: Trace, seconds: float, limits: Limits) -> tuple[float, Limits]:
    """Return the largest rate, to 2 %, at which the simulator has enough requests in time, and the limits: larger ones
    where long prompts miss those that are asked for on an idle node already.
    """

    def holds(rate: float) -> bool:
        jobs = replay(point, asked_of(piece(trace, rate, seconds).arrivals), Fcfs())
        good = [job for job in jobs if job.ended == "finished"]
        met = sum(job.ttft_s <= limits.ttft_s and job.tpot_s <= limits.tpot_s for job in good)
        return met >= IN_TIME * len(jobs)

    low = 1e-2
    while not holds(low):
        limits = Limits(1.5 * limits.ttft_s, 1.5 * limits.tpot_s)
    while holds(low * 2):
        low *= 2
    high = low * 2
    while high > 1.02 * low:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low, limits


# --- runs ------------------------------------------------------------------------------------------------------------


def runs_of(servers: Sequence[Server], curves: Sequence[LoadCurve], asked: argparse.Namespace) -> Iterator[Run]:
    """Yield what was measured on each node, for each trace and load."""
    points = [point_of(curve, server.place.sequences) for curve, server in zip(curves, servers, strict=True)]
    for path in asked.trace:
        whole = read_trace(path)
        traces = [scaled(whole, curve.context, asked) for curve in curves]
        most = [
            capacity(point, trace, asked.seconds, limits_of(point, trace, asked))
            for point, trace in zip(points, traces, strict=True)
        ]
        for load in asked.load or LOADS:
            pieces = [piece(trace, load * rate, asked.seconds) for trace, (rate, _) in zip(traces, most, strict=True)]
            for server, one in zip(servers, pieces, strict=True):
                say(f"{server.place.name}: {one.name} at {load:.0%}: {one.rate:.3g}/s; {'; '.join(one.told)}")
            before = noise.snapshot()
            sends = [[Sending(*request) for request in one.arrivals] for one in pieces]
            seen = driven(servers, sends, seed=len(sends[0]))
            after = noise.snapshot()
            stolen = (after.stolen - before.stolen) / max(1, after.total - before.total)
            for i, server in enumerate(servers):
                yield {
                    "place": {**asdict(server.place), "catalog": ""},
                    "curve": plain(curves[i]),
                    "trace": path.name,
                    "told": pieces[i].told,
                    "load": load,
                    "rate": pieces[i].rate,
                    "limits": asdict(most[i][1]),
                    "stolen_share": stolen,
                    **saved(sends[i], seen[i]),
                }


def saved(sends: Sequence[Sending], seen: Seen) -> Run:
    """Return what was seen as it is kept: absent where nothing came."""
    heard = [{name: _known(value) for name, value in asdict(one).items()} for one in seen.heard]
    return {"sends": [list(one) for one in sends], **asdict(replace(seen, heard=())), "heard": heard}


def _known(value: object) -> object:
    return None if isinstance(value, float) and not isfinite(value) else value


def measured(asked: argparse.Namespace) -> list[Run]:
    """Profile and serve all nodes, group by group, and return the runs."""
    cores = [int(one) for one in asked.cores.split(",")] if asked.cores else sorted(os.sched_getaffinity(0))
    found = list[Run]()
    with tempfile.TemporaryDirectory(dir=asked.work) as name:
        for first in range(0, len(asked.node), len(cores)):
            some = enumerate(asked.node[first : first + len(cores)])
            places = [place_of(one, cores[i], asked.catalog, Path(name) / f"{first + i}") for i, one in some]
            curves = profiled(places, asked)
            for place, curve in zip(places, curves, strict=True):
                say(f"{place.name}: error p95 of the curve {curve.error_p95:.1%}; {curve.doubt or 'not doubtful'}")
            with serving(places) as servers:
                driven(servers, [WARM] * len(servers), seed=1)
                for run in runs_of(servers, curves, asked):
                    found.append(run)
                    save(found, asked)
    return found


def save(runs: Sequence[Run], asked: argparse.Namespace) -> None:
    """Keep what was measured so far, where that is asked for."""
    if asked.save:
        asked.save.write_text(json.dumps({"runs": runs}))


# --- the comparison --------------------------------------------------------------------------------------------------


def compared(run: Run) -> Run:
    """Return what was measured and what the simulator says of the same requests, with the errors."""
    curve = curve_from(run["curve"])
    point = point_of(curve, run["place"]["sequences"])
    heard = run["heard"]
    sent = [(one["sent_s"], prompt, output) for one, (_, prompt, output) in zip(heard, run["sends"], strict=True)]
    jobs = replay(point, asked_of([Sending(*one) for one in sent]), Fcfs())
    done = [one for one in heard if one["end"] == "answered"]
    good = [job for job in jobs if job.ended == "finished"]
    real = {
        "ttft_s": percentiles([one["ttft_s"] for one in done]),
        "tpot_s": percentiles([_tpot_s(one) for one in done if one["tokens"] > 1]),
        "output_tokens_per_s": _rate([(o["sent_s"], o["sent_s"] + o["last_s"], o["tokens"]) for o in done]),
    }
    made = {
        "ttft_s": percentiles([job.ttft_s for job in good]),
        "tpot_s": percentiles([job.tpot_s for job in good if job.ask.output > 1]),
        "output_tokens_per_s": _rate([(job.ask.at_s, job.last_s, job.ask.output) for job in good]),
    }
    place = run["place"]
    steps = run["steps"]
    return {
        "node": f"{place['model']}/{place['variant'][:6]} x{place['sequences']}",
        "trace": run["trace"],
        "load": run["load"],
        "rate": run["rate"],
        "requests": len(heard),
        "answered": len(done),
        "measured": real,
        "simulated": made,
        "error": {name: _errors(real[name], made[name]) for name in real},
        "late_s_p99": percentiles([one["late_s"] for one in heard])[2],
        "client_share": run["client_cpu_s"] / run["seconds"],
        "stolen_share": run["stolen_share"],
        "server_share": run["server_cpu_s"] / run["seconds"],
        "joined": 1 - sum(one["chunks"] for one in done) / max(1, sum(one["tokens"] for one in done)),
        "step_s": steps.get("step_sum", 0.0) / max(1.0, steps.get("step_count", 0.0)),
        "host_s": steps.get("host_sum", 0.0) / max(1.0, steps.get("host_count", 0.0)),
        "steps": steps.get("step_count", 0.0),
    }


def _tpot_s(one: Run) -> float:
    return float((one["last_s"] - one["ttft_s"]) / (one["tokens"] - 1))


def _rate(spans: Sequence[tuple[float, float, int]]) -> float:
    """Return the tokens a second from the first request to the last token."""
    if not spans:
        return 0.0
    return sum(tokens for _, _, tokens in spans) / (max(last for _, last, _ in spans) - min(at for at, _, _ in spans))


def _errors(real: Any, made: Any) -> Any:
    if isinstance(real, list):
        return [_errors(one, other) for one, other in zip(real, made, strict=True)]
    return made / real - 1 if real and isfinite(real) and isfinite(made) else None


HEADER = (
    "node,trace,load,req/s,answered,TTFT ms 50/95/99,simulated,error %,TPOT ms 50/95/99,simulated,error %,tokens/s,"
    "simulated,error %,client %,late ms"
).split(",")


def line(found: Run) -> list[object]:
    """Return a row of the table."""
    cells = list[object]()
    for name in ("ttft_s", "tpot_s"):
        cells += [" / ".join(f"{1000 * one:.1f}" for one in found[what][name]) for what in ("measured", "simulated")]
        cells.append(" / ".join(map(_percent, found["error"][name])))
    cells += [f"{found[what]['output_tokens_per_s']:.1f}" for what in ("measured", "simulated")]
    cells.append(_percent(found["error"]["output_tokens_per_s"]))
    trace = found["trace"].removesuffix(".csv").rpartition("_")[2]
    begin = [found["node"], trace, f"{found['load']:.0%}", f"{found['rate']:.3g}"]
    counts = f"{found['answered']}/{found['requests']}"
    return [*begin, counts, *cells, f"{100 * found['client_share']:.0f}", f"{1000 * found['late_s_p99']:.1f}"]


def _percent(error: float | None) -> str:
    return "-" if error is None else f"{100 * error:+.0f}"


def within(found: Sequence[Run], limit: float = 0.1) -> str:
    """Return how many of the figures are within a limit."""
    errors = list[float]()
    for one in found:
        for error in one["error"].values():
            errors += [each for each in (error if isinstance(error, list) else [error]) if each is not None]
    count = sum(abs(each) <= limit for each in errors)
    return f"{count} of {len(errors)} figures are within {limit:.0%}; the largest error is {max(map(abs, errors)):.0%}"


def profile_lines(runs: Sequence[Run]) -> list[str]:
    """Return what the profiles of the nodes say."""
    told = dict[str, str]()
    for run in runs:
        curve, place = curve_from(run["curve"]), run["place"]
        one, many = curve.served_s(Work.of([(64, 1)])), curve.served_s(Work.of([(64, 1)] * curve.decodes_most))
        own = curve.own
        told[f"{place['model']}/{place['variant'][:6]} x{place['sequences']}"] = (
            f"a step of 1 sequence {1000 * one:.2f} ms, of {curve.decodes_most} {1000 * many:.2f} ms; of these the "
            f"server's own {1e6 * own.step_s:.0f} us and {1e6 * own.row_s:.0f} us a sequence; a request "
            f"{1e6 * own.request_s:.0f} + {1e6 * own.end_s:.0f} us, {1e6 * own.wake_s:.0f} us more where it was idle; "
            f"error p95 of the curve {curve.error_p95:.1%}{'; ' if own.speeds else ''}{own.speeds}"
        )
    return [f"{name}: {text}" for name, text in told.items()]


def main() -> int:
    """Measure, or read what was measured, and compare."""
    asked = options()
    if asked.source:
        runs = json.loads(asked.source.read_text())["runs"]
    elif asked.node and asked.trace:
        runs = measured(asked)
    else:
        raise InputError("give --node and --trace, or --from")
    found = [compared(run) for run in runs]
    if asked.json:
        print(json.dumps({"compared": found, "runs": runs}))
        return 0
    print("\n".join(profile_lines(runs)))
    print(table(HEADER, [line(one) for one in found], tuple(range(3, len(HEADER)))))
    print(within(found))
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    end(main)
