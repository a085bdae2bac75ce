"""Load curves: what a step computes, what it takes, and their JSON form."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmbuild.digest import plain
from llmbuild.spec.load_curve import Fit, OwnTime, Table, Work, curve_from, row_of, taken_on
from tests.support.curves import curve

PIECES = st.lists(st.tuples(st.integers(0, 500), st.integers(1, 50)), max_size=8)


@given(PIECES)
def test_a_step_s_work_counts_what_every_token_sees(pieces: list[tuple[int, int]]) -> None:
    work = Work.of(pieces)
    seen = [position + 1 for start, count in pieces for position in range(start, start + count)]
    assert work.context + work.seen == sum(seen)
    assert work.rows == len(seen)
    assert work.reads == len(pieces)
    assert work.decodes == sum(start > 0 and count == 1 for start, count in pieces)


def test_a_table_has_lines_between_its_places_and_goes_on_behind_the_last() -> None:
    table = Table((1, 3, 5), (2.0, 4.0, 10.0))
    assert [table(x) for x in (0, 1, 2, 3, 4, 5, 6)] == [2.0, 2.0, 3.0, 4.0, 7.0, 10.0, 13.0]
    assert Table((4,), (2.0,))(9) == 2.0


def test_rows_in_a_call_each_take_the_sum_of_their_calls() -> None:
    fit = Fit(False, Table((1, 10), (1.0, 4.0)), 0.0, 0.5, 0.25)
    assert fit.seconds(Work.of([(3, 1), (5, 1)])) == 2 * 1.0 + 0.5 * (4 + 6)
    assert fit.seconds(Work.of([(0, 10), (3, 1)])) == 4.0 + 1.0 + 0.25 * 55 + 0.5 * 4


def test_a_curve_is_the_same_after_json() -> None:
    bare = curve(watts=Table((1, 16), (50.0, 90.0)), energy_source="rapl")
    for one in (bare, replace(bare, served=OwnTime(1e-3, 2e-3, 3e-3, 4e-3), cores=1)):
        assert curve_from(json.loads(json.dumps(plain(one)))) == one


def test_joules_are_absent_without_a_meter_and_power_by_time_with_one() -> None:
    bare, metered = curve(), curve(watts=Table((1, 16), (50.0, 80.0)), energy_source="rapl")
    work = Work.of([(512, 1)] * 16)
    assert (bare.joules(work), row_of(bare)["decodes_j"]) == (None, None)
    assert metered.joules(work) == pytest.approx(80.0 * metered.fit.seconds(work))
    assert row_of(metered)["decodes_j"] == metered.joules(work)


def test_a_server_s_step_has_the_engine_s_own_time() -> None:
    work = Work.of([(100, 1)] * 4)
    one = replace(curve(), turn_s=0.25, row_s=0.5)
    assert one.step_s(work) == pytest.approx(one.fit.seconds(work) + 0.25 + 4 * 0.5)
    assert one.covers(work) and not one.covers(Work.of([(9, 1)] * 17)) and not one.covers(Work.of([(0, 513)]))


def test_a_server_takes_what_was_measured_over_http_where_that_is_known() -> None:
    work = Work.of([(100, 1)] * 4)
    one = replace(curve(), turn_s=0.25, row_s=0.5)
    assert one.served_s(work) == pytest.approx(one.step_s(work))
    known = replace(one, served=OwnTime(1.0, 2.0, 0.0, 0.0))
    assert known.served_s(work) == pytest.approx(known.fit.seconds(work) + 1.0 + 4 * 2.0)


def test_a_curve_is_of_the_cores_that_it_was_taken_on_or_of_the_machine() -> None:
    whole, one = curve(), replace(curve(), cores=1)
    assert [taken_on((whole, one), cores) for cores in (0, 1, 2)] == [whole, one, whole]
    assert [taken_on((one,), cores) for cores in (0, 1)] == [None, one]


def test_a_slower_device_takes_longer_for_all_work() -> None:
    work = Work.of([(100, 1), (0, 40)])
    assert curve().fit.times(3.0).seconds(work) == pytest.approx(3 * curve().fit.seconds(work))


def test_a_curve_is_doubtful_where_its_error_or_its_rounds_are() -> None:
    assert curve().doubt == ""
    assert curve(error_p95=0.3).doubt == "its error is 30%"
    assert (
        curve(notes={"noise": "other processes took 40% of the CPUs"}).doubt == "other processes took 40% of the CPUs"
    )
