"""What a build costs, told before it begins and while it runs: estimates by hand, and builds in milliseconds."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmbuild.build.events import Event, Stopwatch
from llmbuild.build.forecast import forecast
from llmbuild.build.freshness import Freshness
from llmbuild.build.price import (
    FIXED_S,
    ONCE_S,
    TRIAL_BYTES,
    Archive,
    Asked,
    Earlier,
    archive_bytes,
    duration,
    left_s,
    price,
    size,
    weights,
)
from llmbuild.catalog.known import Known
from llmbuild.kernels.layouts import Layout
from llmbuild.report.progress import Progress
from llmbuild.spec.decoder import Decoder
from llmbuild.spec.model import ModelFacts
from llmbuild.spec.recipe import Budget
from llmbuild.transform.stored import Rows, StoredMatrix
from tests.support import quick

D = Decoder(hidden=576, inner=1536, heads=9, kv_heads=3, head_dim=64, vocabulary=49152)
FACTS = ModelFacts("llama", D, 30, 2048, True, False, False, False)
"""SmolLM2-135M, whose card gives 135 million weights."""


def asked(**changes: object) -> Asked:
    plain = Asked(FACTS, 8, [Archive("f32"), Archive("int4_g128", "int8")], 0, 1e9, 20.0)
    return replace(plain, **changes)  # type: ignore[arg-type]


def test_the_weights_of_a_shape_and_the_bytes_of_its_formats() -> None:
    assert weights(FACTS) == pytest.approx(134.5e6, rel=0.001)
    assert archive_bytes(FACTS, Archive("f32")) == 4 * weights(FACTS)
    tables = 49152 * 576
    layers = weights(FACTS) - tables
    assert archive_bytes(FACTS, Archive("int4_g128", "int8")) == pytest.approx(layers * (4 + 16 / 128) / 8 + tables)
    assert weights(replace(FACTS, tied=False)) == weights(FACTS) + tables


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", ["packed", "row_major"])
@pytest.mark.parametrize(
    ("layers", "head"), [("int2_g32s8", "same"), ("int6_g32s8", "int3_g64"), ("f12_e4m7", "int4a_g32")]
)
def test_the_bytes_of_an_archive_are_those_of_what_lies_there(layers: str, head: str, layout: str, tied: bool) -> None:
    own = layout == "packed" and head != "int4a_g32"
    choices = {"weight_format": layers, "head_format": head, "layout": layout, "kernel": "own" if own else "compiler"}
    hidden, inner, vocabulary, output = D.hidden, D.inner, D.vocabulary, layers if head == "same" else head
    wide = [*[(D.attended, hidden)] * 2, *[(D.cached, hidden)] * 2, *[(inner, hidden)] * 3]  # all have whole groups
    asked_of = [*((*size, layers) for size in wide * FACTS.layers), (vocabulary, hidden, output)]
    lies = [in_panels(*one) if own else in_rows(*one) for one in asked_of]
    lies += [] if tied else [in_rows(vocabulary, hidden, output)]
    found = archive_bytes(replace(FACTS, tied=tied), Archive.of(choices))
    assert found == pytest.approx(sum(lies), rel=0.03)  # what rows have of their own is left out


def in_panels(rows: int, columns: int, form: str) -> int:
    layout = Layout(form, columns)
    return rows // 64 * (layout.panel_bytes + layout.scale_bytes)


def in_rows(rows: int, columns: int, form: str) -> int:
    return sum(kind.nbytes for kind in StoredMatrix(Rows((("m", rows),)), columns, form).tensors().values())


def test_a_build_of_the_same_size_says_what_a_trial_takes() -> None:
    made = price(asked(earlier=[Earlier(weights(FACTS), 30.0)]))
    assert (made.trial_s, made.seconds, made.builds) == (30.0, 8 * 30.0 + 20.0, 1)
    bytes_ = archive_bytes(FACTS, Archive("f32")) + archive_bytes(FACTS, Archive("int4_g128", "int8")) + 8 * TRIAL_BYTES
    assert made.bytes == bytes_
    assert made.told() == "some 4 min, 630 MB of catalog (from 1 earlier build here)"


def test_only_the_seconds_that_depend_on_the_size_are_scaled_and_those_nearest_in_size_count() -> None:
    small = [Earlier(weights(FACTS) // 16, FIXED_S + 10.0)] * 5
    made = price(asked(earlier=small))
    assert FIXED_S + 10 * 16**0.4 < made.trial_s < FIXED_S + 10 * 16
    assert made.builds == 3
    near = [Earlier(weights(FACTS), 30.0)] * 3
    assert price(asked(earlier=[*small, *near])).trial_s == pytest.approx(30.0)
    assert price(asked(earlier=[Earlier(weights(FACTS) // 16, FIXED_S / 2)])).trial_s == FIXED_S


def test_without_an_earlier_build_it_is_a_guess_and_says_so() -> None:
    made = price(asked())
    assert made.builds == 0
    assert made.told().endswith("of catalog (no earlier build here: a guess)")


def test_the_budget_ends_the_search_and_what_is_there_already_costs_nothing() -> None:
    earlier = [Earlier(weights(FACTS), 30.0)]
    assert price(asked(earlier=earlier, budget_s=100.0)).seconds == 100.0 + 15.0 + 20.0
    done = price(asked(earlier=earlier, trials=0, archives=[], race_s=0.0))
    assert (done.seconds, done.bytes) == (0.0, 0)
    assert price(asked(earlier=earlier, first=True)).seconds == 260.0 + ONCE_S
    reference = price(asked(reference_tokens=2048)).bytes - price(asked()).bytes
    assert reference == 2048 * 49152 * 4


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.1, "5 s"), (43, "45 s"), (89, "90 s"), (119, "2 min"), (3600, "60 min"), (5400, "1.5 h"), (9000, "2.5 h")],
)
def test_seconds_are_told_as_estimates(seconds: float, told: str) -> None:
    assert duration(seconds) == told


@pytest.mark.parametrize(("count", "told"), [(1234, "1.2 kB"), (154e6, "150 MB"), (1.55e9, "1.6 GB"), (0, "0 kB")])
def test_bytes_are_told_as_estimates(count: float, told: str) -> None:
    assert size(count) == told


@given(st.integers(0, 20), st.floats(0, 1e3), st.floats(0, 1e4), st.floats(-10, 1e4), st.floats(0, 60))
def test_what_is_left_is_within_the_budget_and_shrinks_as_a_trial_goes_on(
    trials: int, each: float, begun: float, budget: float, race: float
) -> None:
    found = left_s(trials, each, begun, budget, race)
    assert race <= found <= max(budget, 0) + race
    assert left_s(trials, each, begun + 1, budget, race) <= found


# --- of a job -----------------------------------------------------------------------------------------------------


def test_a_resumed_build_is_asked_for_what_is_left(tmp_path: Path) -> None:
    catalog, wanted = tmp_path / "c", quick.Asked()
    job = replace(quick.job_of(wanted, tmp_path / "m"), facts=FACTS)
    six = Budget(trials=6, seconds=1e6)
    whole = forecast(job, None, None, six)
    quick.build(replace(wanted, formats=("f32",)), catalog, tmp_path / "m")
    known = Known(catalog)
    look = Freshness(job, known, six, 0)
    rest = forecast(job, known, look, six)
    assert whole is not None and rest is not None
    assert len(look.finished) == 2
    assert rest.builds == 1, "that of the two trials that are known"
    assert whole.bytes - rest.bytes >= archive_bytes(FACTS, Archive("f32")) + 2 * TRIAL_BYTES
    anew = forecast(replace(job, force=True), known, look, six)
    assert anew is not None and anew.bytes == whole.bytes
    assert forecast(replace(job, facts=None), known, look, six) is None


def test_a_build_with_nothing_left_costs_nothing(tmp_path: Path) -> None:
    catalog, wanted = tmp_path / "c", quick.Asked()
    job = replace(quick.job_of(wanted, tmp_path / "m"), facts=FACTS)
    quick.build(wanted, catalog, tmp_path / "m")
    look = Freshness(job, Known(catalog), Budget(trials=6, seconds=1e6), 0)
    assert look.state["raced"]
    found = forecast(job, Known(catalog), look, Budget(trials=6, seconds=1e6))
    assert found is not None
    assert (found.seconds, found.bytes) == (0.0, 0)


# --- progress -----------------------------------------------------------------------------------------------------


def test_a_stopwatch_tells_steps_apart_and_takes_them_up_again() -> None:
    now = [0.0]
    watch = Stopwatch(lambda: now[0])
    for step, seconds in (("import", 2.0), ("compile", 3.0), ("check", 1.0), ("measure", 4.0), ("check", 0.5)):
        watch.begin(step)
        now[0] += seconds
    watch.stop()
    now[0] += 10
    watch.begin("measure")
    now[0] += 1
    watch.stop()
    assert watch.parts == (("import", 2.0), ("compile", 3.0), ("check", 1.5), ("measure", 5.0))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


PARTS = (("import", 2.1), ("compile", 3.4), ("reference", 0.001), ("check", 1.0), ("measure", 4.2))


def test_a_log_has_one_line_for_each_trial_with_the_seconds_of_its_steps_and_what_is_left() -> None:
    stream = io.StringIO()
    talk = Progress(stream)
    for step in ("import", "compile", "reference", "limits", "check", "measure"):
        talk(Event(step, "kernel=own", 3, 12, left_s=100.0))
    talk(Event("done", "kernel=own", 3, 12, 10.7, "tpot_s 0.001", PARTS, 95.0))
    talk(Event("race", "4 survivors in interleaved rounds", 12, 12, left_s=20.0))
    talk(Event("rounds", "4 survivors, 3 rounds", 12, 12, left_s=19.0))
    (done, race) = stream.getvalue().splitlines()
    told = "done 10.7s  (import 2.1s compile 3.4s check 1.0s measure 4.2s)  kernel=own  best so far: tpot_s 0.001"
    assert done.endswith(f"[3/12] {told}  some 2 min left")
    assert race.endswith("[12/12] race  4 survivors in interleaved rounds  some 20 s left")


def test_a_terminal_shows_the_running_step_with_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    stream = Terminal()
    talk = Progress(stream)
    talk(Event("measure", "kernel=own, 5 rounds", 3, 12, left_s=61.0))
    assert stream.getvalue().endswith("[3/12] measure (some 60 s left) kernel=own, 5 rounds ...")


def test_a_build_tells_its_steps_in_order_and_their_seconds_in_the_end(tmp_path: Path) -> None:
    told: list[Event] = []
    quick.build(quick.Asked(formats=("f32",)), tmp_path / "c", tmp_path / "m", told.append)
    steps = [e.step for e in told if e.done == 1]
    assert steps[: steps.index("done") + 1] == ["import", "compile", "reference", "limits", "check", "done"]
    ended = [e for e in told if e.step == "done"]
    assert [tuple(name for name, _ in e.parts) for e in ended] == [
        ("import", "compile", "reference", "limits", "check")
    ] * 2
    assert all(sum(s for _, s in e.parts) <= (e.seconds or 0.0) for e in ended)
