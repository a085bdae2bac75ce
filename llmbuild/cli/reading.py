"""The read-only commands without parsing and printing: a request in, plain rows or a text out."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from llmbuild.cli.requests import PickRequest, QueryRequest
from llmbuild.errors import InputError
from llmbuild.report.rows import public
from llmbuild.runtime import reader
from llmbuild.spec.pick import Pick
from llmbuild.spec.rows import Row
from llmbuild.spec.slo import order, parse_slo
from llmbuild.spec.target import HOST, target_from
from llmbuild.system.strict_json import dumps


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


def explain(prefix: str, catalog: Path, as_json: bool) -> str:
    """Return the report on a variant."""
    from llmbuild.build.compiling import written
    from llmbuild.report.explain import explain as explain_text

    rows = reader.find_variant(catalog, prefix)
    command, by_hand = _compile_line(catalog, rows[0]), written(target_from(rows[0]["target_body"]), rows[0]["point"])
    if as_json:
        more = {"compile": command, "written": by_hand}
        return dumps([{**public(r), "program": r["program"], "parameters": r["parameters"], **more} for r in rows])
    return explain_text(rows, command, by_hand)


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
