"""What overlaps in a build, and what never does: making, measuring, and what is known under `-B`."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmbuild.build.prefetch import make_first_points
from llmbuild.build.search import search
from llmbuild.catalog.writer import Catalog
from llmbuild.spec.measurement import Measurement
from llmbuild.spec.recipe import Budget
from tests.support import quick

SPAN_S = 0.05


class Spans:
    """When things of each kind were done."""

    def __init__(self) -> None:
        self.made: list[tuple[float, float]] = []
        self.measured: list[tuple[float, float]] = []

    @contextmanager
    def of(self, kind: list[tuple[float, float]]) -> Iterator[None]:
        begin = time.monotonic()
        time.sleep(SPAN_S)
        yield
        kind.append((begin, time.monotonic()))


def overlap(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return a[0] < b[1] and b[0] < a[1]


def some_overlap(spans: list[tuple[float, float]]) -> bool:
    return any(overlap(a, b) for i, a in enumerate(spans) for b in spans[i + 1 :])


class Searching(quick.QuickBuild):
    """A quick build with the real search."""

    def _search(self) -> str:
        return search(self.evaluator, 0, self.spent)


def watched(steps: quick.QuickSteps, spans: Spans, lock: Path, patch: pytest.MonkeyPatch) -> None:
    """Note when the steps of a build import, compile and measure; measuring must hold the catalog's lock."""
    bench: Any = steps._bench
    import_, compile_, measure, race = steps.import_, steps.compile, bench.measure, bench.race

    def slowly(kind: list[tuple[float, float]], act: Any) -> Any:
        def slow(*args: Any, **more: Any) -> Any:
            with spans.of(kind):
                if kind is spans.measured:
                    assert taken(lock), "measured without the lock"
                return act(*args, **more)

        return slow

    patch.setattr(steps, "import_", slowly(spans.made, import_))
    patch.setattr(steps, "compile", slowly(spans.made, compile_))
    patch.setattr(bench, "measure", slowly(spans.measured, measure))
    patch.setattr(bench, "race", slowly(spans.measured, race))


def taken(lock: Path) -> bool:
    """Return whether another process cannot have a lock now."""
    code = (
        "import fcntl, sys\nfile = open(sys.argv[1], 'a')\n"
        "try: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\nexcept BlockingIOError: print('taken')"
    )
    return subprocess.run([sys.executable, "-c", code, lock], capture_output=True, text=True, check=True).stdout != ""


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_measurement_never_runs_while_the_build_makes_something(
    jobs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spans, catalog = Spans(), Catalog(tmp_path / "c")
    steps = quick.QuickSteps(quick.job_of(quick.Asked(), tmp_path / "m"), catalog)
    watched(steps, spans, tmp_path / "c" / ".measuring", monkeypatch)
    Searching(steps, Budget(trials=6, seconds=1e6), 0, jobs, lambda event: None).run()
    catalog.close()
    assert len(spans.measured) >= 4
    assert not any(overlap(m, made) for m in spans.measured for made in spans.made)
    assert not some_overlap(spans.measured)
    assert some_overlap(spans.made) == (jobs > 1)


def test_first_points_of_several_builds_are_made_side_by_side_and_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spans, catalog = Spans(), Catalog(tmp_path / "c")
    builds = []
    for name in ("m", "n"):
        steps = quick.QuickSteps(quick.job_of(quick.Asked(name=name, weights=name), tmp_path / name), catalog)
        watched(steps, spans, tmp_path / "c" / ".measuring", monkeypatch)
        builds.append(Searching(steps, Budget(trials=2, seconds=1e6), 0, 1, lambda event: None))
    make_first_points(builds, 2, lambda event: None)
    catalog.close()
    assert (spans.measured, some_overlap(spans.made)) == ([], True)


def test_two_processes_of_one_catalog_measure_in_turn(tmp_path: Path) -> None:
    """What the lock covers: a build in another process may make something meanwhile, which readings are marked for."""
    catalog, order = Catalog(tmp_path / "c"), list[str]()
    code = (
        "import sys; from pathlib import Path; from llmbuild.catalog.writer import Catalog\n"
        "catalog = Catalog(Path(sys.argv[1])); print('asks', flush=True)\n"
        "with catalog.measuring(): print('has it', flush=True)"
    )
    with catalog.measuring():
        command = [sys.executable, "-c", code, str(tmp_path / "c")]
        other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert other.stdout is not None
        assert other.stdout.readline() == "asks\n"
        line = threading.Thread(target=lambda: order.append(str(other.stdout and other.stdout.readline())))
        line.start()
        time.sleep(0.3)
        order.append("we are done")
    line.join()
    other.communicate()
    catalog.close()
    assert order == ["we are done", "has it\n"]


# --- what is known -------------------------------------------------------------------------------------------------


def test_what_trials_say_of_the_same_bytes_is_known_and_under_b_nothing_of_an_earlier_build(tmp_path: Path) -> None:
    wanted = quick.Asked(formats=("f32",))
    quick.build(wanted, tmp_path / "c", tmp_path / "m")
    catalog = Catalog(tmp_path / "c")
    job = quick.job_of(wanted, tmp_path / "m")
    for force in (False, True):
        steps = quick.QuickSteps(replace(job, force=force), catalog)
        build = quick.QuickBuild(steps, quick.ALL, 0, 1, lambda event: None)
        build.results.read()
        trials = list(build.results.known)
        if force:
            build.results.known = []  # as `-B` begins
        subjects = [build.evaluator.subject(trial) for trial in trials]
        known = [subject.known for subject in subjects if subject is not None]
        assert [one is None for one in known] == [force, force]
        if not force:
            assert [set(one.timed) for one in known if one] == [{"short"}] * 2
            other = replace(trials[0], measurements=tuple(of_other(m) for m in trials[0].measurements))
            assert build.evaluator.subject(other).known is None  # type: ignore[union-attr]
    catalog.close()


def of_other(measured: Measurement) -> Measurement:
    return replace(measured, artifact="0" * 64)


def test_a_baseline_that_does_not_open_again_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmbuild.spec.variant import Failure

    catalog = tmp_path / "c"
    quick.build(quick.Asked(formats=("f32",)), catalog, tmp_path / "m")
    failure = Failure("profile", "no memory", "", "", lasting=False)
    monkeypatch.setattr(quick.QuickBench, "has_baseline", False)
    monkeypatch.setattr(quick.QuickBench, "open_baseline", lambda self, subject: failure, raising=False)
    told: list[str] = []
    quick.build(quick.Asked(), catalog, tmp_path / "m", lambda event: told.append(event.text))
    assert "readings are not paired with the compiler's defaults: no memory" in told
