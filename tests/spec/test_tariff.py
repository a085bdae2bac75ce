"""What electricity costs by the hour of the day: each day is alike, and parts of a time add up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmbuild.spec.tariff import DAY_S, Series

DAY = Series((0.0, 7.0, 21.5), (10.0, 30.0, 20.0))
SECONDS = st.floats(0, 5 * DAY_S)


@pytest.mark.parametrize(
    ("second", "value"),
    [(0, 10), (6.99 * 3600, 10), (7 * 3600, 30), (21.5 * 3600, 20), (DAY_S - 1, 20), (DAY_S, 10), (DAY_S + 25200, 30)],
)
def test_a_value_holds_from_its_hour_to_the_next_every_day(second: float, value: float) -> None:
    assert DAY.at(second) == value


def test_the_mean_weighs_values_by_their_hours() -> None:
    assert DAY.mean == pytest.approx((7 * 10 + 14.5 * 30 + 2.5 * 20) / 24)
    assert Series((0.0,), (5.0,)).mean == 5.0


@given(SECONDS, SECONDS, SECONDS)
def test_integrals_of_parts_add_up(a: float, b: float, c: float) -> None:
    a, b, c = sorted((a, b, c))
    assert DAY.integral(a, b) + DAY.integral(b, c) == pytest.approx(DAY.integral(a, c), abs=1e-3)
    assert DAY.integral(a, a + DAY_S) == pytest.approx(DAY.mean * DAY_S)


@given(SECONDS, st.floats(0, 600))
def test_an_integral_is_between_the_least_and_the_largest_value(begin: float, length: float) -> None:
    found = DAY.integral(begin, begin + length)
    assert 10 * length - 1e-3 <= found <= 30 * length + 1e-3
