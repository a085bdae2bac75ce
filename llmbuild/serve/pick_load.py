"""Pick a variant, and how to serve it, by what requests at a rate would see: from load curves of this machine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmbuild.digest import short
from llmbuild.errors import NoVariant, UnknownLoad
from llmbuild.runtime import host, reader
from llmbuild.runtime import model as loader
from llmbuild.runtime.choose import HostFacts
from llmbuild.serve import budget
from llmbuild.serve.capacity import Capacity, Lengths, Outcome, Server, capacity, outcome, roughly
from llmbuild.serve.schedule.named import FAIR_BATCHING, FCFS, SARATHI, Targets, scheduler
from llmbuild.serve.simulate import Host
from llmbuild.spec.load_curve import LoadCurve, taken_on
from llmbuild.spec.program import Abi, abi_from
from llmbuild.spec.rows import Row, present
from llmbuild.spec.slo import Bound, Slo, load_metric, order, parse_slo

LIMITS = (4, 8, 16, 32, 64, 128)
"""Numbers of sequences at a time that are tried."""


@dataclass(frozen=True)
class Wanted:
    """What is asked of requests: bounds, the rate if one must be held, and their lengths.

    `sequences` and `scheduler` are given, or None where they are to be chosen.
    """

    bounds: tuple[Bound, ...]
    rate: float | None = None
    lengths: Lengths = Lengths()  # noqa: RUF009 - frozen
    sequences: int | None = None
    scheduler: str | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True)
class LoadPick:
    """The chosen variant, what it holds, and what the others hold, the best first."""

    row: Row
    capacity: Capacity
    seen: Outcome
    """What requests see, at the rate that must be held, or else at the highest."""
    others: tuple[tuple[Row, Capacity], ...]
    unknown: tuple[Row, ...]
    """Variants that meet the other bounds and have no load curve of this machine."""

    def explain(self) -> str:
        """Return what is held and by what, in lines."""
        best = self.capacity
        bounds = ", ".join(map(str, best.bounds)) or "a queue that does not grow"
        lines = [
            f"asked: {bounds}, for {best.lengths}",
            f"chosen   {_held(self.row, best)}",
            *(f"rejected {_held(row, one)}" for row, one in self.others),
            *(f"unknown  {short(row['variant'])} has no load curve of this machine" for row in self.unknown),
        ]
        curve, seen = best.server.curve, self.seen
        lines.append(
            f"simulated over the load curve (error p95 {curve.error_p95:.1%}), {_without(curve)} shared prompts"
        )
        if curve.doubt:
            lines.append(f"the curve is doubtful: {curve.doubt}: `llmbuild profile --load` measures it again")
        if seen.rate != best.rate:
            told = ", ".join(f"{name} {seen.values[name]:.3g}" for name in sorted(seen.values))
            lines.append(f"at {seen.rate:g}/s: {told}, {seen.sequences:.1f} sequences in a step")
        if seen.outside:
            lines.append(f"{seen.outside:.1%} of the steps are larger than those that were measured")
        return "\n".join(lines)


def _without(curve: LoadCurve) -> str:
    return "without HTTP and" if curve.served is None else "with HTTP, without"


def _held(row: Row, found: Capacity) -> str:
    name = f"{short(row['variant'])} {found.server.name} with up to {found.server.host.slots} at a time"
    if found.outcome is None:
        return f"{name}: holds no rate"
    seen = found.outcome
    told = ", ".join(f"{metric} {seen.values[metric]:.3g}" for metric in ("ttft_s_p99", "tpot_s_p99"))
    sure = f"at least {found.sure:.3g}/s with the curve's error"
    return f"{name}: holds {found.rate:.3g}/s ({sure}); then {told}, {seen.output_tokens_per_s:.0f} tokens/s"


def pick_load(
    catalog: Path,
    model: str | None,
    slo: Sequence[str],
    objective: str | None,
    wanted: Wanted,
    target: str | None = None,
    workload: str | None = None,
    facts: HostFacts | None = None,
) -> LoadPick:
    """Return the variant that holds the highest rate, or of those that hold `wanted.rate` the best in the objective.

    Raises:
        NoVariant: none meets the bounds, or none holds the rate.
        UnknownLoad: none has a load curve of this machine.
    """
    facts = facts or loader.host_facts()
    asked = parse_slo(list(slo), objective)
    accepted = _accepted(catalog, model, asked, target, workload, facts)
    model = str(next(iter(accepted.values()))["model"])
    known = [one for one in reader.load_curves(catalog, list(accepted)) if one.machine == facts.machine]
    taken = {name: _taken_here(one for one in known if one.variant == name) for name in accepted}
    curves = {name: one for name, one in taken.items() if one is not None}
    unknown = tuple(row for name, row in accepted.items() if name not in curves)
    if not curves:
        first = short(next(iter(accepted)))
        told = f"no load curve of {model} on this machine, so what it holds under load is not known"
        raise UnknownLoad(f"{told}: `llmbuild profile {first} --load` measures one")
    found = [(row, _best(row, curves[name], wanted)) for name, row in accepted.items() if name in curves]
    found.sort(key=lambda one: -one[1].rate)
    holds = [one for one in found if one[1].rate >= (wanted.rate or 1e-12)]
    if not holds:
        row, best = found[0]
        rate = "no rate at all" if not best.rate else f"{best.rate:.3g}/s"
        asked_for = f"{wanted.rate:g}/s" if wanted.rate else ", ".join(map(str, wanted.bounds))
        raise NoVariant(
            f"no variant of {model} holds {asked_for} here: the nearest, {short(row['variant'])}, holds {rate} "
            f"for {wanted.lengths}"
        )
    if objective is not None and wanted.rate:
        by = order(asked.objective)
        holds.sort(key=lambda one: by(one[0]))
    row, best = holds[0]
    seen = outcome(best.server, wanted.rate, wanted.lengths, wanted.bounds) if wanted.rate else present(best.outcome)
    return LoadPick(row, best, seen, tuple(one for one in found if one[0] is not row), unknown)


def _accepted(
    catalog: Path, model: str | None, slo: Slo, target: str | None, workload: str | None, facts: HostFacts
) -> dict[str, Row]:
    """Return a whole row of each variant that may be opened here and meets the bounds that are not of load.

    Raises:
        NoVariant, InputError: there are none, as a plain pick says it.
    """
    first = loader.pick(catalog, model, [str(b) for b in slo.bounds], slo.objective, target, workload, facts)
    names = [present(first.chosen)["variant"], *(one.row["variant"] for one in first.candidates if one.accepted)]
    found: dict[str, Row] = {}
    for name in dict.fromkeys(names):
        rows = reader.find_variant(catalog, name)
        found[name] = next((row for row in rows if row["machine_digest"] == facts.machine), rows[0])
    served = {name: row for name, row in found.items() if abi_from(present(row["abi"])).batch == 1}
    if not served:
        raise NoVariant("every variant that meets the SLO answers several sequences in each call: none is served")
    return served


def curve_here(catalog: Path, variant: str) -> LoadCurve | None:
    """Return the load curve of a variant on this machine."""
    machine = loader.host_facts().machine
    return _taken_here(one for one in reader.load_curves(catalog, [variant]) if one.machine == machine)


def _taken_here(curves: Iterable[LoadCurve]) -> LoadCurve | None:
    """Return the curve of the cores that this process is held on, else that of the machine."""
    cores = host.cores()
    return taken_on(curves, cores if cores < host.machine_cores() else 0)


def targets_of(bounds: Sequence[Bound]) -> Targets | None:
    """Return the deadlines that bounds on requests ask for; None where they bound not both of TTFT and TPOT."""
    by_base = {load_metric(bound.metric).base: bound.limit for bound in bounds}
    if not {"ttft_s", "tpot_s"} <= by_base.keys():
        return None
    return Targets(by_base["ttft_s"], by_base["tpot_s"])


def _best(row: Row, curve: LoadCurve, wanted: Wanted) -> Capacity:
    """Return the settings that hold the highest rate: the scheduler, and the number of sequences at a time."""
    abi = abi_from(present(row["abi"]))
    names = [wanted.scheduler] if wanted.scheduler else _names(curve, wanted)
    servers = [_server(row, abi, curve, name, limit, wanted) for limit in _limits(curve, wanted) for name in names]
    best = servers[0]
    if len(servers) > 1:
        best = max(servers, key=lambda one: roughly(one, wanted.lengths, wanted.bounds))
    return capacity(best, wanted.lengths, wanted.bounds)


def _limits(curve: LoadCurve, wanted: Wanted) -> list[int]:
    if wanted.sequences is not None:
        return [wanted.sequences]
    most = curve.decodes_most
    return [*(limit for limit in LIMITS if most // 4 <= limit < most), most]


def _names(curve: LoadCurve, wanted: Wanted) -> list[str]:
    """Return the schedulers that are tried: prompts are cut where that is known to change no bit."""
    if not curve.fit.shared:
        return [FCFS]
    return [FCFS, SARATHI, *([FAIR_BATCHING] if targets_of(wanted.bounds) else [])]


def _server(row: Row, abi: Abi, curve: LoadCurve, name: str, limit: int, wanted: Wanted) -> Server:
    need = budget.need(str(row["model"]), row, abi, limit)
    (contexts,) = budget.sequences([need], budget.memory(wanted.memory_bytes), [limit])
    host = host_of(abi, limit, contexts)
    cut = int(curve.fit.shared)
    return Server(curve, host, scheduler(name, cut, str(row["model"]), curve, targets_of(wanted.bounds)), name)


def host_of(abi: Abi, limit: int, contexts: int) -> Host:
    """Return what a server of a variant has, with memory for so many contexts."""
    if not abi.page:
        return Host(contexts, contexts, abi.context, abi.context)
    return Host(limit, contexts * -(-abi.context // abi.page), abi.page, abi.context)
