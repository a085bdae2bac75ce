"""Pick a variant: a pure function of rows, host facts and an SLO; every other row gets the reason for its rejection."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from llmbuild import digest
from llmbuild.spec.machine import NOWHERE
from llmbuild.spec.pick import Candidate, Pick
from llmbuild.spec.rows import Row, number, reading
from llmbuild.spec.slo import METRICS, Slo, absence, measured
from llmbuild.spec.target import BACKENDS, LLVM_CPU
from llmbuild.spec.trial import FRONT
from llmbuild.system.strict_json import JsonObject


@dataclass(frozen=True)
class HostFacts:
    """The host's facts that decide whether an artifact may be opened on it."""

    arch: str
    features: frozenset[str]
    runtime: str
    memory_bytes: int | None
    machine: str
    """Fingerprint: rows measured on this machine are preferred to all others."""
    device_lacks: Callable[[str, Collection[str]], str] = lambda driver, _: f"no {driver} device is known of it"
    """Returns why the host has no device of an IREE GPU driver with a target's required features; empty where it has
    one. Called only where a row is for a GPU."""


UNMEASURED = "never measured: `llmbuild profile` on this host does"
"""The note on a row that was compiled for a host like this and never ran on one."""

_MEND = "`llmbuild build RECIPE` here makes one that fits"


def refusal(row: Row, host: HostFacts) -> str:
    """Return why `row` must not be opened on `host`, in the order of the loader's checks; empty if it may be."""
    if not row.get("artifact"):
        return row.get("reason") or "has no artifact"
    runtime = row.get("runtime")
    if not runtime:
        return "names an artifact that the catalog does not describe: `llmbuild verify` says what is damaged"
    if not same_minor(runtime, host.runtime):
        need = minor(runtime)
        return f"needs IREE runtime {need}, installed is {host.runtime}: pip install 'iree-base-runtime~={need}.0'"
    why = _unfit(row["target_body"], host)
    if why:
        return f"{why}: {_MEND}"
    peak = row.get("peak_memory_bytes")
    if peak and host.memory_bytes is not None and peak > host.memory_bytes:
        return f"needs {peak / 1e6:.0f} MB of memory, {host.memory_bytes / 1e6:.0f} MB are available"
    return ""


def _unfit(target: JsonObject, host: HostFacts) -> str:
    """Return what a target requires and the host lacks.

    A GPU's driver checks its own architecture. Here only a target's `requires` is checked, which no driver checks.
    """
    kind = BACKENDS.get(target.get("backend", LLVM_CPU), BACKENDS[LLVM_CPU])
    if kind is not BACKENDS[LLVM_CPU]:
        lacks = host.device_lacks(kind.device, target["requires"])
        return f"is for {target['backend']}, and this host has none that runs it: {lacks}" if lacks else ""
    if target["arch"] != host.arch:
        return f"is for {target['arch']}, this host is {host.arch}"
    missing = sorted(set(target["requires"]) - host.features)
    return f"needs CPU features this host lacks: {' '.join(missing)}" if missing else ""


def choose(rows: Sequence[Row], host: HostFacts, slo: Slo, absent: Callable[[Row], str] | None = None) -> Pick:
    """Return the pick: the row that runs here, meets every bound and is best in the objective.

    Of rows that meet an SLO without a word on quality, those as good as the model are considered, if there are any.
    Where rows measured on this machine can be opened, rows of other machines are not considered: readings do not
    compare across machines. Otherwise `ladder` ranks the rows of other machines and the unmeasured ones. `absent`
    returns why a row's files are missing; empty where they are present.
    """
    runnable = [(row, refusal(row, host) or (absent(row) if absent else "")) for row in rows]
    here = any(not why and row["machine_digest"] == host.machine for row, why in runnable)
    candidates: list[Candidate] = []
    usable: list[Row] = []
    for row, why in runnable:
        if not why and here and row["machine_digest"] != host.machine:
            why = f"was measured on another machine ({row['machine']})" if is_measured(row) else UNMEASURED
        if not why and row["status"] not in FRONT:
            why = f"is {row['status']}" + (f": {row['reason']}" if row.get("reason") else "")
        if not why:
            usable.append(row)
            why = _missed(row, slo)
        candidates.append(Candidate(row, not why, why))
    candidates = _as_good(candidates, slo)
    accepted = ladder([c.row for c in candidates if c.accepted], slo)
    chosen = accepted[0] if accepted else None
    nearest = None if chosen else min(usable, key=slo.distance, default=None)
    done = tuple(_with_reason(c, chosen, slo, here) for c in candidates)
    return Pick(slo, chosen, done, nearest, slo.distance(nearest) if nearest else math.inf, tuple(accepted[1:]))


def _as_good(candidates: list[Candidate], slo: Slo) -> list[Candidate]:
    """Return the candidates without the accepted ones that are worse than the model, if others are as good as it."""
    wanted = slo.preferred
    worse = {id(c): why for c in candidates if c.accepted and (why := _missed(c.row, wanted)) and is_measured(c.row)}
    if not any(c.accepted and is_measured(c.row) and id(c) not in worse for c in candidates):
        return candidates
    told = "others are as good as the model: {}; an SLO that bounds quality decides instead"
    return [replace(c, accepted=False, reason=told.format(worse[id(c)])) if id(c) in worse else c for c in candidates]


def is_measured(row: Row) -> bool:
    """Return whether a row has readings of any machine."""
    return bool(row["machine_digest"] != NOWHERE)


def tier(row: Row) -> int:
    """Return the rank of a row's target: a target that requires more CPU features ranks higher."""
    return len(row["target_body"]["requires"])


def _missed(row: Row, slo: Slo) -> str:
    """Return the bounds of an SLO that a row misses; an unmeasured objective does not exclude an unmeasured row."""
    why = "; ".join(slo.misses(row))
    if why and not is_measured(row):
        return f"{why}; {UNMEASURED}"
    if not why and is_measured(row) and measured(row, slo.objective) is None:
        return f"{slo.objective} is {absence(row, slo.objective)}"
    return why


def ladder(rows: Sequence[Row], slo: Slo) -> list[Row]:
    """Return the rows that may be opened here and meet the bounds, the best first.

    Rows of one machine are ranked by their readings. Readings of several machines do not compare: the machine whose
    best row has the highest tier goes first. An unmeasured row goes to the front if its choices are those of the best
    row and its tier is higher, else to the end, the higher tier first.
    """
    by_machine: dict[str, list[Row]] = {}
    for row in sorted((r for r in rows if is_measured(r)), key=lambda r: _rank(r, slo)):
        by_machine.setdefault(row["machine_digest"], []).append(row)
    groups = sorted(by_machine.values(), key=lambda found: (-tier(found[0]), _rank(found[0], slo)))
    read = [row for found in groups for row in found]
    unread = sorted((r for r in rows if not is_measured(r)), key=_unread_rank)
    best = read[0] if read else None
    above = [r for r in unread if best and _choices(r) == _choices(best) and tier(r) > tier(best)]
    return [*above, *read, *(r for r in unread if r not in above)]


def _choices(row: Row) -> object:
    stored = row.get("choices")
    return json.loads(stored) if isinstance(stored, str) else stored or row.get("point")


def _unread_rank(row: Row) -> tuple[int, bool, float, str]:
    """Sort by tier; without readings for another choice, the compiler's defaults go first."""
    return (-tier(row), not row.get("default"), float(row.get("parameter_bytes") or math.inf), str(row["variant"]))


def nothing_chosen(made: Pick, slo: Slo, model: str) -> str:
    """Return why nothing was chosen: the nearest row and what it misses, or why no row can be used here."""
    bounds = ", ".join(str(b) for b in slo.bounds)
    if made.nearest is None:
        reasons = sorted({c.reason for c in made.candidates})
        return f"no variant of {model} can be used on this host: {'; '.join(reasons[:3])}"
    near = made.nearest
    missed = _missed(near, slo) or f"{slo.objective} is absent"
    return (
        f"no variant of {model} meets {bounds or slo.objective}; the nearest is {digest.short(near['variant'])}: "
        f"{missed} (distance {made.distance:.3g})"
    )


def _rank(row: Row, slo: Slo) -> tuple[float, float, float, str]:
    """Sort by the objective; ties go to less memory, then to the smaller artifact, then to the name."""
    sign = 1.0 if METRICS[slo.objective].direction == "min" else -1.0
    return (
        sign * float(number(row, slo.objective)),
        float(row.get("peak_memory_bytes") or math.inf),
        float(row.get("artifact_bytes") or math.inf),
        str(row["variant"]),
    )


def _with_reason(candidate: Candidate, chosen: Row | None, slo: Slo, here: bool) -> Candidate:
    """Return an accepted candidate with why it was not chosen, or the grounds of a choice without readings here."""
    row = candidate.row
    if not candidate.accepted or chosen is None or (row is chosen and here):
        return candidate
    mine, best = reading(row, slo.objective), reading(chosen, slo.objective)
    if row is chosen:
        why = f"read on another machine ({row['machine']})" if is_measured(row) else f"the highest tier; {UNMEASURED}"
    elif not is_measured(row):
        why = f"meets the SLO, but {UNMEASURED}"
    elif not is_measured(chosen):
        why = "meets the SLO, but the chosen one has the same choices for a higher tier"
    elif row["machine_digest"] != chosen["machine_digest"]:
        why = f"meets the SLO, but was read on another machine ({row['machine']}), for no higher tier"
    else:
        why = f"meets the SLO, but {slo.objective} is {mine:.4g} against {best:.4g}"
    return Candidate(row, True, why)


def minor(text: str) -> str:
    """Return `3.13` of `3.13.0`: IREE's bytecode and HAL modules require the same minor version."""
    return ".".join(text.split(".")[:2])


def same_minor(a: str, b: str) -> bool:
    """Return whether two IREE versions can read each other's artifacts."""
    return minor(a) == minor(b)
