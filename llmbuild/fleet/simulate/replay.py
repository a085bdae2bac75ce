"""One replica under requests: what each of them would see, without a fleet, a router or a policy."""

from __future__ import annotations

import math
from collections.abc import Iterable

from llmbuild.fleet.capacity import OperatingPoint
from llmbuild.fleet.simulate.meter import Meter
from llmbuild.fleet.simulate.replica import QUEUE, Job, Replica
from llmbuild.fleet.simulate.trace import Asked
from llmbuild.serve.schedule.state import Scheduler


def replay(point: OperatingPoint, requests: Iterable[Asked], scheduler: Scheduler) -> list[Job]:
    """Return the jobs of requests, which are in the order of their arrival, after all of them have ended.

    As in a fleet a request is rejected where the queue is full, or where it never fits into the memory.
    """
    replica = Replica(point, 0, (1.0,), scheduler, Meter())
    replica.ready(0.0)
    jobs = list[Job]()
    for ask in requests:
        _until(replica, ask.at_s)
        job = Job(ask)
        jobs.append(job)
        if len(replica.waiting) >= QUEUE or job.takes > replica.kv_tokens:
            job.ended = "rejected"
            continue
        replica.take(job, ask.at_s)
        replica.start(ask.at_s)
    _until(replica, math.inf)
    return jobs


def _until(replica: Replica, now: float) -> None:
    """Run the steps that end up to a time."""
    while replica.end_s < math.inf and replica.end_s <= now:
        at_s = replica.end_s
        replica.finish()
        replica.start(at_s)
