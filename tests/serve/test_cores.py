"""Cores that are slow after a rest: how long work takes, and how much is done."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmbuild.serve.cores import REST_S, Cores
from llmbuild.spec.load_curve import OwnTime

NONE = OwnTime(0.0, 0.0, 0.0, 0.0)
SLOW = replace(NONE, cold_factor=2.0, cold_s=0.1)


def test_work_takes_longer_until_cores_have_worked_for_a_while() -> None:
    cores = Cores(SLOW)
    assert cores.wall_s(0.02) == pytest.approx(0.04)
    assert cores.wall_s(0.05) == pytest.approx(0.1)
    assert cores.wall_s(0.15) == pytest.approx(0.2)


def test_cores_stay_fast_while_they_work_and_are_slow_again_after_a_rest() -> None:
    cores = Cores(SLOW)
    cores.worked(0.06)
    assert cores.wall_s(0.03) == pytest.approx(0.05)
    cores.worked(1.0)
    cores.rested(REST_S / 2)
    assert cores.wall_s(0.03) == pytest.approx(0.03)
    cores.rested(REST_S)
    assert cores.wall_s(0.03) == pytest.approx(0.06)


def test_cores_without_a_factor_are_always_fast() -> None:
    assert Cores(NONE).wall_s(0.3) == Cores(NONE).work_s(0.3) == 0.3


@given(st.floats(0, 10), st.floats(1, 4), st.floats(0, 2), st.floats(0, 3))
def test_as_much_is_done_in_a_time_as_takes_it(work_s: float, factor: float, cold_s: float, before_s: float) -> None:
    cores = Cores(replace(NONE, cold_factor=factor, cold_s=cold_s))
    cores.worked(before_s)
    assert cores.work_s(cores.wall_s(work_s)) == pytest.approx(work_s, abs=1e-9)
    assert work_s - 1e-9 <= cores.wall_s(work_s) <= work_s * factor + 1e-9
