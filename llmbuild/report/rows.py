"""Rows of a catalog as an aligned table, JSON or CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

from llmbuild.digest import short
from llmbuild.report.table import table, terminal
from llmbuild.search.knobs.space import knobs_of
from llmbuild.spec.rows import Row
from llmbuild.spec.slo import METRICS
from llmbuild.spec.target import LLVM_CPU
from llmbuild.system.strict_json import dumps, finite

COLUMNS = tuple(
    "variant model target machine workload status default ttft_s tpot_s output_tokens_per_s energy_j_per_token "
    "energy_source peak_memory_bytes artifact_bytes quality_kl quality_top1 point artifact toolchain".split()
)
"""The columns of every JSON row, in the order of the contract."""

MORE = (
    "parameter_bytes",
    "e2e_s",
    "itl_p99_s",
    "energy",
    "load_s",
    "quality_perplexity",
    "dispatches_per_token",
    "bandwidth_fraction",
    "peak_fraction",
    "confidence",
    "reason",
    "ratios",
    "intervals",
    "notes",
)

SPARE = (10, 5, 8, 9, 7, 4, 3, 6)
"""Columns that a front's table drops on a narrow terminal: load first, then the gain of ttft, weights."""

Cell = str | float | int | bool | None


def public(row: Mapping[str, object]) -> dict[str, object]:
    """Return the columns of the contract, then llmbuild's own."""
    return {name: row.get(name) for name in (*COLUMNS, *MORE)}


def as_json(rows: Sequence[Mapping[str, object]]) -> str:
    """Return a JSON array, one row a line."""
    if not rows:
        return "[]"
    return "[\n" + ",\n".join(dumps(row) for row in rows) + "\n]"


def as_csv(rows: Sequence[Mapping[str, object]]) -> str:
    """Return CSV with a header; a structured value is JSON in its cell, an absent one is empty."""
    out = io.StringIO()
    names = list(rows[0]) if rows else COLUMNS
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        writer.writerow([dumps(row[n]) if isinstance(row[n], (dict, list)) else finite(row[n]) for n in names])
    return out.getvalue().rstrip("\n")


def quantity(value: float | None, unit: str) -> str:
    """Return a readable number: milliseconds, megabytes, or three digits; `-` where it is absent."""
    if value is None:
        return "-"
    if unit == "s":
        return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"
    if unit == "B":
        return f"{value / 1e6:.1f} MB"
    if unit == "1/s":
        return f"{value:.0f}/s"
    return f"{value:.3g}"


def gain(row: Row, metric: str) -> str:
    """Return the gain over the compiler's default (above 1: better), paired in rounds, with its 95 % interval."""
    ratio = (row.get("ratios") or {}).get(metric)
    if not ratio or row.get("default"):
        return ""
    middle, low, high = ratio
    if METRICS[metric].direction == "min":
        middle, low, high = 1 / middle, 1 / high, 1 / low
    return f"{middle:.2f}x [{low:.2f}, {high:.2f}]"


def differences(row: Row) -> str:
    """Return the differences of a variant's point from the compiler's defaults."""
    backend = (row.get("target_body") or {}).get("backend", LLVM_CPU)
    defaults = {k.name: k.default for k in knobs_of(backend)}
    point = row.get("point") or {}
    return " ".join(f"{k}={v}" for k, v in point.items() if defaults.get(k) != v) or "(compiler's defaults)"


TOLD_APART = ("model", "target", "workload")
"""Columns that are equal for the rows of one front; shown where they differ."""


def front_table(rows: Sequence[Row]) -> str:
    """Return the table of fronts: readings, and each variant's gain over the compiler's default.

    Rows of several models, targets or workloads have columns for them.
    """
    apart = [name for name in TOLD_APART if len({row.get(name) for row in rows}) > 1]
    figures = ["status", "tpot", "gain", "ttft", "gain", "kl", "top1", "weights", "memory", "load", "choices"]
    header = ["variant", *apart, *figures]
    lines = [[short(row["variant"]), *(str(row.get(name)) for name in apart), *_figures(row)] for row in rows]
    return table(
        header, lines, (*range(len(apart) + 2), len(header) - 1), terminal(), tuple(n + len(apart) for n in SPARE)
    )


def _figures(row: Row) -> list[str]:
    kl = row["quality_kl"]
    return [
        row["status"] + ("*" if row["default"] else ""),
        quantity(row["tpot_s"], "s"),
        gain(row, "tpot_s"),
        quantity(row["ttft_s"], "s"),
        gain(row, "ttft_s"),
        "-" if kl is None else ("0" if kl < 5e-7 else f"{kl:.2g}"),
        "-" if row["quality_top1"] is None else f"{row['quality_top1']:.1%}",
        quantity(row["parameter_bytes"], "B"),
        quantity(row["peak_memory_bytes"], "B"),
        quantity(row["load_s"], "s"),
        differences(row),
    ]


def footnotes(rows: Sequence[Row]) -> list[str]:
    """Return the notes to the values: why a value is absent, and what was noisy."""
    lines = ["* the compiler's default flags on the plain f32 export"]
    for name in ("quality", "energy", "baseline", "noise", "held back"):
        told = [str(notes[name]) for row in rows if name in (notes := row.get("notes") or {})]
        if not told:
            continue
        most = max(told, key=lambda text: (told.count(text), text))
        lines.append(f"{name}: {most}" + ("" if len(told) == len(rows) else f" ({len(told)} of {len(rows)} variants)"))
    return lines
