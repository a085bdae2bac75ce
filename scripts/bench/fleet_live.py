"""A running fleet under a piece of a trace, with a replica killed on the way: what was answered, and how fast.

    python scripts/bench/fleet_live.py FLEET --trace FILE [--seconds S] [--rate N] [--lengths N] [--context N]
                                       [--policy P]... [--kill-at S] [--back-at S] [--stated N] [-C CATALOG] [--json]

For each policy `llmbuild orchestrate FLEET` is started with the trace's largest rate of 60 s and its mean lengths as
those of the first class of its first service: so a static policy knows what it knows in the simulator. Requests are
sent at the trace's times, whether earlier ones are answered or not, as streams of token ids that ask for as many tokens
as the trace has. The client, the gateway and the replicas share this machine. `lost` are requests that ended without an
end of the answer and without an error; `failed` ended with an error behind the first byte, `rejected` before it.
`twice` are streams with more tokens than were asked for or with a second end.

With `--back-at` the whole node of the killed replica is gone: it is out of service from the kill on, and is added again
at that time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from math import inf, isfinite
from pathlib import Path
from statistics import mean

from comparison.nodes import AFTER_S, percentiles
from comparison.script import end, say
from ruamel.yaml import YAML

from llmbuild.errors import InputError
from llmbuild.fleet.actuators.journal import Entry, Journal, runs
from llmbuild.fleet.nodes_out import NodesOut
from llmbuild.fleet.policies.named import POLICIES
from llmbuild.fleet.simulate.trace import Arrival, Trace, read_trace
from llmbuild.report.fleet import trace_lines
from llmbuild.report.table import table
from llmbuild.runtime import reader
from llmbuild.serve.drive import Sending, drive
from llmbuild.spec.files.fleet import read_fleet
from llmbuild.spec.fleet import Fleet

LOOK_S = 0.25
TOLD = ("decides", "start", "route", "stop", "ready", "died", "ended", "finds", "waits", "broken", "retry")
"""First words of the lines of an orchestrator's log that are kept."""


@dataclass
class Sent:
    """One request as its client saw it; seconds are from its arrival in the trace."""

    at_s: float
    late_s: float
    """How late it was sent: the client's own fault."""
    end: str = "lost"
    ttft_s: float = inf
    tpot_s: float = 0.0
    tokens: int = 0
    twice: bool = False


@dataclass
class Run:
    """What came of one policy."""

    policy: str
    sent: list[Sent] = field(default_factory=list)
    replicas: list[tuple[float, int]] = field(default_factory=list)
    """Replicas that take requests, by the time at which they were counted."""
    killed_s: float = inf
    recovered_s: float = inf
    actions: dict[str, int] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)
    left: int = 0
    """Processes that were there after the end."""
    code: int = 0


def options(words: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fleet", type=Path)
    parser.add_argument("--trace", required=True, type=Path)
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--rate", type=float, default=1.0)
    parser.add_argument("--lengths", type=float, default=1.0)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--stated", type=float, default=1.0, help="times the largest rate that the file states")
    parser.add_argument("--policy", action="append", help=" ".join(POLICIES))
    parser.add_argument("--kill-at", type=float, help="seconds; default: half of --seconds")
    parser.add_argument("--back-at", type=float, help="seconds; the killed replica's node is out of service until then")
    parser.add_argument("-C", "--catalog", type=Path, default=Path(reader.default_location()))
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(words)


def piece(asked: argparse.Namespace) -> Trace:
    """Return the piece of the trace that is sent."""
    found = read_trace(asked.trace).window(asked.seconds)
    return found.lengths(asked.lengths, asked.context).at_rate(asked.rate)


def peak(arrivals: Sequence[Arrival], window_s: float = 60.0) -> float:
    """Return the largest rate over a minute, or over all where that is shorter."""
    times = [one.at_s for one in arrivals]
    if not times:
        raise InputError("no request in this piece of the trace: give more --seconds")
    window = min(window_s, max(times[-1], 1.0))
    return max(sum(start <= t < start + window for t in times) for start in range(0, int(times[-1]) + 1, 5)) / window


def with_load(path: Path, folder: Path, rate: float, arrivals: Sequence[Arrival]) -> Path:
    """Write the fleet's file with another rate and other lengths of its first service."""
    yaml = YAML()
    found = yaml.load(path.read_text())
    service = found["services"][0]
    service["rate"] = round(rate, 3)
    service["classes"][0]["prompt"] = round(mean(one.prompt for one in arrivals), 1)
    service["classes"][0]["output"] = round(mean(one.output for one in arrivals), 1)
    made = folder / path.name
    with made.open("w") as file:
        yaml.dump(found, file)
    return made


# --- the fleet -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def running(fleet: Path, policy: str, catalog: Path, folder: Path, run: Run) -> Iterator[str]:
    """Run the fleet, and yield its address; note how it ended, and whether it left anything."""
    state, log = folder / policy, folder / f"{policy}.log"
    words = [sys.executable, "-m", "llmbuild", "orchestrate", fleet, "-C", catalog, "--state", state, "--port", "0"]
    with log.open("w") as errors:
        process = subprocess.Popen(
            [*map(str, words), "--policy", policy], stdout=subprocess.PIPE, stderr=errors, text=True
        )
    assert process.stdout is not None
    try:
        url = process.stdout.readline().strip()
        if not url:
            raise InputError(f"the fleet did not start: {log.read_text()[-2000:]}")
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        run.code = process.wait(AFTER_S)
        process.stdout.close()
        run.left = len(Journal(state).marked())
        lines = log.read_text().splitlines()
        run.told = [
            line for line in lines if re.match(r"(decides|start|route|stop|ready|died|ended|finds|waits|node) ", line)
        ]


@dataclass(frozen=True)
class Killing:
    """When a replica is killed, and when its node is in service again; None: it stays in service."""

    at_s: float
    back_s: float | None = None


async def looks(url: str, run: Run, journal: Journal, killing: Killing, began: float) -> None:
    """Count replicas all the time; kill one at its time, and note when there are as many as before."""
    before, gone, out = 0, False, NodesOut(journal.folder)
    victim: Entry | None = None
    while True:
        now = time.monotonic() - began
        count = await replicas(url)
        run.replicas.append((now, count))
        if victim is None and now >= killing.at_s:
            victim, before = next((one for one in journal.read() if runs(one)), None), count
            if victim is not None:
                if killing.back_s is not None:
                    out.change([victim.node], [])
                os.kill(victim.pid, signal.SIGKILL)
                run.killed_s = now
        if victim is not None and killing.back_s is not None and now >= killing.back_s and victim.node in out.read():
            out.change([], [victim.node])
        elif gone and run.recovered_s == inf and count >= before:
            run.recovered_s = now - run.killed_s
        gone = gone or (victim is not None and victim.name not in names(journal))  # what was counted may be of before
        await asyncio.sleep(LOOK_S)


def names(journal: Journal) -> set[str]:
    """Return the names of what is written down."""
    return {one.name for one in journal.read()}


async def got(url: str, path: str) -> str:
    """Return the body of a page."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    reader_, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n".encode())
    try:
        return (await reader_.read()).decode().partition("\r\n\r\n")[2]
    finally:
        writer.close()


async def replicas(url: str) -> int:
    """Return how many replicas take requests."""
    return sum(one["replicas"] for one in json.loads(await got(url, "/v1/models"))["data"])


# --- the client ------------------------------------------------------------------------------------------------------


def heard(url: str, model: str, trace: Trace) -> list[Sent]:
    """Send the trace, and return how each request ended."""
    sends = [Sending(*one) for one in trace.arrivals]
    answers = drive(url, model, sends, AFTER_S).heard
    return [
        Sent(
            asked.at_s,
            one.late_s,
            one.end,
            one.late_s + one.ttft_s,
            one.tpot_s if isfinite(one.last_s) else 0.0,
            one.tokens,
            one.ends > 1 or one.tokens > asked.output,
        )
        for asked, one in zip(sends, answers, strict=True)
    ]


async def sent(url: str, model: str, trace: Trace, run: Run, journal: Journal, killing: Killing) -> None:
    """Send the trace, look at the replicas, and read the actions at the end."""
    began = time.monotonic()
    looking = asyncio.ensure_future(looks(url, run, journal, killing, began))
    run.sent = await asyncio.to_thread(heard, url, model, trace)
    await asyncio.sleep(max(0.0, began + trace.seconds - time.monotonic()))
    if looking.done():
        looking.result()
    looking.cancel()
    found = re.findall(
        r'llmbuild:fleet_actions_total{action="(\w+)",outcome="applied"} (\S+)', await got(url, "/metrics")
    )
    run.actions = {name: int(float(count)) for name, count in found}


# --- the figures -----------------------------------------------------------------------------------------------------


def figures(run: Run, fleet: Fleet, trace: Trace) -> dict[str, object]:
    """Return what is told of a run."""
    kind = fleet.services[0].classes[0]
    done = [one for one in run.sent if one.end == "answered"]
    ends = [one.end for one in run.sent]
    met = sum(one.ttft_s <= kind.ttft_s and one.tpot_s <= kind.tpot_s for one in done)
    spans = zip(run.replicas, run.replicas[1:], strict=False)
    return {
        "policy": run.policy,
        "requests": len(run.sent),
        "accepted": len(ends) - ends.count("rejected"),
        "answered": len(done),
        "failed": ends.count("failed"),
        "rejected": ends.count("rejected"),
        "lost": len(ends) - len(done) - ends.count("failed") - ends.count("rejected"),
        "twice": sum(one.twice for one in run.sent),
        "attainment": met / len(run.sent),
        "recovery_s": run.recovered_s,
        "ttft_s_p50_p95_p99": percentiles([one.ttft_s for one in done]),
        "tpot_s_p50_p95_p99": percentiles([one.tpot_s for one in done if one.tokens > 1]),
        "output_tokens": sum(one.tokens for one in done),
        "replica_s": sum((b[0] - a[0]) * a[1] for a, b in spans),
        "seconds": trace.seconds,
        "actions": run.actions,
        "late_s_p99": percentiles([one.late_s for one in run.sent])[2],
        "left_processes": run.left,
        "exit_code": run.code,
        "told": run.told,
    }


def line(found: dict[str, object]) -> list[object]:
    """Return a row of the table."""

    def ms(name: str) -> str:
        values = found[name]
        assert isinstance(values, list)
        return " / ".join(f"{1000 * value:.1f}" for value in values)

    counts = [found[name] for name in ("requests", "accepted", "answered", "failed", "lost", "twice")]
    actions = found["actions"]
    assert isinstance(actions, dict)
    told = " ".join(f"{name} {count}" for name, count in sorted(actions.items()))
    times = [f"{found['recovery_s']:.1f}", ms("ttft_s_p50_p95_p99"), ms("tpot_s_p50_p95_p99")]
    return [found["policy"], *counts, f"{found['attainment']:.2%}", *times, f"{found['replica_s']:.0f}", told]


HEADER = "policy,requests,accepted,answered,failed,lost,twice,met SLO,recovery s,TTFT ms 50/95/99,TPOT ms 50/95/99"


def main() -> None:
    """Run each policy over the piece of the trace."""
    asked = options()
    trace = piece(asked)
    rate = peak(trace.arrivals)
    for told in trace_lines({"": trace}):
        say(told)
    say(f"largest rate of a minute: {rate:.3g}/s")
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = with_load(asked.fleet, folder, asked.stated * rate, trace.arrivals)
        fleet = read_fleet(path, tuple(POLICIES))
        for policy in asked.policy or ["static-peak", "adaptive"]:
            run = Run(policy)
            killing = Killing(asked.seconds / 2 if asked.kill_at is None else asked.kill_at, asked.back_at)
            with running(path, policy, asked.catalog, folder, run) as url:
                model = fleet.services[0].name
                asyncio.run(sent(url, model, trace, run, Journal(folder / policy), killing))
            found.append(figures(run, fleet, trace))
            say(f"{policy}: {len(run.sent)} requests, {found[-1]['attainment']:.2%} met their SLO")
    if asked.json:
        print(json.dumps({"trace": asdict(trace) | {"arrivals": len(trace.arrivals)}, "runs": found}, default=str))
    else:
        print(table([*HEADER.split(","), "replica s", "actions"], [line(one) for one in found], (0, 12)))


if __name__ == "__main__":
    end(main)
