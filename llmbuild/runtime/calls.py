"""Call compiled functions on a device, and wait for its workers without occupying one of their cores."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from time import perf_counter, sleep
from typing import Any

import iree.runtime as rt

POLL_S = 2e-5
"""Pause between polls for the workers' completion; the kernel may lengthen it by some tens of microseconds."""
SLEPT = 0.85
"""Fraction of the expected time that is slept before the first poll: each poll takes a core from a worker."""
LATE_S = 1e-4
"""Tolerance for a late wake-up; without it, a call shorter than the sleep would never lower the expected time."""


class PlainCaller:
    """Calls synchronous functions: suitable where the caller's own thread does the work."""

    def __init__(self, device: Any, context: Any, results: int) -> None:
        """Take the number of results of each function."""
        self._context = context
        self._results = results

    def __call__(self, function: Any, views: Sequence[Any], alike: Hashable = None) -> Any:
        """Return the list of results."""
        arguments, results = rt.VmVariantList(len(views)), rt.VmVariantList(self._results)
        for view in views:
            arguments.push_ref(view)
        self._context.invoke(function, arguments, results)
        return results


class PolledCaller:
    """Calls functions that take a wait fence and a signal fence, and sleeps until the workers finish.

    Synchronous calls spin while they wait, on a core that a worker needs: on a host with as many cores as workers,
    the kernel may take a whole time slice from the worker that the call waits for.
    """

    def __init__(self, device: Any, context: Any, results: int) -> None:
        """Take the number of results of each function."""
        self._context = context
        self._results = results
        self._done = device.create_semaphore(0)
        self._calls = 0
        self._expected_s: dict[Hashable, float] = {}

    def __call__(self, function: Any, views: Sequence[Any], alike: Hashable = None) -> Any:
        """Return the list of results. Calls that name the same `alike` have similar durations, so that most of it is
        slept; those that name nothing have not.
        """
        arguments, results = rt.VmVariantList(len(views) + 2), rt.VmVariantList(self._results)
        for view in views:
            arguments.push_ref(view)
        arguments.push_ref(rt.HalFence.create_at(self._done, self._calls))
        self._calls += 1
        arguments.push_ref(rt.HalFence.create_at(self._done, self._calls))
        begin = perf_counter()
        self._context.invoke(function, arguments, results)
        expected_s = self._expected_s.get(alike, 0.0)
        if alike is not None and expected_s > LATE_S:
            sleep(SLEPT * (expected_s - LATE_S))
        while self._done.query() < self._calls:
            sleep(POLL_S)
        if alike is not None:
            self._expected_s[alike] = _expected(expected_s, perf_counter() - begin)
        return results


def _expected(before_s: float, seconds: float) -> float:
    """Return the expected duration after a call: at once that of a shorter one, slowly that of a longer one."""
    return seconds if seconds < before_s else before_s + (seconds - before_s) / 8
