"""Whether there is room for a point's weights, before the first minute is spent on them."""

from __future__ import annotations

import shutil
from pathlib import Path

from llmbuild.build.job import Job
from llmbuild.build.price import Archive, archive_bytes, size
from llmbuild.process.child import memory_told
from llmbuild.spec.space import Point
from llmbuild.spec.variant import Failure
from llmbuild.system.resources import memory_limit

SPARE = 1 << 20
"""Bytes of an import beside its weights."""


def weights_bytes(job: Job, point: Point) -> int:
    """Return about how many bytes the weights of a point take; 0 for a model whose sizes are not known."""
    if job.facts is None:
        return 0
    return archive_bytes(job.facts, Archive.of(point.as_dict()))


def no_memory(job: Job, point: Point) -> Failure | None:
    """Return why this host cannot measure a point: its weights do not fit into the memory that there is."""
    bound = memory_limit()
    if bound is None or job.remote is not None or not job.target.is_cpu:
        return None
    needed = weights_bytes(job, point)
    if needed <= bound.bytes:
        return None
    reason = f"its weights take {size(needed)}, and {memory_told()}: it is not imported"
    return Failure("import", reason, "", "", lasting=True)


def no_disk(job: Job, point: Point, folder: Path) -> Failure | None:
    """Return why a point cannot be imported: its weights do not fit on the catalog's disk."""
    needed, free = weights_bytes(job, point) + SPARE, shutil.disk_usage(folder).free
    if needed <= free:
        return None
    reason = f"its weights take {size(needed)}, and the disk of {folder} has {size(free)} left: free some, then go on"
    return Failure("import", reason, "", "", lasting=False)
