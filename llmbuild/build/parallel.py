"""Work on several points in parallel, in threads that wait for child processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from llmbuild.process.child import stop_all

Item = TypeVar("Item")
Made = TypeVar("Made")


def side_by_side(make: Callable[[Item], Made], items: Sequence[Item], jobs: int) -> list[Made]:
    """Return the result for each item, `jobs` at a time.

    An exception in one of them, Ctrl-C above all, ends the children of all: the pool waits for its threads.
    """
    with ThreadPoolExecutor(jobs) as pool:
        try:
            return list(pool.map(make, items))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            stop_all()
            raise
