"""Our simulator against a public one: AISimulate, on the same requests and the same times of steps.

    python -m venv SIM && SIM/bin/pip install --only-binary :all: aisimulate==0.13.0.dev202610270000000085
    python scripts/bench/fleet_cross.py --simulator SIM/bin/aisimulate --trace FILE [--seconds S] [--rate N]
        [--lengths N] [--context N] [--sequences N] [--prefill-ms N] [--decode-ms N] [--json]

Of the times of steps that it takes without a table of its own, `fixed` is the one that both can have: a step with
prompts takes --prefill-ms, one that decodes --decode-ms, one with both their sum, whatever is in it. So queues, batches
and admission are compared, not profiles. Both cut prompts into steps of 512 tokens, and keep no prefixes. `error` is
ours over theirs less one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from comparison.nodes import percentiles
from comparison.script import end, say

from llmbuild.errors import InputError
from llmbuild.fleet.capacity import OperatingPoint
from llmbuild.fleet.simulate.replay import replay
from llmbuild.fleet.simulate.trace import BLOCK, Asked, Trace, read_trace
from llmbuild.report.fleet import trace_lines
from llmbuild.report.table import table
from llmbuild.serve.schedule.sarathi import Sarathi
from llmbuild.spec.fleet import Line, NodeClass, Profile, StepTime
from llmbuild.spec.load_curve import Fit, OwnTime, Table, Work

CHUNK = 512
"""Tokens of a step, of both."""
Times = dict[str, list[float]]
"""Seconds to the first token, and between tokens, of all requests."""


@dataclass(frozen=True)
class Fixed(Fit):
    """Seconds of a step by whether it has prompts, and whether it decodes."""

    prompts_s: float = 0.0
    decodes_s: float = 0.0

    def seconds(self, work: Work) -> float:
        """Return the seconds of a step."""
        return self.prompts_s * (work.prompts > 0) + self.decodes_s * (work.decodes > 0)


def options(words: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulator", required=True, type=Path, help="the command `aisimulate` of its environment")
    parser.add_argument("--trace", required=True, type=Path)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--rate", type=float, default=1.0)
    parser.add_argument("--lengths", type=float, default=0.25)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--prefill-ms", type=float, default=60.0)
    parser.add_argument("--decode-ms", type=float, default=15.0)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(words)


def ours(trace: Trace, asked: argparse.Namespace) -> Times:
    """Return what our simulator says."""
    prefill_s, decode_s = asked.prefill_ms / 1e3, asked.decode_ms / 1e3
    fit = Fixed(True, Table((1,), (decode_s,)), 0.0, 0.0, 0.0, prefill_s, decode_s)
    step = StepTime(Line((1.0,), (decode_s,)), 0.0, 0.0, 0.0, fit, OwnTime(0.0, 0.0, 0.0, 0.0))
    watts: dict[str, float] = dict.fromkeys(("host_w", "bare_w", "parked_w", "active_w"), 0.0)
    node = NodeClass("fixed", 1, "fixed", False, 1, 1e12, **watts, boot_s=0.0, watts_basis="estimated")
    bases = {"decode_basis": "estimated", "prompt_basis": "estimated", "power_basis": "estimated"}
    profile = Profile(
        *("fixed", "m", "fixed", step, None, asked.sequences, 0.0, 0.0, 0.0),
        source="fixed times",
        **bases,  # type: ignore[arg-type]
    )
    requests = [Asked(i, one.at_s, 0, 0, one.prompt, one.output) for i, one in enumerate(trace.arrivals)]
    jobs = replay(OperatingPoint(profile, node, asked.sequences), requests, Sarathi(CHUNK))
    done = [job for job in jobs if job.ended == "finished"]
    return {"ttft_s": [job.ttft_s for job in done], "tpot_s": [job.tpot_s for job in done if job.ask.output > 1]}


def lines_of(trace: Trace) -> str:
    """Return a trace as Mooncake writes it, in which no two prompts begin alike."""
    lines, names = [], 0
    for one in trace.arrivals:
        count = -(-one.prompt // BLOCK)
        body = {"timestamp": round(one.at_s * 1e3, 3), "input_length": one.prompt, "output_length": one.output}
        lines.append(json.dumps({**body, "hash_ids": list(range(names, names + count))}))
        names += count
    return "\n".join([*lines, ""])


def setup(trace: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Return the other simulator's configuration. Its model and hardware are named, and give no time."""
    worker = {
        "scheduler": {"max_batched_tokens": CHUNK, "max_sequences": asked.sequences},
        "kv_cache": {"block_size": 16, "prefix_caching": False, "capacity": {"type": "fixed", "blocks": 10**6}},
        "timing": {"type": "fixed", "prefill_ms": asked.prefill_ms, "decode_ms": asked.decode_ms},
    }
    source = {"type": "trace", "format": "mooncake", "paths": [str(trace)], "block_size": BLOCK}
    return {
        "traffic": {"source": source, "load": {"type": "trace_timestamps"}},
        "engine": {"model": "Qwen/Qwen3-8B", "hardware": "h100_sxm", "workers": {"aggregated": worker}},
        "execution": {"resources": {"initialization_timeout_seconds": 900.0}},
    }


def theirs(trace: Trace, asked: argparse.Namespace) -> Times:
    """Return what the other simulator says.

    Raises:
        InputError: it does not run.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "trace.jsonl").write_text(lines_of(trace))
        (folder / "setup.yaml").write_text(json.dumps(setup(folder / "trace.jsonl", asked)))
        words = [str(asked.simulator), "predict", "-c", str(folder / "setup.yaml"), "--capture-per-request"]
        done = subprocess.run(
            [*words, "--format", "json", "--output-dir", str(folder / "out")], capture_output=True, text=True
        )
        found = folder / "out" / "requests.jsonl"
        if not found.exists():
            raise InputError(f"{asked.simulator}: {done.stderr[-500:] or done.stdout[-500:]}")
        return times_of(found.read_text())


def times_of(text: str) -> Times:
    """Return the times of the other simulator's lines, one for each request."""
    rows = [row for row in map(json.loads, text.splitlines()) if row["terminal_status"] == "completed"]
    more = [row for row in rows if row["output_length"] > 1]
    return {
        "ttft_s": [row["ttft_ms"] / 1e3 for row in rows],
        "tpot_s": [(row["last_token_ms"] - row["first_token_ms"]) / 1e3 / (row["output_length"] - 1) for row in more],
    }


def rows_of(mine: Times, other: Times) -> list[dict[str, Any]]:
    """Return a row for each percentile of each metric."""
    found = list[dict[str, Any]]()
    for name in ("ttft_s", "tpot_s"):
        both: Sequence[Sequence[float]] = percentiles(mine[name]), percentiles(other[name])
        for share, one, two in zip((50, 95, 99), *both, strict=True):
            error = one / two - 1 if two else None
            found.append({"metric": f"{name}_p{share}", "ours": one, "theirs": two, "error": error})
    return found


def main() -> int:
    """Run both."""
    asked = options()
    whole = read_trace(asked.trace).window(asked.seconds).lengths(asked.lengths, asked.context).at_rate(asked.rate)
    kept = tuple(one._replace(at_s=round(one.at_s, 6)) for one in whole.arrivals)
    trace = replace(whole, arrivals=kept)
    for told in trace_lines({"": trace}):
        say(told)
    mine, other = ours(trace, asked), theirs(trace, asked)
    say(f"{len(mine['ttft_s'])} requests answered here, {len(other['ttft_s'])} there")
    rows = rows_of(mine, other)
    if asked.json:
        print(json.dumps({"rows": rows, "told": trace_lines({"": trace})}))
        return 0
    lines = [
        [row["metric"], *(f"{1e3 * row[who]:.2f} ms" for who in ("ours", "theirs")), f"{row['error'] or 0.0:+.1%}"]
        for row in rows
    ]
    print(table(["metric", "ours", "theirs", "error"], lines))
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    end(main)
