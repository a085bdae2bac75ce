"""Traces: the two formats, what scaling does and says, and how requests are given to services."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from llmbuild.errors import InputError
from llmbuild.fleet.simulate.trace import DAY, Arrival, Trace, asked, read_trace
from tests.support.fleets import fleet, service

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:15:46.6805900,374,44\r\n"
    "2023-11-16 18:15:50.9951690,396,109\r\n"
    "2023-11-16 18:15:51.2224670,879,0"
)
MOONCAKE = (
    '{"timestamp": 0, "input_length": 512, "output_length": 500, "hash_ids": [0]}\n'
    '{"timestamp": 3052, "input_length": 822, "output_length": 490, "hash_ids": [0, 14]}\n'
)
MANY = Trace("many", tuple(Arrival(i * 0.5, 100 + i % 7, 10 + i % 5) for i in range(2000)), 1000.0)


def written(folder: Path, text: str) -> Path:
    path = folder / "trace"
    path.write_text(text)
    return path


def test_a_csv_of_azure_is_read_with_seven_digits_of_a_second(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path, AZURE))
    assert [a[1:] for a in trace.arrivals] == [(374, 44), (396, 109), (879, 1)]
    assert [a.at_s for a in trace.arrivals] == pytest.approx([0, 4.314579, 4.541877], abs=1e-5)


def test_lines_of_mooncake_are_read(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path, MOONCAKE))
    assert trace.arrivals == (Arrival(0.0, 512, 500), Arrival(3.052, 822, 490))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "empty"),
        (AZURE.replace("396,109", "396"), ":3: .*TIMESTAMP,ContextTokens,GeneratedTokens"),
        (AZURE.replace("396", "many"), ":3: "),
        (MOONCAKE + "{}", ":3: KeyError"),
        (MOONCAKE + "[]", ":3: TypeError: no object"),
        (MOONCAKE.replace("822", "822.5"), ":2: .*two counts of tokens"),
        (MOONCAKE.replace("822", '"822"'), ":2: .*two counts of tokens"),
        (MOONCAKE.replace("3052", "true"), ":2: .*no time in ms"),
        (MOONCAKE.replace("3052", "NaN"), ":2: ValueError"),
        (MOONCAKE.replace("490", "-1"), ":2: ValueError"),
        (MOONCAKE.replace("[0, 14]", "[0]"), ":2: .*1 hash_ids for 822 tokens"),
        (MOONCAKE.replace("[0, 14]", "[0, -1]"), ":2: .*no list of whole numbers"),
        (MOONCAKE.replace("[0, 14]", "3"), ":2: .*no list of whole numbers"),
        ("no trace at all", ":1: "),
        (AZURE.splitlines()[0], "no request"),
        ("\n".join(AZURE.splitlines()[:2]), "all requests come at one time"),
    ],
)
def test_what_is_no_trace_is_told_with_its_line(text: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=told):
        read_trace(written(tmp_path, text))


def test_a_rate_is_thinned_or_laid_over_itself_and_says_so() -> None:
    half, double = MANY.at_rate(0.5), MANY.at_rate(2.5)
    assert half.rate == pytest.approx(MANY.rate * 0.5, rel=0.1)
    assert double.rate == pytest.approx(MANY.rate * 2.5, rel=0.1)
    assert "CV of gaps 0.0 before" in half.told[-1]
    assert list(double.arrivals) == sorted(double.arrivals)


def test_a_day_moves_requests_and_keeps_their_number_order_and_mean_rate() -> None:
    day = MANY.day()
    assert [a[1:] for a in day.arrivals] == [a[1:] for a in MANY.arrivals]
    assert list(day.arrivals) == sorted(day.arrivals)
    assert (day.rate, day.seconds) == (MANY.rate, MANY.seconds)
    assert "rate x0.22 at 5 h to x1.94, peaks at 10 and 15 h" in day.told[-1]


def test_a_day_has_its_rate_at_each_hour() -> None:
    day = MANY.day()
    mean = sum((b - a) * (low + high) / 2 for (a, low), (b, high) in pairwise(DAY)) / 24
    for hour, rate in DAY[1:-1]:
        near = sum(abs(a.at_s / day.seconds * 24 - hour) < 0.5 for a in day.arrivals)
        assert near == pytest.approx(MANY.rate * day.seconds / 24 * rate / mean, rel=0.2, abs=4)


def test_lengths_are_scaled_and_cut_to_the_context() -> None:
    cut = MANY.lengths(2.0, 120)
    assert max(a.prompt + a.output for a in cut.arrivals) <= 120
    assert min(min(a.prompt, a.output) for a in cut.arrivals) >= 1
    assert "lengths x2" in cut.told
    assert "100.0% of the requests cut to 120 tokens" in cut.told


def test_a_seed_turns_the_trace_and_keeps_its_requests() -> None:
    made = fleet(service("a"), service("b"))
    first, other = (asked(made, {"": MANY}, seed) for seed in (0, 1))
    assert [one.at_s for one in first] == [a.at_s for a in MANY.arrivals]
    assert sorted((one.prompt, one.output) for one in first) == sorted((one.prompt, one.output) for one in other)
    assert [one.number for one in other] == list(range(len(other)))
    assert {one.service for one in first} == {0, 1}


def test_a_trace_of_a_service_is_its_own() -> None:
    made = fleet(service("a"), service("b"))
    short = MANY.window(100)
    found = asked(made, {"a": MANY, "b": short}, 0)
    assert sum(one.service == 1 for one in found) == len(short.arrivals)
