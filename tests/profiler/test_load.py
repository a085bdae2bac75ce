"""Load curves: which steps are measured, and whether the fit finds what made their times."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmbuild.profiler.live import MeterFound
from llmbuild.profiler.load import HELD_OUT, Bounds, Planned, _power, error_p95, fitted, planned
from llmbuild.spec.load_curve import Cell, Fit, Table, Work

BOUNDS = Bounds(True, 1024, 16, 512, 17)
STAIRS = Table((1, 2, 4, 6, 8, 12, 16, 32, 64, 512), (8e-3, 8e-3, 9e-3, 10e-3, 18e-3, 19e-3, 30e-3, 50e-3, 0.1, 0.8))


def cells(fit: Fit, plan: list[Planned], noise: float = 0.0) -> list[Cell]:
    """Return cells whose times a fit made, with noise."""
    drawn, found = random.Random(0), []
    for one in plan:
        seconds = fit.seconds(one.work) * (1 + drawn.uniform(-noise, noise))
        found.append(Cell(one.work, seconds, seconds, seconds, 5, one.held_out))
    return found


@given(st.integers(1, 64), st.integers(8, 512), st.integers(16, 2048), st.booleans())
def test_planned_steps_fit_in_the_context_and_the_bounds(most: int, prompt: int, context: int, shared: bool) -> None:
    bounds = Bounds(shared, context, most, min(prompt, context), most + 1)
    plan = planned(bounds)
    assert len(set(plan)) == len(plan)
    for one in plan:
        assert 0 < len(one.pieces) <= bounds.sequences
        assert all(start >= 0 and start + count <= context for start, count in one.pieces)
        assert one.work.decodes <= most and one.work.tokens <= bounds.prompt
    assert sum(one.held_out for one in plan) <= HELD_OUT
    assert planned(bounds) == plan


@pytest.mark.parametrize("shared", [True, False])
def test_the_fit_finds_the_table_and_the_constants_that_made_the_times(shared: bool) -> None:
    plan = planned(BOUNDS if shared else Bounds(False, 1024, 16, 512, 17))
    knots = fitted(cells(Fit(shared, STAIRS, 0, 0, 0), plan), shared).table.at
    made = Fit(shared, Table(knots, tuple(STAIRS(x) for x in knots)), 2e-4 * shared, 3e-7, 1e-7)
    known = cells(made, plan)
    found = fitted(known, shared)
    assert error_p95(found, known) < 1e-6
    assert (found.context_s, found.seen_s) == (pytest.approx(3e-7), pytest.approx(1e-7))


def test_the_error_is_that_of_steps_that_were_not_fitted() -> None:
    plan = planned(BOUNDS)
    known = cells(Fit(True, STAIRS, 1e-4, 3e-7, 1e-7), plan, noise=0.02)
    fit = fitted(known, True)
    wrong = [Cell(c.work, c.seconds * 2, c.low, c.high, 5, True) if c.held_out else c for c in known]
    assert 0.001 < error_p95(fit, known) < 0.12
    assert error_p95(fit, wrong) == pytest.approx(0.5, abs=0.06)
    assert fitted(wrong, True) == fit


def test_what_a_step_adds_is_never_negative() -> None:
    works = [Work.of([(start, 1)] * n) for n in (1, 2, 4, 8) for start in (10, 900)]
    falling = [Cell(work, 1e-2 - 1e-7 * work.context, 0.1, 0.1, 5) for work in works]
    found = fitted(falling, True)
    assert found.context_s == 0.0 and found.read_s >= 0.0


class Metered:
    """A worker with a meter, or without one; a step takes 10 W and 1 W for each row."""

    def __init__(self, source: str | None, lost: str = "") -> None:
        self.child, self._source, self._lost = self, source, lost

    def meter(self) -> MeterFound:
        return MeterFound(self._source, "no counter here", {})

    def ask(self, stage: str, verb: str, **request: Any) -> dict[str, Any]:
        rows = Work.of(request["cell"]).rows
        return {"absent": self._lost} if self._lost else {"joules": 2.0 * (10 + rows), "seconds": 2.0}


def test_power_is_read_where_there_is_a_meter_and_absent_otherwise() -> None:
    known = cells(Fit(True, STAIRS, 0, 0, 0), planned(BOUNDS))
    live: Any = Metered("rapl")
    source, watts, why = _power(live, BOUNDS, known)
    assert (source, watts, why) == ("rapl", Table((1, 16, 512), (11.0, 26.0, 522.0)), "")
    assert _power(Metered(None), BOUNDS, known) == (None, None, "no counter here")  # type: ignore[arg-type]
    assert _power(Metered("rapl", "it stood still"), BOUNDS, known) == (None, None, "it stood still")  # type: ignore[arg-type]
