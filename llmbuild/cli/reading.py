"""The read-only commands without parsing and printing: a request in, plain rows or a text out."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmbuild.cli.requests import LoadRequest, PickRequest, QueryRequest, Trust
from llmbuild.digest import plain
from llmbuild.errors import InputError
from llmbuild.report.rows import public
from llmbuild.runtime import reader
from llmbuild.spec.pick import Pick
from llmbuild.spec.rows import Row
from llmbuild.spec.slo import order, parse_load, parse_slo
from llmbuild.spec.target import HOST, target_from
from llmbuild.system.strict_json import dumps

if TYPE_CHECKING:
    from llmbuild.serve.pick_load import LoadPick


def query(request: QueryRequest) -> list[Row]:
    """Return the rows that meet an SLO, the best first."""
    asked = request.selection
    slo = parse_slo(asked.slo, asked.objective)
    rows = reader.variants(request.catalog, request.model, asked.target, asked.workload, request.everything, slo)
    return sorted(rows, key=order(slo.objective))


def named(request: QueryRequest) -> tuple[Path, dict[str, str | None], bool]:
    """Return the catalog of a query, the columns of its bounds, and whether all rows were requested."""
    asked = request.selection
    return (
        request.catalog,
        {"model": request.model, "target": asked.target, "workload": asked.workload},
        request.everything,
    )


def pick(request: PickRequest) -> Pick:
    """Return the variant that a loader would open, and pin it where a lock is requested.

    Raises:
        NoVariant: none meets the SLO.
    """
    from llmbuild.cli.cpus import facts_of
    from llmbuild.runtime import trust
    from llmbuild.runtime.lock import write
    from llmbuild.runtime.model import pick as choose

    asked = request.selection
    trust.require(request.catalog, trust.policy(request.trust.keys, request.trust.allow_unsigned))
    facts = facts_of(request.cpu) if request.cpu else None
    made = choose(request.catalog, request.model, asked.slo, asked.objective, asked.target, asked.workload, facts)
    if request.lock is not None:
        write(made, request.lock)
    return made


def of_load(bounds: Sequence[str]) -> bool:
    """Return whether a bound is of requests under load."""
    return bool(parse_load(bounds)[0])


def pick_load(request: LoadRequest, trusted: Trust) -> LoadPick:
    """Return the variant that holds bounds on requests at a rate.

    Raises:
        NoVariant: none does, or nothing is known of it.
    """
    from llmbuild.runtime import trust
    from llmbuild.serve import pick_load as loads
    from llmbuild.serve.capacity import parse_lengths, parse_rate

    asked = request.selection
    trust.require(request.catalog, trust.policy(trusted.keys, trusted.allow_unsigned))
    bounds, rest = parse_load(asked.slo)
    wanted = loads.Wanted(
        bounds,
        parse_rate(request.rate) if request.rate else None,
        parse_lengths(request.lengths),
        request.sequences,
        request.scheduler,
        request.memory_bytes,
    )
    catalog, model = request.catalog, request.model
    return loads.pick_load(catalog, model, rest, asked.objective, wanted, asked.target, asked.workload)


def public_load(made: LoadPick) -> dict[str, object]:
    """Return the columns of the contract, and what requests see."""
    best, seen = made.capacity, made.seen
    load = {
        "rate_per_s": seen.rate,
        "highest_rate_per_s": best.rate,
        "sure_rate_per_s": best.sure,
        "scheduler": best.server.name,
        "sequences": best.server.host.slots,
        "prompt_tokens": best.lengths.prompt,
        "output_tokens": best.lengths.output,
        **seen.values,
        "load_output_tokens_per_s": seen.output_tokens_per_s,
        "load_curve": best.server.curve.key,
        "load_error_p95": best.server.curve.error_p95,
        "outside": seen.outside,
    }
    return {**public(made.row), **load}


def explain(prefix: str, catalog: Path, as_json: bool) -> str:
    """Return the report on a variant."""
    from llmbuild.build.compiling import written
    from llmbuild.report.explain import explain as explain_text
    from llmbuild.report.loads import lines as load_lines

    rows = reader.find_variant(catalog, prefix)
    curves = reader.load_curves(catalog, [rows[0]["variant"]])
    command, by_hand = _compile_line(catalog, rows[0]), written(target_from(rows[0]["target_body"]), rows[0]["point"])
    if as_json:
        more = {"compile": command, "written": by_hand, "load_curves": [plain(curve) for curve in curves]}
        return dumps([{**public(r), "program": r["program"], "parameters": r["parameters"], **more} for r in rows])
    told = [explain_text(rows, command, by_hand), *(line for curve in curves for line in load_lines(curve))]
    return "\n".join(told)


def _compile_line(catalog: Path, row: Row) -> str:
    """Return the command that compiles a variant again from the blobs of its catalog."""
    from llmbuild.compiler import iree

    if not row["program"]:
        return ""
    with reader.opened(catalog) as connection:
        module = connection.execute("SELECT module FROM program WHERE digest = ?", (row["program"],)).fetchone()[0]
    target = target_from(row["target_body"])
    tool = "iree-compile" if iree.compiler_version() == "absent" else ""  # printing the command needs no compiler
    command = iree.compile_command(reader.blob_path(catalog, module), Path("out.vmfb"), target, row["point"], tool)
    return shlex.join(command)


def targets(names: Sequence[str], catalog: Path, probed: bool) -> list[dict[str, object]]:
    """Return every target, or those that are named, and whether each compiles and runs here."""
    from llmbuild.build.jobs import answers_of
    from llmbuild.build.request import BuildRequest
    from llmbuild.build.targets import file_targets, find_target
    from llmbuild.report.targets import rows as target_rows

    chosen = [find_target(name) for name in names] or [find_target(HOST), *file_targets()]
    return target_rows(chosen, answers_of(BuildRequest(catalog=catalog)), probed)


def knobs(names: Sequence[str]) -> list[dict[str, object]]:
    """Return the knobs of the search space, then the options left out of it; those of one target, if named."""
    from llmbuild.build.targets import find_target
    from llmbuild.report.knobs import knob_rows

    if len(names) > 1:
        raise InputError("--knobs lists all knobs, or with one -t those of that target")
    return knob_rows(find_target(names[0]) if names else None)


def doctor(catalog: Path) -> list[dict[str, object]]:
    """Return the checks, their results, and instructions."""
    from llmbuild.report.doctor import checks

    return checks(catalog)
