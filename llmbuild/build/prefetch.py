"""Build the first points of several jobs before any job measures: with `-j`, their compiles run in parallel."""

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

    A failure is made again, and reported, in its own build.
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
