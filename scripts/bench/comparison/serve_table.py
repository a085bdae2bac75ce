"""From what requests saw to rows: percentiles, ratios that are paired by round, and the readable table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from comparison.http_servers import Answer, Run
from comparison.table import interval
from llmbuild.profiler import statistics
from llmbuild.report.rows import quantity, table

Rounds = Mapping[int, Run]
"""What one server answered at a number of streams, by round."""

TOKENS = "output_tokens_per_s"
TIMES: dict[str, tuple[Callable[[Answer], float], float]] = {
    "ttft_s_p50": (lambda one: one.ttft_s, 0.5),
    "ttft_s_p99": (lambda one: one.ttft_s, 0.99),
    "tpot_s_p50": (lambda one: one.tpot_s, 0.5),
    "tpot_s_p99": (lambda one: one.tpot_s, 0.99),
}
"""Percentiles over requests, by name."""
SHARES = ("client_cpu_share", "server_cpu_s_per_token")
FIGURES = {TOKENS: "1/s", **dict.fromkeys(TIMES, "s"), "client_cpu_share": "", "server_cpu_s_per_token": "s"}
"""Every figure and its unit; a share is of one core."""


def percentile(values: Sequence[float], share: float) -> float:
    """Return the least value that so many are not above."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


def figures(runs: Sequence[Run]) -> dict[str, float]:
    """Return the figures of all requests of some runs together."""
    answers = [one for run in runs for one in run.answers]
    tokens, wall_s = sum(one.output_tokens for one in answers), sum(run.wall_s for run in runs)
    return {
        TOKENS: tokens / wall_s,
        **{name: percentile([value(one) for one in answers], share) for name, (value, share) in TIMES.items()},
        "client_cpu_share": sum(run.client_cpu_s for run in runs) / wall_s,
        "server_cpu_s_per_token": sum(run.server_cpu_s for run in runs) / tokens,
    }


def ratios(mine: Rounds, theirs: Rounds) -> dict[str, dict[str, float]]:
    """Return mine over theirs for each figure, paired by round, with 95 % intervals; none without such a round."""
    both = sorted(mine.keys() & theirs.keys())
    if not both:
        return {}
    a, b = ([figures([runs[n]]) for n in both] for runs in (mine, theirs))
    return {name: paired([x[name] for x in a], [y[name] for y in b]) for name in (TOKENS, *TIMES)}


def paired(mine: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Return the median of mine over theirs, with its interval."""
    read = statistics.paired_ratio(mine, theirs)
    return {"median": read.median, "low": read.low, "high": read.high, "rounds": len(read.samples)}


def same(mine: Rounds, theirs: Rounds) -> float:
    """Return the share of requests that both answered with the same text."""
    pairs = [
        (a.text, b.text)
        for number in mine.keys() & theirs.keys()
        for a, b in zip(mine[number].answers, theirs[number].answers, strict=True)
    ]
    return sum(a == b for a, b in pairs) / len(pairs) if pairs else math.nan


def rows(found: Mapping[int, Mapping[str, Rounds]], peer: str) -> list[dict[str, Any]]:
    """Return a row for each number of streams and server, with the ratios of ours to the peer."""
    made: list[dict[str, Any]] = []
    for streams, by_server in found.items():
        theirs = by_server[peer]
        for name, runs in by_server.items():
            row: dict[str, Any] = {"streams": streams, "server": name, **figures(list(runs.values()))}
            row["requests"] = sum(len(run.answers) for run in runs.values())
            row["rounds"] = {number: figures([run]) for number, run in runs.items()}
            if name != peer:
                row |= {"ratios": ratios(runs, theirs), "same_text": same(runs, theirs)}
            made.append(row)
    return made


def text(made: Sequence[dict[str, Any]], peer: str) -> str:
    """Return the table: for each number of streams and each server of ours, its figures beside the peer's."""
    lines = []
    for row in made:
        if row["server"] == peer:
            continue
        theirs = next(one for one in made if one["server"] == peer and one["streams"] == row["streams"])
        for name in FIGURES:
            ratio = interval(row["ratios"].get(name))
            lines.append([row["server"], row["streams"], named(name), shown(row, name), shown(theirs, name), ratio])
    return table(["server", "streams", "figure", "ours", peer, "ratio"], lines)


def named(figure: str) -> str:
    """Return a figure's name as it is read."""
    return figure.replace("_s_p", " p").replace("_s_per_", " per ").replace("_per_s", "/s").replace("_", " ")


def shown(row: Mapping[str, Any], figure: str) -> str:
    """Return a figure with its unit; a share in percent."""
    unit = FIGURES[figure]
    if figure == "client_cpu_share":
        return f"{row[figure]:.1%}"
    return f"{row[figure]:.1f}/s" if unit == "1/s" else quantity(row[figure], unit)
