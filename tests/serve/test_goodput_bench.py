"""Goodput against rate: the search for the highest rate, crossings, and what is saved, over simulated servers."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from math import inf
from pathlib import Path

import pytest

from llmbuild.errors import InputError
from llmbuild.serve import capacity
from llmbuild.serve.capacity import Lengths
from llmbuild.serve.drive import Heard, Sending
from llmbuild.spec.load_curve import Table
from tests.support.curves import FIT, curve

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))

import goodput
from comparison import rate_judgement, rate_plot, rate_runs
from comparison.highest_rate import (
    Bracket,
    Crossing,
    Holding,
    Preferred,
    bracket,
    crossings,
    held_above,
    next_rate,
    preferred,
)
from comparison.nodes import Seen
from comparison.rate_runs import Measured, Run, Sampling, Variant

SLO = ["ttft_s_p95<=1", "tpot_s_p95<=0.05"]
BOUNDS = rate_runs.bounds_of(SLO)
KNOWN = curve()
FAST = curve(fit=replace(FIT, table=Table(FIT.table.at, tuple(0.6 * one for one in FIT.table.values))))
WORDS = ["--node", "m/v:8", *(word for one in SLO for word in ("--slo", one)), "--lengths", "60:20"]
LENGTHS = Lengths(60, 20)
SAMPLING = Sampling(20.0, 60.0, 2, LENGTHS)
EXACT = Variant("m/exact x8", "e" * 64, "f16", 8, {"quality_kl": 0.0}, KNOWN)
QUICK = Variant("m/quick x8", "q" * 64, "int4", 8, {"quality_kl": 0.1}, FAST)


# --- the search ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0.01, 0.9, 1.69, 1.71, 2.5, 400.0])
def test_a_search_ends_with_a_bracket_around_the_highest_rate_wherever_it_begins(first: float) -> None:
    held = dict[float, bool]()
    while (rate := next_rate(held, first, 0.1)) is not None:
        assert rate not in held
        held[rate] = rate <= 1.7
    found = bracket(held)
    assert found.low <= 1.7 < found.high <= 1.1 * found.low
    assert len(held) <= 14


def test_a_search_near_the_highest_rate_takes_four_rates_at_most() -> None:
    counts = []
    for percent in range(80, 125, 5):
        held = dict[float, bool]()
        while (rate := next_rate(held, 1.0, 0.1)) is not None:
            held[rate] = rate <= percent / 100
        counts.append(len(held))
    assert max(counts) == 4


def test_rates_that_were_tried_before_the_search_count() -> None:
    assert next_rate({0.6: True, 1.0: True, 1.05: False}, 1.0, 0.1) is None
    assert next_rate({0.64: True, 1.0: False}, 1.0, 0.1) == 0.8


def test_the_lowest_rate_that_is_not_held_ends_a_bracket_and_held_ones_above_it_are_told() -> None:
    held = {1.0: True, 1.2: False, 1.5: True, 2.0: False}
    assert (bracket(held), held_above(held)) == (Bracket(1.0, 1.2), (1.5,))
    assert bracket({1.0: True}) == Bracket(1.0, inf)
    assert bracket({1.0: False}) == Bracket(0.0, 1.0)


def test_a_prediction_agrees_only_where_it_does_for_every_rate_of_the_bracket() -> None:
    found = Bracket(1.0, 1.1)
    assert [found.agrees(rate) for rate in (1.0, 1.09, 1.15, 1.3, 0.95, 0.89)] == [
        "yes",
        "yes",
        "undecided",
        "no",
        "undecided",
        "no",
    ]
    assert [Bracket(1.0, inf).agrees(rate) for rate in (0.8, 1.05)] == ["no", "undecided"]
    assert [Bracket(0.0, 1.0).agrees(rate) for rate in (0.8, 1.2)] == ["undecided", "no"]


# --- crossings -------------------------------------------------------------------------------------------------------


def test_at_each_rate_the_least_loss_of_those_that_hold_it_is_preferred() -> None:
    found = preferred([Holding("int4", 0.1, 3.0), Holding("f16", 0.0, 0.9), Holding("int8", 0.01, 1.8)])
    assert found == (Preferred("f16", 0.0, 0.9), Preferred("int8", 0.9, 1.8), Preferred("int4", 1.8, 3.0))


def test_a_variant_that_holds_less_than_a_better_one_is_never_preferred() -> None:
    found = preferred([Holding("f16", 0.0, 0.9), Holding("slow", 0.02, 0.7), Holding("none", 0.3, 0.0)])
    assert found == (Preferred("f16", 0.0, 0.9),)
    assert preferred([Holding("a", 0.1, 1.0), Holding("b", 0.1, 2.0)]) == (Preferred("b", 0.0, 2.0),)


def test_crossings_are_told_as_predicted_and_as_measured() -> None:
    losses = {"f16": 0.0, "int8": 0.01, "int4": 0.1}
    by_curve = {"f16": 0.9, "int8": 1.8, "int4": 3.0}
    by_runs = {"f16": Bracket(1.0, 1.1), "int8": Bracket(1.05, 1.15), "int4": Bracket(2.9, 3.1)}
    assert crossings(losses, by_curve, by_runs) == (
        Crossing("f16", "int8", 0.9, Bracket(1.0, 1.1), sure=False),
        Crossing("int8", "int4", 1.8, Bracket(1.05, 1.15), sure=True),
        Crossing("int4", None, 3.0, Bracket(2.9, 3.1), sure=True),
    )


def test_a_crossing_that_only_one_side_has_is_told_too() -> None:
    losses = {"f16": 0.0, "int8": 0.01}
    found = crossings(losses, {"f16": 0.9, "int8": 1.8}, {"f16": Bracket(2.0, 2.1), "int8": Bracket(1.8, 1.9)})
    assert found == (
        Crossing("f16", "int8", 0.9),
        Crossing("int8", None, 1.8),
        Crossing("f16", None, None, Bracket(2.0, 2.1), sure=True),
    )
    assert crossings({}, {}, {}) == ()


# --- what came of requests -------------------------------------------------------------------------------------------


def heard(ttft_s: float, count: int, end: str = "answered") -> tuple[Heard, ...]:
    return (Heard(0.0, 0.0, end, ttft_s, ttft_s + 0.1, ttft_s + 0.1, 11, 11, 1),) * count


def run_of(ones: tuple[Heard, ...], rate: float = 2.0) -> Run:
    sends = tuple(Sending(float(i), 10, 11) for i in range(len(ones)))
    return Run(EXACT.name, rate, 0.0, sends, Seen(ones, 10.0, 0.5, 5.0, {"step_sum": 1.0}))


def test_a_rate_holds_by_the_percentiles_over_the_requests_of_all_runs() -> None:
    calm, busy = run_of(heard(0.5, 100)), run_of(heard(0.5, 91) + heard(3.0, 9))
    found = rate_runs.at_rate([calm, busy], BOUNDS)
    assert (found.holds, found.runs_held, found.requests) == (True, 1, (100, 100))
    assert found.goodput == pytest.approx((2.0, 1.82))
    assert not rate_runs.at_rate([busy], BOUNDS).holds


def test_a_request_that_is_not_answered_keeps_no_bound() -> None:
    found = rate_runs.at_rate([run_of(heard(0.5, 90) + heard(0.5, 10, "rejected"))], BOUNDS)
    assert (found.holds, found.values["ttft_s_p95"], found.goodput) == (False, inf, pytest.approx((1.8,)))


def test_no_more_runs_are_needed_where_too_many_requests_have_missed() -> None:
    ten, eleven = (run_of(heard(0.5, 100 - n) + heard(3.0, n)) for n in (10, 11))
    assert not rate_runs.cannot_hold([ten], 200, BOUNDS)
    assert rate_runs.cannot_hold([eleven], 200, BOUNDS)


def test_a_run_lasts_until_a_percentile_has_its_requests_or_the_longest_time_has_passed() -> None:
    assert [rate_runs.least_requests(rate_runs.bounds_of([f"ttft_s_p{n}<=1"])) for n in (90, 95, 99)] == [44, 90, 459]
    sampling = Sampling(30.0, 120.0, 3, LENGTHS)
    slow, middle, fast = (sampling.draws(rate, BOUNDS, 1024)[0] for rate in (0.1, 1.0, 10.0))
    assert len(middle) == 90
    assert slow[-2].at_s < 120.0 <= slow[-1].at_s
    assert fast[-2].at_s < 30.0 <= fast[-1].at_s


def test_runs_of_a_seed_are_alike_at_all_rates_but_for_time() -> None:
    slow, fast = (Sampling(30.0, 30.0, 2, LENGTHS).draws(rate, BOUNDS, 1024) for rate in (1.0, 4.0))
    assert [one[1:] for one in slow[1]] == [one[1:] for one in fast[1][: len(slow[1])]]
    assert [one.at_s for one in slow[1]] == pytest.approx([4 * one.at_s for one in fast[1][: len(slow[1])]])
    assert slow[0][:5] != slow[1][:5]


# --- all of it -------------------------------------------------------------------------------------------------------


def simulated(servers: list[Variant], sends: list[tuple[Sending, ...]], seed: int) -> list[Seen]:
    """Answer as the simulator of a variant's curve does."""
    return [Seen(rate_judgement.simulated(servers[0], sends[0]), 10.0, 0.1, 1.0, {})]


@pytest.fixture(scope="module")
def measured() -> Iterator[Measured]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(goodput, "driven", simulated)
        patch.setattr(capacity, "REQUESTS", 40)  # a fifth of the time; nothing here is about them
        asked = goodput.options([*WORDS, "--share", "0.7", "1.4"])
        made = Measured("a machine", tuple(SLO), SAMPLING, (EXACT, QUICK))
        for variant in made.variants:
            best = rate_judgement.picked(variant.curve, variant.sequences, LENGTHS, BOUNDS)
            client = goodput.Client(variant, variant, SAMPLING, BOUNDS)
            made = replace(made, runs=(*made.runs, *goodput.runs_of(client, best.rate, asked)))
        yield made


@pytest.fixture(scope="module")
def found(measured: Measured) -> rate_judgement.Judgement:
    return rate_judgement.judged(measured, "quality_kl")


def test_of_servers_that_do_as_simulated_the_replayed_rates_and_the_crossing_are_right(
    found: rate_judgement.Judgement,
) -> None:
    assert [(one.measured.width <= 0.1, one.measured.agrees(one.replayed)) for one in found.variants] == [
        (True, "yes")
    ] * 2
    assert [at.values for one in found.variants for at in one.rates] == [
        values for one in found.variants for values in one.simulated
    ]
    assert [(one.before, one.after) for one in found.crossings] == [("m/exact x8", "m/quick x8"), ("m/quick x8", None)]
    assert {len(at.requests) for one in found.variants for at in one.rates if at.holds} == {2}
    body = rate_judgement.document(found)
    assert json.loads(json.dumps(body, allow_nan=False)) == body


def test_what_was_saved_is_read_back_and_makes_the_same_tables_and_plot(
    measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = replace(run_of((Heard(1.0, 0.0),), measured.runs[-1].rate), name=QUICK.name)
    whole = replace(measured, runs=(*measured.runs, lost))
    rate_runs.write(whole, tmp_path / "saved.json")
    assert rate_runs.read(tmp_path / "saved.json") == whole
    words = ["goodput.py", "--from", str(tmp_path / "saved.json")]
    monkeypatch.setattr(sys, "argv", words)
    goodput.main()
    told = capsys.readouterr().out
    assert told.strip() == rate_judgement.text(rate_judgement.judged(whole, "quality_kl"))
    assert "m/quick x8: fewer than 90 requests in a run at" in told


def test_a_plot_is_written_and_equal_runs_give_equal_files(found: rate_judgement.Judgement, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("one.svg", "other.svg"):
        rate_plot.write(found, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "other.svg").read_bytes()
    assert (tmp_path / "one.svg").stat().st_size < 150_000


def test_a_variant_that_holds_no_rate_by_its_curve_has_no_runs_and_is_never_preferred(measured: Measured) -> None:
    slow = replace(EXACT, name="m/slow x8", curve=curve(fit=replace(FIT, table=Table((1, 2), (9.0, 9.0)))))
    made = rate_judgement.judged(replace(measured, variants=(*measured.variants, slow)), "quality_kl")
    assert (made.variants[-1].picked, made.variants[-1].measured, made.variants[-1].rates) == (
        0.0,
        Bracket(0.0, inf),
        (),
    )
    assert "m/slow x8" not in {one.name for one in (*made.predicted_spans, *made.measured_spans)}
    assert "m/slow x8" in rate_judgement.text(made)


def test_without_a_reading_of_the_objective_a_variant_is_the_last_resort(measured: Measured) -> None:
    unknown = replace(measured, variants=(replace(EXACT, readings={}), QUICK))
    found = rate_judgement.judged(unknown, "quality_kl")
    assert [one.name for one in found.predicted_spans] == ["m/quick x8"]
    assert "m/exact x8 has no quality_kl" in rate_judgement.text(found)


@pytest.mark.parametrize("text", [None, "no JSON", "[]", '{"runs": []}', '{"format": "goodput 1", "machine": "m"}'])
def test_a_file_that_no_run_saved_is_refused(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "saved.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=r"saved\.json"):
        rate_runs.read(path)


@pytest.mark.parametrize("words", [[], ["--node", "m/v"], [*WORDS, "--runs", "0"], [*WORDS, "--slo", "tpot_s<=1"]])
def test_options_that_cannot_be_are_refused(words: list[str]) -> None:
    with pytest.raises(InputError):
        goodput.options(words)
