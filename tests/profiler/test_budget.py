"""What a race costs is known before it begins, and it keeps to that: stand-ins of known pace, a clock of their own."""

from __future__ import annotations

import math
from collections import Counter
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
from llmbuild.profiler import live as lives
from llmbuild.profiler import rounds
from llmbuild.profiler.bench import BRIEF, Bench
from llmbuild.profiler.budget import FEWEST, LEAST_TOKENS, SLOW_PROMPT_S, Pace, plan, screen
from llmbuild.profiler.live import WHOLE, Answer, Live, MeterFound
from llmbuild.profiler.noise import Shares
from llmbuild.profiler.protocol import Prepared, Protocol, Quality, Subject
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


NOW: dict[str, Pace] = {}
"""Paces other than at first: the machine drifts."""


class StandIn(Live):
    """A variant of known pace; workers take some time to start and to open."""

    clock: Clock
    paces: dict[str, Pace]
    answered: dict[str, list[int]]
    prompted: Counter[str]

    @staticmethod
    def start(driver: str, limits: Limits) -> Any:
        return SimpleNamespace(pid=0, running=True, close=lambda: None)

    def __init__(self, subject: Subject, limits: Limits, started: Any = None) -> None:
        known = subject.known or Prepared({}, {})
        self.subject, self.readings, self.notes = subject, dict(known.readings), dict(known.notes)
        self.operators = known.operators
        self.decode_steps, self.prompt = WHOLE, None
        self.child = started or self.start(subject.driver, limits)
        self.clock.now += 0.0 if started else 0.3

    def begin(self, workload: Workload, warmup_s: float) -> None:
        self._load()
        self._warm_up(workload, warmup_s)

    def score(self, quality: Quality) -> None:
        if quality.data is not None and "quality_kl" not in self.readings:
            self.clock.now += SCORING_S
            self.readings["quality_kl"] = Reading(0.01, 0.01, 0.01, ())

    def count(self) -> None:
        self.operators = ()

    def open(self, times: int) -> list[float]:
        self.clock.now += 0.03 * times
        return [0.03] * times

    def answers(self, workload: Workload, seconds: float, settled: bool = False) -> list[Answer]:
        name, tokens = self.subject.variant, min(workload.output, self.decode_steps)
        pace = NOW.get(name, self.paces[name])
        self.answered.setdefault(self.subject.variant, []).append(tokens)
        self.prompted[self.subject.variant] += self.prompt is None
        mine = pace if self.prompt is None else replace(pace, ttft_s=0.0)
        if not settled:
            self.clock.now += (mine.ttft_s <= SLOW_PROMPT_S) * mine.ttft_s + min(pace.tpot_s * (tokens - 1), 0.2)
        count = max(1, math.ceil(seconds / mine.answer_s(tokens)))
        self.clock.now += count * mine.answer_s(tokens)
        first = pace.ttft_s if self.prompt is None else self.prompt.median
        return [Answer(first, pace.tpot_s, (pace.tpot_s,) * (tokens - 1))] * count

    def meter(self) -> MeterFound:
        return MeterFound(None, "none here", {})


Start = Callable[[dict[str, Pace]], tuple[Bench, Clock, dict[str, list[int]]]]
HELD = Path("held-out")


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Start:
    def started(paces: dict[str, Pace]) -> tuple[Bench, Clock, dict[str, list[int]]]:
        clock = Clock()
        made = type("Known", (StandIn,), {"clock": clock, "paces": paces, "answered": {}, "prompted": Counter()})
        monkeypatch.setattr(benches, "Live", made)
        for module in (benches, rounds, lives):
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
    return {"default": Pace(0.01, 0.004), "slow": Pace(0.01 * than, 0.004 * than)}


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


@given(paces, st.integers(1, 256))
def test_a_screening_is_within_its_time_or_has_the_least_that_has_an_interval(pace: Pace, output: int) -> None:
    made = screen(pace, output, PROTOCOL)
    took = made.rounds * pace.visit_s(made.tokens, PROTOCOL.visit_s)
    least = min(output, LEAST_TOKENS)
    few = BRIEF if BRIEF * pace.visit_s(least, PROTOCOL.visit_s) <= 2 * PROTOCOL.screen_s else FEWEST
    assert took <= PROTOCOL.screen_s or (made.rounds, made.tokens) == (few, least)
    assert least <= made.tokens <= output
    assert (made.note(pace, output) == "") == (made.tokens == output)
    whole = PROTOCOL.rounds * pace.visit_s(output, PROTOCOL.visit_s)
    assert whole > PROTOCOL.screen_s or (made.rounds, made.tokens) == (PROTOCOL.rounds, output)


# --- a slow baseline ----------------------------------------------------------------------------------------------

NAIVE = {"default": Pace(4.5, 0.06), "v0": Pace(0.055, 0.0037), "v1": Pace(0.06, 0.0048), "v2": Pace(0.058, 0.004)}
"""About what the compiler's default and our kernels take for SmolLM2-135M on two cores."""


def test_a_slow_baseline_is_read_in_few_tokens_and_says_so(start: Start) -> None:
    bench, clock, answered = start(NAIVE)
    measured = measured_in(bench, "default")
    assert clock.now <= 25, "five whole answers would take 65 s"
    assert set(answered["default"]) == {LEAST_TOKENS}
    assert measured.notes["baseline"].startswith("answers of 8 of 64 output tokens in at least 3 rounds: a whole one")
    readings = {name: measured.readings[name].median for name in ("ttft_s", "tpot_s", "e2e_s", "output_tokens_per_s")}
    whole = 4.5 + 63 * 0.06
    expected = {"ttft_s": 4.5, "tpot_s": 0.06, "e2e_s": whole, "output_tokens_per_s": 64 / whole}
    assert readings == pytest.approx(expected), "those of an answer are computed for all of its tokens"


def test_what_takes_minutes_is_read_twice(start: Start) -> None:
    bench, clock, _ = start({"default": Pace(35.0, 0.5)})
    measured = measured_in(bench, "default")
    assert samples_of((measured,)) == FEWEST
    assert clock.now <= 3.2 * 35 + 15
    reading = measured.readings["ttft_s"]
    assert reading.low <= 35.0 <= reading.high


def test_beside_others_a_baseline_with_a_slow_prompt_only_decodes(start: Start) -> None:
    bench, clock, _ = start(NAIVE)
    default = measured_in(bench, "default")
    prompts, begin = bench_prompts(bench)["default"], clock.now
    measured = measured_in(bench, "v0")
    assert bench_prompts(bench)["default"] == prompts
    assert clock.now - begin <= 10, "five visits with the prompt would take 25 s"
    assert "without the prompt: it takes 4.5 s, and was read before" in measured.notes["baseline"]
    ratio = measured.ratios["ttft_s"]
    assert ratio.median == pytest.approx(0.055 / 4.5)
    off = default.readings["ttft_s"].high / default.readings["ttft_s"].median
    assert ratio.high / ratio.median >= off
    assert measured.ratios["tpot_s"].median == pytest.approx(0.0037 / 0.06)


def test_a_drift_since_the_prompt_was_read_widens_what_it_is_part_of(start: Start) -> None:
    bench, _, _ = start(NAIVE)
    measured_in(bench, "default")
    calm = measured_in(bench, "v0")
    NOW["default"] = Pace(4.5, 0.06 * 1.2)
    try:
        drifted = measured_in(bench, "v1")
    finally:
        NOW.clear()
    spread = {m.variant: m.ratios["ttft_s"].high / m.ratios["ttft_s"].low for m in (calm, drifted)}
    assert spread["v1"] == pytest.approx(spread["v0"] * 1.2**2)
    assert drifted.ratios["tpot_s"].median == pytest.approx(0.0048 / 0.072), "decoding is paired as ever"


def test_a_race_with_a_slow_baseline_keeps_to_its_budget_and_the_baselines_prompt(start: Start) -> None:
    bench, clock, _ = start(NAIVE)
    screened(bench, list(NAIVE))
    alone = bench._alone[LOAD.name].ttft_s
    prompts, begin = bench_prompts(bench)["default"], clock.now
    raced = {found[0].variant: found[0] for found in bench.race([subject(name) for name in NAIVE], everyone)}
    assert clock.now - begin <= 1.05 * PROTOCOL.race_seconds
    assert bench_prompts(bench)["default"] == prompts
    first = raced["default"].readings["ttft_s"]
    assert (first.median, first.low, first.high, first.samples) == (alone.median, alone.low, alone.high, ())
    assert len(raced["v0"].readings["tpot_s"].samples) >= PROTOCOL.race_rounds


def bench_prompts(bench: Bench) -> Counter[str]:
    return Counter(benches.Live.prompted)  # type: ignore[attr-defined]


# --- what is known ------------------------------------------------------------------------------------------------


def test_a_known_baseline_is_opened_and_nothing_of_it_is_read_again(start: Start) -> None:
    bench, _, _ = start(SLOW)
    bench.quality = Quality(HELD, "")
    before = measured_in(bench, "default")
    bench, clock, answered = start(SLOW)
    bench.quality = Quality(HELD, "")
    known = Prepared.of([before])
    assert bench.open_baseline(replace(subject("default"), known=known)) is None
    assert (bench.has_baseline, answered["default"]) == (True, [LEAST_TOKENS])
    assert clock.now < 3
    measured = measured_in(bench, "v0")
    assert measured.ratios["tpot_s"].median == pytest.approx(0.002 / 0.05)
    raced = bench.race([replace(subject("v0"), known=Prepared.of([measured]))])
    assert raced[0][0].readings["quality_kl"] == before.readings["quality_kl"]


def test_known_racers_are_neither_scored_nor_asked_for_their_pace(start: Start) -> None:
    bench, _, _ = start(SLOW)
    bench.quality = Quality(HELD, "")
    known = {name: Prepared.of([measured_in(bench, name)]) for name in ("default", "v0", "v1")}
    bench, clock, answered = start(SLOW)
    bench.quality = Quality(HELD, "")
    bench.open_baseline(replace(subject("default"), known=known["default"]))
    begin = clock.now
    raced = bench.race([replace(subject(name), known=known[name]) for name in ("v0", "v1")], everyone)
    assert clock.now - begin <= 1.05 * PROTOCOL.race_seconds
    assert [m.readings["quality_kl"].median for (m,) in raced] == [0.01] * 3
    assert answered["v0"].count(LEAST_TOKENS) <= 1 or answered["v0"][-1] == LEAST_TOKENS


def measured_with(notes: dict[str, str], protocol: int = 3) -> Measurement:
    readings = {name: Reading(1.0, 1.0, 1.0, ()) for name in ("load_s", "tpot_s", "ttft_s", "quality_kl", "e2e_s")}
    return Measurement("k", "v", "a", LOAD, "m", readings, {}, notes, protocol=protocol)


def test_what_is_known_is_what_holds_for_every_process_and_was_read_at_full_speed() -> None:
    plain = Prepared.of([measured_with({"check": "well", "noise": "some", "quality": "told", "race": "short"})])
    assert plain is not None
    assert (set(plain.readings), dict(plain.notes)) == ({"load_s", "quality_kl"}, {"check": "well", "quality": "told"})
    assert {name: set(of) for name, of in plain.timed.items()} == {"chat": {"ttft_s", "tpot_s"}}
    slowed = Prepared.of([measured_with({"held back": "pinned to CPU 0"})])
    assert slowed is not None and set(slowed.readings) == {"quality_kl"}
    brief = Prepared.of([measured_with({SCREENED: "by another", "quality": "absent: not scored"})])
    assert brief is not None and "quality" not in brief.notes
    assert Prepared.of([]) is None
    assert Prepared.of([measured_with({}, protocol=2)]) is None


def test_the_next_variants_worker_starts_while_it_is_compiled_and_ends_with_the_bench(start: Start) -> None:
    bench, _, _ = start(SLOW)
    assert bench._spare is None
    measured_in(bench, "default")
    spare = bench._spare
    assert spare is not None
    used = [bench._start(subject(name)) for name in ("v0", "v1")]
    assert [live.child is spare.child for live in used] == [True, False]
    measured_in(bench, "v0")
    assert bench._spare is not None
    ended = bench._spare.child
    bench._spare.child.running = False  # type: ignore[misc]
    assert bench._start(subject("v0")).child is not ended
    measured_in(bench, "v0")
    closed: list[bool] = []
    bench._spare.child.close = lambda: closed.append(True)  # type: ignore[method-assign]
    bench.close()
    assert (closed, bench._spare) == ([True], None)


# --- when it is decided -------------------------------------------------------------------------------------------


def test_a_variant_whose_standing_is_decided_has_no_more_than_the_least_rounds(start: Start) -> None:
    bench, _, _ = start({"default": Pace(0.002, 0.0002), "v0": Pace(0.001, 0.0001)})
    measured_in(bench, "default")
    asked: list[int] = []

    def decided(reached: Measurement) -> bool:
        asked.append(len(reached.readings["tpot_s"].samples))
        assert reached.ratios["tpot_s"].median == pytest.approx(0.5)
        return len(asked) > 2

    rounds = [samples_of(bench.measure(subject("v0"), False, None, decided)) for _ in range(2)]
    assert asked == [5, 10, 5]
    assert rounds[0] > rounds[1] == PROTOCOL.rounds


def samples_of(found: tuple[Measurement, ...] | Failure) -> int:
    assert not isinstance(found, Failure)
    return len(found[0].readings["tpot_s"].samples)


def test_a_race_in_which_nobody_is_undecided_ends_with_its_first_look(start: Start) -> None:
    fast = {"default": Pace(0.005, 0.0008), **{f"v{i}": Pace(0.001, 0.0001 * (1 + i)) for i in range(4)}}
    bench, clock, _ = start(fast)
    screened(bench, list(fast))
    begin = clock.now
    raced = bench.race([subject(name) for name in fast], lambda measured, reach: set())
    assert {samples_of(found) for found in raced} == {PROTOCOL.race_rounds}
    assert clock.now - begin < PROTOCOL.race_seconds / 2
