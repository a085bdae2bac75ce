"""Load curves as rows, and as lines of a report on a variant."""

from __future__ import annotations

from collections.abc import Sequence

from llmbuild.digest import plain, short
from llmbuild.report.rows import quantity
from llmbuild.spec.load_curve import LoadCurve, Work, row_of

SHOWN = (
    "variant driver workers context decodes_most prompt_most decode_s decodes_s prompt_s decode_j error_p95 held_out"
).split()
"""Columns of the table."""


def rows(curves: Sequence[LoadCurve]) -> list[dict[str, object]]:
    """Return a row for each curve."""
    return [{name: row_of(curve)[name] for name in SHOWN} for curve in curves]


def public(curve: LoadCurve) -> dict[str, object]:
    """Return a curve as JSON shows it."""
    shown: dict[str, object] = plain(curve)
    return shown


def lines(curve: LoadCurve) -> list[str]:
    """Return a curve in a report: its settings, its error, and some steps."""
    middle = curve.context // 2
    told = [
        "",
        f"load curve {short(curve.key)} (driver={curve.driver} workers={curve.workers}): error p95 "
        f"{curve.error_p95:.1%} on {curve.held_out} steps that were not fitted, {curve.notes.get('rounds')} rounds",
        f"  a step in {'one call' if curve.fit.shared else 'a call for each sequence'}, {middle} tokens before:",
    ]
    counts = [count for count in (1, 2, 4, 8, 16, 32, 64, 128) if count <= curve.decodes_most]
    told += [_line(curve, f"{n} sequences decode", [(middle, 1)] * n, n) for n in counts]
    prompts = [count for count in (32, 128, 512) if count <= curve.prompt_most]
    told += [_line(curve, f"{n} tokens of a prompt", [(0, n)], n) for n in prompts]
    told.append(f"  the engine's own time: {quantity(curve.turn_s, 's')} + {quantity(curve.row_s, 's')} a sequence")
    if (own := curve.served) is not None:
        each = f"{quantity(own.step_s, 's')} + {quantity(own.row_s, 's')} a sequence"
        told.append(f"  with HTTP, seen by a client: {each}, {quantity(own.request_s + own.end_s, 's')} a request")
        told += [f"  in a server {own.speeds}"] if own.speeds else []
    return [*told, *(f"  note {name}: {text}" for name, text in curve.notes.items() if name != "rounds")]


def _line(curve: LoadCurve, name: str, pieces: Sequence[tuple[int, int]], tokens: int) -> str:
    work = Work.of(pieces)
    seconds, joules = curve.fit.seconds(work), curve.joules(work)
    energy = "" if joules is None else f"  {joules / tokens:.3g} J/token ({curve.energy_source})"
    return f"    {name:<22} {quantity(seconds, 's'):>10}  {tokens / seconds:7.0f} tokens/s{energy}"
