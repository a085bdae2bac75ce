"""Routers: which of the replicas that are ready gets a request."""

from __future__ import annotations

from llmbuild.fleet.simulate.replica import Job, Replica, Router
from llmbuild.spec.fleet import Fleet

SLACK = 0.5
"""Share of the time to the first token that may pass by the estimate."""
ROWS = 0.8
"""Share of the batch limit up to which replicas are filled one after another."""


def least_loaded(ready: list[Replica], job: Job, now: float) -> Replica:
    """Return the replica with the least to do, measured by what it takes."""
    kind = job.ask.kind
    return min(ready, key=lambda r: (r.load + 1) / (r.takes[kind] or 1e-9))


def by_slack(fleet: Fleet) -> Router:
    """Return a router that takes the busiest replica that still answers in time, so that others may rest.

    After PolyServe (arXiv 2507.17769): the most loaded server that meets the deadline; the batch limit bounds TPOT.
    """
    limits = {(s, c): kind.ttft_s for s, one in enumerate(fleet.services) for c, kind in enumerate(one.classes)}

    def choose(ready: list[Replica], job: Job, now: float) -> Replica:
        limit = SLACK * limits[job.ask.service, job.ask.kind]
        best, most = None, -1
        for replica in ready:
            load = replica.load
            if most < load < ROWS * replica.point.batch and replica.expected_ttft_s(job.ask.prompt, now) <= limit:
                best, most = replica, load
        return best or least_loaded(ready, job, now)

    return choose
