"""`pull` without parsing and printing; it needs only the loader's libraries."""

from __future__ import annotations

from llmbuild.catalog.exchange import pull
from llmbuild.cli.output import Report
from llmbuild.cli.requests import PullRequest
from llmbuild.runtime.trust import Policy
from llmbuild.spec.rows import cells
from llmbuild.spec.slo import parse_slo


def fetch(request: PullRequest, rule: Policy, tell: pull.Tell) -> Report:
    """Pull the variants that an SLO picks on this host, or everything."""
    asked = request.selection
    slo = parse_slo(asked.slo, asked.objective)
    wanted = pull.Wanted(slo, request.models, asked.target, asked.workload, request.everything)
    done = pull.pull(request.source, request.catalog, wanted, rule, tell)
    rows: list[dict[str, object]] = [
        cells(row, ("model", "variant", "target", "workload", wanted.slo.objective, "artifact")) for row in done.rows
    ]
    signed = f"signed by {done.signed_by}" if done.signed_by else "no signature was asked for"
    told = f"{done.fetched_bytes / 1e6:.1f} MB fetched, {done.left_bytes / 1e6:.1f} MB not needed here; {signed}"
    return Report(rows, told, True)
