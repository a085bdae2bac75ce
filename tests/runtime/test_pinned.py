"""Worker threads of a process that is pinned to some cores stay on them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PRINTED = """\
import os, sys, time
os.sched_setaffinity(0, {int(sys.argv[1])})
from llmbuild.runtime.session import threaded_device
device, until = threaded_device(int(sys.argv[2])), time.monotonic() + 5
def threads():
    for name in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{name}/comm") as file:
            yield file.read().strip(), os.sched_getaffinity(int(name))
while time.monotonic() < until and not any(name.startswith("iree-worker") for name, _ in threads()):
    time.sleep(0.01)
workers = sum(name.startswith("iree-worker") for name, _ in threads())
print(sorted({core for _, cores in threads() for core in cores}), workers)
"""


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_stay_on_the_cores_of_their_process(workers: int) -> None:
    core = max(os.sched_getaffinity(0))
    words = [sys.executable, "-c", PRINTED, str(core), str(workers)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == f"[{core}] 1\n", done.stderr
