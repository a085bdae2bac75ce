"""The tables of a packed folder's run, for people and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from llmbuild.carry.peers import Versus
from llmbuild.digest import plain
from llmbuild.spec.machine import Machine
from llmbuild.spec.measurement import Measurement, Operator, Reading
from llmbuild.system.strict_json import dumps

HEADER = (
    *(
        "model",
        "target",
        "batch",
        "tpot_ms",
        "ttft_ms",
        "load_ms",
        "J/token",
        "idle_W",
        "of_bandwidth",
        "top1",
        "front",
    ),
    "choices",
)
ENERGY = (
    *("model", "target", "J/token", "tpot_ms", "windows", "window_s", "step_s", "idle_W", "source", "front"),
    "choices",
)
ACROSS = ("model", "target", "variant", "tpot_ms", "ttft_ms", "J/token", "over the first")
VERSUS = (
    *(
        "model",
        "workload",
        "batch",
        "tpot_ms",
        "ttft_ms",
        "J/token",
        "ours/its tpot",
        "ours/its ttft",
        "runtime",
    ),
    "ours",
)
FACTS = ("windows", "window_s", "step_s", "idle_w")
TOP = 8
"""Maximum number of printed operators of a decode step."""


@dataclass(frozen=True)
class Line:
    """One variant of the table: its results, or why there are none.

    `front` is its standing among its target's variants by time per token and energy, where both are known.
    """

    model: str
    target: str
    choices: str
    variant: str
    reason: str
    measurement: Measurement | None = None
    front: str = ""


@dataclass(frozen=True)
class Across:
    """The best variant of each target, raced in the same rounds: its time per token over the first one's."""

    model: str
    target: str
    variant: str
    readings: Mapping[str, Reading]
    ratio: Reading
    energy: Mapping[str, float | str] | None = None


@dataclass(frozen=True)
class Tables:
    """The results of a run."""

    machine: Machine
    lines: Sequence[Line]
    across: Sequence[Across] = ()
    versus: Sequence[Versus] = ()
    rates: Mapping[str, float] = field(default_factory=dict)
    """Bytes per second of row sums over memory, by target."""


def text(found: Tables) -> str:
    """Return the readable tables: variants, targets in the same rounds, PyTorch in turns, operators."""
    parts = [found.machine.describe(), table(found.lines)]
    if energy := _energy(found.lines):
        parts += ["energy, of the whole board, idle power included:", energy]
    if found.across:
        parts += ["targets in the same rounds:", across(found.across)]
    if found.versus:
        parts += ["in turns with PyTorch (below 1: llmbuild is faster):", versus(found.versus)]
    for line in _with_operators(found.lines):
        parts += [f"a decode step of {line.model} on {line.target}, {line.choices}:", operators(line)]
    return "\n".join(parts)


def table(lines: Sequence[Line]) -> str:
    """Return the table of variants, ranked by time per token; omitted ones come last, with the reason."""
    ranked = sorted(lines, key=lambda line: _median(line, "tpot_s") or float("inf"))
    return _aligned([HEADER, *(_cells(line) for line in ranked)])


def _cells(line: Line) -> tuple[str, ...]:
    idle = (line.measurement.energy or {}).get("idle_w") if line.measurement else None
    return (
        line.model,
        line.target,
        str(line.measurement.workload.batch) if line.measurement else "-",
        *(_cell(line, name, 1e3) for name in ("tpot_s", "ttft_s", "load_s")),
        _cell(line, "energy_j_per_token"),
        _number(idle),
        _cell(line, "bandwidth_fraction"),
        _cell(line, "quality_top1"),
        line.front or "-",
        f"{line.choices}: {line.reason}" if line.reason else line.choices,
    )


def _energy(lines: Sequence[Line]) -> str:
    """Return the source and the precision of the joules, for each variant that has some, the least first."""
    rows = []
    for line in sorted(lines, key=lambda line: _median(line, "energy_j_per_token") or float("inf")):
        measured = line.measurement
        if measured is None or "energy_j_per_token" not in measured.readings:
            continue
        both = (_of(measured.readings, "energy_j_per_token"), _of(measured.readings, "tpot_s", 1e3))
        facts = (_number((measured.energy or {}).get(name)) for name in FACTS)
        rows.append((line.model, line.target, *both, *facts, measured.energy_source or "-", line.front, line.choices))
    return _aligned([ENERGY, *rows]) if rows else ""


def across(found: Sequence[Across]) -> str:
    """Return the table of targets in the same rounds, model by model."""
    rows = [
        (
            a.model,
            a.target,
            a.variant[:12],
            *(_of(a.readings, name, 1e3) for name in ("tpot_s", "ttft_s")),
            _of(a.readings, "energy_j_per_token"),
            _interval(a.ratio),
        )
        for a in found
    ]
    return _aligned([ACROSS, *rows])


def versus(found: Sequence[Versus]) -> str:
    """Return the table of PyTorch's modes, each with llmbuild's variant over it in the same rounds."""
    rows = []
    for v in found:
        ratios, readings = v.ratios or {}, v.readings or {}
        told = f"{v.runtime}: {v.reason}" if v.reason else v.runtime
        rows.append(
            (
                v.model,
                v.workload.name,
                str(v.workload.batch),
                *(_of(readings, name, 1e3) for name in ("tpot_s", "ttft_s")),
                _of(readings, "energy_j_per_token"),
                *(_verdict(ratios.get(name)) for name in ("tpot_s", "ttft_s")),
                told,
                v.choices,
            )
        )
    return _aligned([VERSUS, *rows])


def _verdict(ratio: Reading | None) -> str:
    """Return a ratio and its meaning, in a word."""
    if ratio is None:
        return "-"
    word = "wins" if ratio.high < 1 else "loses" if ratio.low > 1 else "undecided"
    return f"{_interval(ratio)} {word}"


def _with_operators(lines: Sequence[Line]) -> list[Line]:
    """Return the fastest variant of each model and target whose operators are known."""
    best: dict[tuple[str, str], Line] = {}
    for line in sorted(lines, key=lambda line: _median(line, "tpot_s") or float("inf")):
        if line.measurement and line.measurement.operators:
            best.setdefault((line.model, line.target), line)
    return list(best.values())


def operators(line: Line) -> str:
    """Return the time of a decode step by operator, the costliest first."""
    assert line.measurement is not None
    found: Sequence[Operator] = line.measurement.operators
    whole = sum(o.seconds for o in found)
    rows = [(f"{o.seconds * 1e6:.4g}", f"{o.seconds / whole:.0%}", str(o.calls), o.name) for o in found[:TOP]]
    return _aligned([("us", "of them", "calls", "operator"), *rows])


def _cell(line: Line, metric: str, scale: float = 1.0) -> str:
    value = _median(line, metric)
    return "-" if value is None else f"{value * scale:.4g}"


def _median(line: Line, metric: str) -> float | None:
    found = line.measurement.readings.get(metric) if line.measurement else None
    return None if found is None else found.median


def _of(readings: Mapping[str, Reading], metric: str, scale: float = 1.0) -> str:
    return _interval(readings[metric], scale) if metric in readings else "-"


def _interval(found: Reading, scale: float = 1.0) -> str:
    return "{:.4g} [{:.4g}, {:.4g}]".format(*(x * scale for x in (found.median, found.low, found.high)))


def _number(value: float | str | None) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def as_json(found: Tables) -> str:
    """Return all results as one JSON document."""
    return dumps(
        {
            "machine": plain(found.machine),
            "rows": plain(list(found.lines)),
            "across": plain(list(found.across)),
            "pytorch": plain(list(found.versus)),
            "read_bytes_per_s": dict(found.rates),
        }
    )
