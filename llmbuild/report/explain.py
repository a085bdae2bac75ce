"""A report on one variant: its point, its build, its readings, and why it has its standing."""

from __future__ import annotations

from collections.abc import Mapping

from llmbuild.report.rows import differences, gain, quantity
from llmbuild.spec.rows import Row, number
from llmbuild.spec.slo import ENERGY, METRICS
from llmbuild.system.strict_json import JsonObject
from llmbuild.system.terminal import cell


def explain(rows: list[Row], command: str, written: Mapping[str, object]) -> str:
    """Return the report on a variant.

    `rows` are its standings; `command` compiles it again, without the parts that are `written` into its dispatches
    between phases of a compile.
    """
    first = rows[0]
    lines = [
        f"variant    {first['variant']}",
        f"model      {first['model']}",
        f"target     {first['target']} ({first['target_body']['cpu']})",
        f"needs      {' '.join(first['target_body']['requires'])}",
        f"machine    {first['machine']}",
        f"toolchain  {first['toolchain']}",
        f"artifact   {first['artifact'] or 'none'}",
        f"program    {first['program'] or 'none'}",
        f"parameters {first['parameters'] or 'none'}",
        f"choices    {differences(first)}",
        f"point      {' '.join(f'{k}={v}' for k, v in first['point'].items())}",
        f"compile    {command or 'not known: it was never compiled'}",
    ]
    if command and written:
        told = " ".join(f"{name}={value}" for name, value in written.items())
        lines.append(
            f"less       {told}: `llmbuild compile` writes it into the code half-way; the command alone does not"
        )
    for row in rows:
        lines += ["", f"workload {row['workload']}: {row['status']}" + (f" ({row['reason']})" if row["reason"] else "")]
        lines += [_metric_line(row, name) for name in METRICS if row.get(name) is not None]
        lines += _operator_lines(row.get("operators") or [])
        lines += [f"  note {name}: {text}" for name, text in (row["notes"] or {}).items()]
    return "\n".join(map(cell, lines))


def _metric_line(row: Row, name: str) -> str:
    unit = METRICS[name].unit
    low, high = (row.get("intervals") or {}).get(name, (None, None))
    interval = f"  95 % [{quantity(low, unit)}, {quantity(high, unit)}]" if low != high else ""
    better = gain(row, name)
    against = f"  {better} over the default" if better else ""
    found, of = quantity(number(row, name), unit), _boundary(row) if name == ENERGY else ""
    return f"  {name:<20} {found:>10}{interval}{against}{of}"


def _boundary(row: Row) -> str:
    """Return the components whose joules are measured, and the source."""
    facts = row.get("energy") or {}
    told = [f"{row.get('energy_source') or 'no source'} of the {facts.get('boundary', 'device')}"]
    return f"  ({', '.join([*told, *(str(facts[n]) for n in ('memory',) if n in facts)])})"


def _operator_lines(operators: list[JsonObject]) -> list[str]:
    """Return the time of a decode step by operator, on one thread."""
    if not operators:
        return []
    total = sum(o["seconds"] for o in operators)
    lines = [f"  a decode step by operator ({len(operators)} costliest kinds, one thread, {total * 1e3:.3g} ms):"]
    for o in operators:
        lines.append(f"    {o['seconds'] / total:6.1%} {o['seconds'] * 1e6:9.1f} us {o['calls']:4d} calls  {o['name']}")
    return lines
