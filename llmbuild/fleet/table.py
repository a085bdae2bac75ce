"""The table of a packed folder's run, for people and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from llmbuild.digest import plain
from llmbuild.runtime import host
from llmbuild.spec.measurement import Measurement, Reading

HEADER = ("model", "target", "tpot_ms", "ttft_ms", "load_ms", "J/token", "idle_W", "of_bandwidth", "top1", "choices")


@dataclass(frozen=True)
class Line:
    """One variant of the table: what came of it, or why nothing did; `seconds` are those of another runtime."""

    model: str
    target: str
    choices: str
    variant: str
    reason: str
    measurement: Measurement | None = None
    seconds: dict[str, float] | None = None


@dataclass(frozen=True)
class Across:
    """The best variant of each target, raced in the same rounds: its time per token over the first one's."""

    target: str
    variant: str
    tpot_s: float
    ratio: Reading


def cell(line: Line, metric: str, scale: float = 1.0) -> str:
    """Return a figure for people, `-` where it is absent."""
    value = _value(line, metric)
    return "-" if value is None else f"{value * scale:.4g}"


def _value(line: Line, metric: str) -> float | None:
    found = line.measurement.readings.get(metric) if line.measurement else None
    return found.median if found is not None else (line.seconds or {}).get(metric)


def table(lines: Sequence[Line]) -> str:
    """Return the table, ranked by time per token; what was left out comes last, with the reason."""
    ranked = sorted(lines, key=lambda line: _value(line, "tpot_s") or float("inf"))
    return _aligned([HEADER, *(_cells(line) for line in ranked)])


def _cells(line: Line) -> tuple[str, ...]:
    idle = (line.measurement.energy or {}).get("idle_w") if line.measurement else None
    return (
        line.model,
        line.target,
        *(cell(line, name, 1e3) for name in ("tpot_s", "ttft_s", "load_s")),
        cell(line, "energy_j_per_token"),
        "-" if idle is None else f"{idle:.4g}",
        cell(line, "bandwidth_fraction"),
        cell(line, "quality_top1"),
        f"{line.choices}: {line.reason}" if line.reason else line.choices,
    )


def across(found: Sequence[Across]) -> str:
    """Return the table of targets in the same rounds."""
    header = ("target", "variant", "tpot_ms", f"over {found[0].target}")
    lines = [(a.target, a.variant[:12], f"{a.tpot_s * 1e3:.4g}", _interval(a.ratio)) for a in found]
    return _aligned([header, *lines])


def _interval(found: Reading) -> str:
    return f"{found.median:.3f} [{found.low:.3f}, {found.high:.3f}]"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def as_json(lines: Sequence[Line], raced: Sequence[Across]) -> str:
    """Return everything as one JSON document."""
    rows = [{**vars(line), "measurement": plain(line.measurement) if line.measurement else None} for line in lines]
    return json.dumps({"machine": plain(host.machine()), "rows": rows, "across": plain(list(raced))})
