"""What a race costs is known before it begins, and it keeps to that: stand-ins of known pace, a clock of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmbuild.process.child import Limits
from llmbuild.profiler import bench as benches
from llmbuild.profiler import rounds
from llmbuild.profiler.bench import BRIEF, Bench
from llmbuild.profiler.budget import LEAST_TOKENS, Pace, plan
from llmbuild.profiler.live import WHOLE, Answer, Live, MeterFound, Prepared
from llmbuild.profiler.noise import Shares
from llmbuild.profiler.protocol import Protocol, Quality, Subject
from llmbuild.profiler.statistics import few_of
from llmbuild.search.front import dominated, standings
from llmbuild.spec.measurement import SCREENED, Measurement, Reading
from llmbuild.spec.space import Point
from llmbuild.spec.trial import Trial
from llmbuild.spec.variant import Failure
from llmbuild.spec.workload import Workload

LOAD = Workload("chat", 128, 64, 192)
PROTOCOL = Protocol()
SCORING_S = 70.0


class Clock:
    """Time that passes when a stand-in works."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class StandIn(Live):
    """A variant of known pace; workers take some time to start and to open."""

    clock: Clock
    paces: dict[str, Pace]
    answered: dict[str, list[int]]

    def __init__(self, subject: Subject, limits: Limits) -> None:
        self.subject, self.readings, self.notes, self.operators = subject, {}, {}, ()
        self.decode_steps = WHOLE
        self.child: Any = SimpleNamespace(pid=0, close=lambda: None)
        self.clock.now += 0.3

    def begin(self, workload: Workload, warmup_s: float) -> None:
        self.open(3)
        self.readings["load_s"] = Reading(0.03, 0.03, 0.03, (0.03,))
        self.warm(workload, warmup_s)

    def score(self, quality: Quality) -> None:
        if quality.data is not None:
            self.clock.now += SCORING_S
            self.readings["quality_kl"] = Reading(0.01, 0.01, 0.01, ())

    def count(self) -> None:
        self.operators = ()

    def resume(self, known: Prepared, workload: Workload, warmup_s: float) -> None:
        self.readings = dict(known.readings)
        self.open(1)
        self.warm(workload, warmup_s)

    def open(self, times: int) -> list[float]:
        self.clock.now += 0.03 * times
        return [0.03] * times

    def warm(self, workload: Workload, seconds: float) -> float:
        end = self.clock.now + seconds
        while True:
            self.last = answer = self.answers(workload, 0.0)[0]
            if self.clock.now >= end:
                return answer.ttft_s + answer.tpot_s * (workload.output - 1)

    def answers(self, workload: Workload, seconds: float) -> list[Answer]:
        pace, tokens = self.paces[self.subject.variant], min(workload.output, self.decode_steps)
        self.answered.setdefault(self.subject.variant, []).append(tokens)
        self.clock.now += pace.ttft_s + min(pace.tpot_s * (tokens - 1), 0.2)
        count = max(1, math.ceil(seconds / pace.answer_s(tokens)))
        self.clock.now += count * pace.answer_s(tokens)
        return [Answer(pace.ttft_s, pace.tpot_s, (pace.tpot_s,) * (tokens - 1))] * count

    def meter(self) -> MeterFound:
        return MeterFound(None, "none here", {})


Start = Callable[[dict[str, Pace]], tuple[Bench, Clock, dict[str, list[int]]]]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Start:
    def started(paces: dict[str, Pace]) -> tuple[Bench, Clock, dict[str, list[int]]]:
        clock = Clock()
        made = type("Known", (StandIn,), {"clock": clock, "paces": paces, "answered": {}})
        monkeypatch.setattr(benches, "Live", made)
        for module in (benches, rounds):
            monkeypatch.setattr(module, "monotonic", clock)
        monkeypatch.setattr(rounds.noise, "Watch", lambda _: SimpleNamespace(shares=lambda: Shares(0.0, 0.0)))
        return Bench([LOAD], Quality(None, "none"), "m", Limits(), PROTOCOL), clock, made.answered  # type: ignore[attr-defined]

    return started


def subject(name: str) -> Subject:
    nowhere = Path("none")
    return Subject(name, name, nowhere, nowhere, nowhere, {}, "local-task", 2, 0.1)


def screened(bench: Bench, names: Sequence[str]) -> None:
    for name in names:
        found = bench.measure(subject(name), baseline=name == "default")
        assert not isinstance(found, Failure), found.reason


def everyone(measured: Sequence[Measurement], reach: float) -> set[str]:
    return {m.variant for m in measured}


SLOW = {"default": Pace(0.5, 0.05), **{f"v{i}": Pace(0.03 + 0.01 * i, 0.002 + 0.0006 * i) for i in range(6)}}
"""About what variants of SmolLM2-135M take on two cores."""


def test_a_race_of_slow_models_keeps_to_its_budget_with_shorter_answers(start: Start) -> None:
    bench, clock, answered = start(SLOW)
    screened(bench, list(SLOW))
    assert answered["v3"][-1] == LOAD.output, "the screen answers whole"
    begin = clock.now
    raced = bench.race([subject(name) for name in SLOW], everyone)
    assert clock.now - begin <= 1.05 * PROTOCOL.race_seconds
    assert len(raced) == len(SLOW)
    for (measured,) in raced:
        assert len(measured.readings["tpot_s"].samples) >= PROTOCOL.rounds
        assert "output tokens, to race within the budget" in measured.notes["race"]
    assert {answered[name][-1] for name in SLOW if name != "default"} == {answered["v0"][-1]}


def test_a_race_of_fast_models_answers_whole_and_uses_its_time(start: Start) -> None:
    fast = {"default": Pace(0.005, 0.0008), **{f"v{i}": Pace(0.001, 0.0001 * (1 + i)) for i in range(4)}}
    bench, clock, answered = start(fast)
    screened(bench, list(fast))
    begin = clock.now
    raced = bench.race([subject(name) for name in fast], everyone)
    assert 0.9 * PROTOCOL.race_seconds <= clock.now - begin <= PROTOCOL.race_seconds
    assert all("race" not in m.notes and len(m.readings["tpot_s"].samples) > 20 for (m,) in raced)
    assert answered["v0"][-1] == LOAD.output


def test_the_slowest_stand_as_screened_where_the_least_rounds_do_not_fit(start: Start) -> None:
    paces = {"default": Pace(0.3, 0.05), "quick": Pace(0.1, 0.01), "also": Pace(0.1, 0.01), "slow": Pace(3.0, 0.5)}
    bench, clock, _ = start(paces)
    screened(bench, list(paces))
    begin = clock.now
    raced = bench.race([subject(name) for name in paces], everyone)
    assert clock.now - begin <= 1.05 * PROTOCOL.race_seconds
    assert [m.variant for (m,) in raced] == ["default", "quick", "also"]
    assert "the 1 slowest of 3 survivors stand as they were screened" in raced[0][0].notes["race"]


def test_two_variants_run_the_least_rounds_whatever_they_take_and_it_is_told(start: Start) -> None:
    paces = {"default": Pace(4.0, 0.5), "one": Pace(3.0, 0.4), "other": Pace(3.0, 0.4)}
    bench, clock, _ = start(paces)
    screened(bench, list(paces))
    begin = clock.now
    raced = bench.race([subject(name) for name in paces], everyone)
    assert clock.now - begin > PROTOCOL.race_seconds
    assert [len(m.readings["tpot_s"].samples) for (m,) in raced] == [PROTOCOL.rounds] * 3
    assert "5 rounds, the least, take" in raced[0][0].notes["race"]


def test_what_was_never_screened_here_says_its_pace_in_one_short_answer(start: Start) -> None:
    bench, _, answered = start(SLOW)
    bench.measure(subject("default"), baseline=True)
    bench.race([subject("v0"), subject("v1")], everyone)
    assert LEAST_TOKENS in answered["v0"]


# --- the short screen -----------------------------------------------------------------------------------------------


def slow(than: float) -> dict[str, Pace]:
    return {"default": Pace(0.05, 0.02), "slow": Pace(0.05 * than, 0.02 * than)}


def judge(known: Sequence[Trial], objectives: Sequence[str], sizes: Trial) -> Callable[..., str]:
    return lambda brief, perfect: dominated(sizes, brief[0], known, objectives, (), perfect)


def trial(name: str, measured: tuple[Measurement, ...], parameters: int = 100) -> Trial:
    return Trial("", 0, Point(()), name, False, None, name, 10, parameters, measured, None, 0.0)


def measured_in(bench: Bench, name: str, judged: Callable[..., str] | None = None) -> Measurement:
    found = bench.measure(subject(name), name == "default", judged)
    assert not isinstance(found, Failure), found.reason
    return found[0]


TIMES = ("tpot_s", "ttft_s", "parameter_bytes")


@pytest.mark.parametrize(("than", "cut"), [(5.0, True), (1.5, False)])
def test_who_is_beaten_beyond_doubt_is_read_a_few_times_alone(start: Start, than: float, cut: bool) -> None:
    bench, clock, _ = start(slow(than))
    known = [trial("default", (measured_in(bench, "default"),))]
    begin = clock.now
    whole = measured_in(bench, "slow")
    full, begin = clock.now - begin, clock.now
    brief = measured_in(bench, "slow", judge(known, TIMES, trial("slow", ())))
    assert (SCREENED in brief.notes, clock.now - begin < 0.5 * full) == (cut, cut)
    assert len(brief.readings["tpot_s"].samples) == (BRIEF if cut else len(whole.readings["tpot_s"].samples))
    assert brief.readings["tpot_s"].median == pytest.approx(whole.readings["tpot_s"].median)


def test_a_smaller_one_is_measured_whole_however_slow(start: Start) -> None:
    bench, _, _ = start(slow(5.0))
    known = [trial("default", (measured_in(bench, "default"),))]
    assert SCREENED not in measured_in(bench, "slow", judge(known, TIMES, trial("slow", (), 90))).notes


@pytest.mark.parametrize(("best", "scored"), [(0.0, False), (0.005, True), (0.5, True)])
def test_quality_is_scored_before_the_screen_only_where_it_decides(start: Start, best: float, scored: bool) -> None:
    bench, clock, _ = start(slow(5.0))
    default = measured_in(bench, "default")
    kept = replace(default, readings={**default.readings, "quality_kl": Reading(best, best, best, ())})
    bench.quality = Quality(Path("held-out"), "")
    begin = clock.now
    brief = measured_in(bench, "slow", judge([trial("default", (kept,))], ("tpot_s", "quality_kl"), trial("slow", ())))
    assert (SCREENED in brief.notes) == (best < 0.01), "the slow one has 0.01"
    assert ("quality_kl" in brief.readings, clock.now - begin > SCORING_S) == (scored, scored)


def test_who_was_screened_is_dominated_and_takes_no_objective_from_the_others(start: Start) -> None:
    bench, _, _ = start(slow(5.0))
    default = trial("default", (measured_in(bench, "default"),))
    out = trial("slow", (measured_in(bench, "slow", judge([default], TIMES, trial("slow", ()))),))
    found = {s.variant: s for s in standings([default, out], LOAD.name, TIMES, ())}
    assert (found["default"].status, found["slow"].status) == ("pareto", "dominated")
    assert found["slow"].reason.startswith("screened: default is ")
    alone = standings([out], LOAD.name, TIMES, ())
    assert [s.status for s in alone] == ["pareto"], "nobody is left who beats it"


def test_who_was_screened_is_judged_again_by_what_is_asked_now(start: Start) -> None:
    bench, _, _ = start(slow(5.0))
    default = trial("default", (measured_in(bench, "default"),))
    bench.quality = Quality(Path("held-out"), "")
    brief = measured_in(bench, "slow", judge([default], ("tpot_s",), trial("slow", (), 90)))
    assert "quality_kl" not in brief.readings
    out = trial("slow", (brief,), 90)
    asked = {
        ("tpot_s",): "dominated",
        ("tpot_s", "parameter_bytes"): "pareto",
        ("tpot_s", "parameter_bytes", "quality_kl"): "infeasible",
    }
    found = {
        names: {s.variant: s.status for s in standings([default, out], LOAD.name, names, ())}["slow"] for names in asked
    }
    assert found == asked, "it is the smaller one, and its quality was never scored"


@given(st.lists(st.floats(1e-6, 1e3), min_size=2, max_size=5))
def test_a_few_samples_have_a_wide_interval(samples: list[float]) -> None:
    found = few_of(samples)
    assert found.low <= min(samples) <= found.median <= max(samples) <= found.high
    assert found.samples == tuple(samples)


# --- the plan ---------------------------------------------------------------------------------------------------------

paces = st.builds(Pace, st.floats(1e-4, 5), st.floats(1e-5, 1), st.floats(0, 0.2))


@given(st.lists(paces, min_size=2, max_size=8), paces, st.integers(1, 256), st.floats(1, 60))
def test_a_plan_is_within_its_budget_or_says_so(asked: list[Pace], baseline: Pace, output: int, seconds: float) -> None:
    made = plan(asked, baseline, output, seconds, PROTOCOL, starts=True)
    assert made.least_s <= seconds or "more than the" in made.note
    assert 2 <= len(made.racers) <= len(asked)
    assert min(output, LEAST_TOKENS) <= made.tokens <= output
    assert made.baseline_tokens <= made.tokens
    dropped = [p for i, p in enumerate(asked) if i not in made.racers]
    kept = [asked[i] for i in made.racers]
    cost = lambda p: p.visit_s(made.tokens, PROTOCOL.visit_s)  # noqa: E731
    assert all(cost(p) >= max(map(cost, kept)) for p in dropped)
