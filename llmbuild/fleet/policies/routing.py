"""Routers: which of the replicas that are ready gets a request."""

from __future__ import annotations

from llmbuild.fleet.simulate.replica import Job, Replica


def least_loaded(ready: list[Replica], job: Job, now: float) -> Replica:
    """Return the replica with the least to do, measured by what it takes."""
    kind = job.ask.kind
    return min(ready, key=lambda r: (r.load + 1) / (r.takes[kind] or 1e-9))
