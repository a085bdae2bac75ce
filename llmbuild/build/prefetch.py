"""Make what several jobs try first before any of them measures: with `-j`, compiles of all of them run side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, zip_longest

from llmbuild.build.build import Build
from llmbuild.build.events import Event
from llmbuild.build.parallel import side_by_side
from llmbuild.errors import LlmbuildError
from llmbuild.spec.space import Point

Tell = Callable[[Event], None]


def make_first_points(builds: Sequence[Build], jobs: int, tell: Tell) -> None:
    """Import and compile the points that each build tries first, `jobs` at a time: point 0 of each, then the second.

    What fails is made again, and told, when its build comes to it.
    """
    wanted = [[(build, point) for point in build.initial_points()] for build in builds]
    turns = [one for one in chain.from_iterable(zip_longest(*wanted)) if one is not None]
    tell(Event("prefetch", f"{len(turns)} points of {len(builds)} builds, {jobs} at a time"))
    side_by_side(lambda turn: _make(*turn), turns, jobs)


def _make(build: Build, point: Point) -> None:
    try:
        build.evaluator.artifact(point, quietly=True)
    except LlmbuildError:
        return
