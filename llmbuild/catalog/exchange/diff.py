"""Differences of two catalogs: fronts, readings beyond noise, and different bytes of the same key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from llmbuild.digest import canonical, short
from llmbuild.spec.machine import NOWHERE
from llmbuild.spec.rows import Row, number
from llmbuild.spec.slo import METRICS
from llmbuild.spec.trial import FRONT

Group = tuple[str, str, str, str]
FAILING = ("regression", "gone", "bytes")
"""Kinds of change that `--fail-on-regression` fails on."""

NOISE = 0.05
"""Relative change below which a timed reading counts as unchanged."""

COMPARED = (
    "tpot_s",
    "ttft_s",
    "load_s",
    "energy_j_per_token",
    "peak_memory_bytes",
    "artifact_bytes",
    "parameter_bytes",
    "quality_kl",
    "quality_top1",
    "quality_perplexity",
)


@dataclass(frozen=True)
class Change:
    """One difference; `before` and `after` are medians for a metric, statuses for a standing."""

    kind: str
    model: str
    target: str
    workload: str
    variant: str
    what: str
    before: object
    after: object
    detail: str

    def row(self) -> dict[str, object]:
        """Return what the command prints."""
        return asdict(self)


@dataclass(frozen=True)
class Ruler:
    """Thresholds of a difference: `noise` is relative, `floors` are absolute and by metric."""

    noise: float = NOISE
    floors: Mapping[str, float] | None = None


def compare(before: Sequence[Row], after: Sequence[Row], ruler: Ruler) -> list[Change]:
    """Return what changed from one catalog's rows to another's, failures first.

    Variants are identified by model, target, machine, workload and choices, not by digest: another compiler makes
    another digest of the same choices.
    """
    old, new = _groups(before), _groups(after)
    found: list[Change] = []
    for group in sorted({*old, *new}):
        if group not in new:
            found.append(_change("gone", group, "", "the whole front", len(old[group]), 0, "not built any more"))
        elif group not in old:
            found.append(_change("new", group, "", "the whole front", 0, len(new[group]), "not built before"))
        else:
            found += _group(group, old[group], new[group], ruler)
    return sorted(found, key=lambda c: (c.kind not in FAILING, c.model, c.target, c.workload, c.kind, c.variant))


def bytes_changed(before: Mapping[str, str], after: Mapping[str, str]) -> list[Change]:
    """Return the compiles with the same key and different bytes: the key of one of them is incomplete."""
    return [
        Change("bytes", "", "", "", "", f"compile {short(key)}", short(before[key]), short(after[key]), "same inputs")
        for key in sorted({*before} & {*after})
        if before[key] != after[key]
    ]


def _groups(rows: Sequence[Row]) -> dict[Group, dict[str, Row]]:
    found: dict[Group, dict[str, Row]] = {}
    for row in rows:
        if row["machine_digest"] == NOWHERE:
            continue  # compiled only: there are no readings to compare
        group = (row["model"], row["target"], row["machine_digest"], row["workload"])
        found.setdefault(group, {})[canonical(row["point"])] = row
    return {group: points for group, points in found.items() if any(r["status"] in FRONT for r in points.values())}


def _group(group: Group, old: Mapping[str, Row], new: Mapping[str, Row], ruler: Ruler) -> Iterator[Change]:
    for point in sorted({*old, *new}):
        a, b = old.get(point), new.get(point)
        on_a, on_b = a is not None and a["status"] in FRONT, b is not None and b["status"] in FRONT
        if on_b and not on_a and b is not None:
            was = a["status"] if a else "not built"
            yield _change("new", group, b["variant"], "front point", was, b["status"], _choices(b))
        elif on_a and not on_b and a is not None:
            now = b["status"] if b else "not built"
            yield _change("lost", group, a["variant"], "front point", a["status"], now, (b or {}).get("reason") or "")
        elif a and b and on_a and a["status"] != b["status"]:
            yield _change("moved", group, b["variant"], "front point", a["status"], b["status"], b.get("reason") or "")
        if a and b and (on_a or a["default"]):
            yield from _readings(group, a, b, ruler)
    yield from _best(group, old, new, ruler)


def _readings(group: Group, a: Row, b: Row, ruler: Ruler) -> Iterator[Change]:
    for name in COMPARED:
        if a.get(name) is None or b.get(name) is None:
            continue
        verdict = _verdict(name, a, b, ruler)
        if verdict:
            moved = number(a, name), number(b, name)
            yield _change(verdict, group, b["variant"], name, *moved, _explanation(name, a, b))


def _best(group: Group, old: Mapping[str, Row], new: Mapping[str, Row], ruler: Ruler) -> Iterator[Change]:
    """Compare the best of each front: a lost point matters when no other is as good."""
    for name in COMPARED:
        a, b = _best_row(old, name), _best_row(new, name)
        if a is None or b is None:
            continue
        if canonical(a["point"]) != canonical(b["point"]) and _verdict(name, a, b, ruler) == "regression":
            moved = number(a, name), number(b, name)
            yield _change("regression", group, b["variant"], f"best {name}", *moved, _explanation(name, a, b))


def _best_row(rows: Mapping[str, Row], name: str) -> Row | None:
    sign = 1.0 if METRICS[name].direction == "min" else -1.0
    there = [r for r in rows.values() if r["status"] in FRONT and r.get(name) is not None]
    return min(there, key=lambda r: sign * number(r, name), default=None)


def _verdict(name: str, a: Row, b: Row, ruler: Ruler) -> str:
    """Return `regression` or `improvement` where the medians differ beyond noise and the intervals do not touch."""
    (a_low, a_high), (b_low, b_high) = _interval(a, name), _interval(b, name)
    noiseless = a_low == a_high and b_low == b_high
    was, now = number(a, name), number(b, name)
    floor = (ruler.floors or {}).get(name, 0.0)
    allowed = max(floor, 0.0 if noiseless else ruler.noise * abs(was))
    if abs(now - was) <= allowed or (a_low <= b_high and b_low <= a_high):
        return ""
    worse = (now > was) == (METRICS[name].direction == "min")
    return "regression" if worse else "improvement"


def _interval(row: Row, name: str) -> tuple[float, float]:
    low, high = (row.get("intervals") or {}).get(name) or (number(row, name),) * 2
    return float(low), float(high)


def _explanation(name: str, a: Row, b: Row) -> str:
    (a_low, a_high), (b_low, b_high) = _interval(a, name), _interval(b, name)
    was = number(a, name)
    factor = f"{number(b, name) / was:.3g}x" if was else "from 0"
    if a_low == a_high and b_low == b_high:
        return factor
    return f"{factor}, 95 % [{a_low:.3g}, {a_high:.3g}] then [{b_low:.3g}, {b_high:.3g}]"


def _choices(row: Row) -> str:
    return " ".join(f"{name}={value}" for name, value in row["point"].items())


def _change(kind: str, group: Group, variant: str, what: str, before: object, after: object, detail: str) -> Change:
    model, target, _, workload = group
    return Change(kind, model, target, workload, short(variant), what, before, after, detail)
