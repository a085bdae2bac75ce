from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmbuild.search.front import Entrant, contenders, decided, dominates, standings
from llmbuild.spec.measurement import Measurement, Reading
from llmbuild.spec.slo import parse_bound
from llmbuild.spec.space import Point
from llmbuild.spec.trial import Trial
from llmbuild.spec.variant import Failure
from llmbuild.spec.workload import Workload

WORKLOAD = Workload("w", 4, 4, 8)


def exact(value: float) -> Reading:
    return Reading(value, value, value, ())


def trial(name: str, failure: Failure | None = None, notes: dict | None = None, **readings: Reading) -> Trial:
    found = Measurement(name, name, "a", WORKLOAD, "m", readings, {}, notes or {})
    measured = () if failure else (found,)
    return Trial("s", 0, Point(()), name, False, "p", "a", 1000, 1000, measured, failure, 0.0)


def status(trials: list[Trial], *bounds: str) -> dict[str, str]:
    found = standings(trials, "w", ("tpot_s", "quality_kl"), tuple(parse_bound(b) for b in bounds))
    return {s.variant: s.status for s in found}


def test_beaten_in_everything_beyond_the_interval_is_dominated() -> None:
    fast = trial("fast", tpot_s=Reading(1.0, 0.9, 1.1, ()), quality_kl=exact(0.0))
    slow = trial("slow", tpot_s=Reading(2.0, 1.9, 2.1, ()), quality_kl=exact(0.5))
    assert status([fast, slow]) == {"fast": "pareto", "slow": "dominated"}


def test_behind_within_the_interval_is_undecided() -> None:
    one = trial("one", tpot_s=Reading(1.0, 0.8, 1.3, ()), quality_kl=exact(0.0))
    two = trial("two", tpot_s=Reading(1.1, 0.9, 1.4, ()), quality_kl=exact(0.0))
    assert status([one, two]) == {"one": "pareto", "two": "undecided"}


def test_the_same_variant_twice_never_dominates_itself() -> None:
    a = trial("a", tpot_s=Reading(1.0, 0.99, 1.01, ()), quality_kl=exact(0.1))
    b = trial("b", tpot_s=Reading(1.0, 0.99, 1.01, ()), quality_kl=exact(0.1))
    assert status([a, b]) == {"a": "pareto", "b": "pareto"}


def test_a_tie_in_a_noiseless_objective_saves_nobody() -> None:
    fast = trial("fast", tpot_s=Reading(1.0, 0.9, 1.1, ()), quality_kl=exact(1.0e-9))
    slow = trial("slow", tpot_s=Reading(2.0, 1.9, 2.1, ()), quality_kl=exact(0.9e-9))
    assert status([fast, slow])["slow"] == "dominated"


def test_a_broken_bound_is_infeasible_with_its_reason() -> None:
    bad = trial("bad", tpot_s=exact(1.0), quality_kl=exact(0.5))
    found = standings([bad], "w", ("tpot_s",), (parse_bound("quality_kl<=0.1"),))
    assert (found[0].status, found[0].reason) == ("infeasible", "quality_kl is 0.5, quality_kl<=0.1 asked")


def test_quality_that_is_marked_absent_breaks_no_bound() -> None:
    shape = trial("shape", notes={"quality": "absent: random-init weights"}, tpot_s=exact(1.0))
    assert status([shape], "quality_kl<=0.1") == {"shape": "pareto"}


def test_a_failure_stands_with_its_reason() -> None:
    dead = trial("dead", failure=Failure("compile", "crashed", "cmd", "", lasting=True))
    found = standings([dead], "w", ("tpot_s",), ())
    assert (found[0].status, found[0].reason) == ("failed", "compile: crashed")


def raced(name: str, tpot: list[float], ttft: list[float], memory: float = 1.0, **more: object) -> Trial:
    """A variant of one race, with the samples of each round."""
    middle = {"tpot_s": sorted(tpot)[len(tpot) // 2], "ttft_s": sorted(ttft)[len(ttft) // 2]}
    taken = {"tpot_s": tuple(tpot), "ttft_s": tuple(ttft)}
    found = {n: Reading(m, m, m, taken[n]) for n, m in middle.items()}
    measured = Measurement(name, name, "a", WORKLOAD, "m", found, {}, {}, session="one", **more)
    measured.readings["peak_memory_bytes"] = exact(memory)
    return Trial("s", 0, Point(()), name, False, "p", "a", 1000, 1000, (measured,), None, 0.0)


def drifting(factor: float, rounds: int = 24) -> list[float]:
    return [factor * (1 + 0.9 * (i % 7)) * (1 + 0.002 * ((i * 5) % 3)) for i in range(rounds)]


TIMES = ("tpot_s", "ttft_s")


def test_variants_of_one_race_are_compared_round_by_round_whatever_the_drift() -> None:
    fast, slow = raced("fast", drifting(1.0), drifting(1.0)), raced("slow", drifting(1.05), drifting(1.05))
    found = {s.variant: s.status for s in standings([fast, slow], "w", TIMES, ())}
    assert found == {"fast": "pareto", "slow": "dominated"}


def test_equals_of_one_race_stay_and_the_larger_one_is_called_equal() -> None:
    small, large = raced("b", drifting(1.0), drifting(1.0), 1.0), raced("a", drifting(1.0), drifting(1.0), 2.0)
    found = {s.variant: (s.status, s.reason) for s in standings([small, large], "w", TIMES, ())}
    assert found == {"b": ("pareto", ""), "a": ("undecided", "equals b within 1% in every objective")}


def test_a_tie_in_time_is_decided_by_the_other_objective() -> None:
    one, two = raced("one", drifting(1.0), drifting(1.0)), raced("two", drifting(1.0), drifting(1.2))
    found = {s.variant: s.status for s in standings([one, two], "w", TIMES, ())}
    assert found == {"one": "pareto", "two": "dominated"}


def test_only_those_on_whom_the_front_depends_race_on() -> None:
    noisy = [t * (0.7, 1.0, 1.4)[i % 3] for i, t in enumerate(drifting(3.0))]
    clear, behind = raced("clear", drifting(1.0), drifting(1.0)), raced("behind", drifting(2.0), drifting(2.0))
    one, rival = raced("one", drifting(0.5), drifting(3.0)), raced("rival", drifting(0.4), noisy)
    trials = [clear, behind, one, rival]
    assert contenders(trials, [t.measurements[0] for t in trials], TIMES) == {"one", "rival"}


def test_what_no_round_within_reach_can_decide_is_given_up() -> None:
    noisy = [t * (0.7, 1.0, 1.4)[i % 3] for i, t in enumerate(drifting(1.0))]
    trials = [raced("one", drifting(1.0), drifting(1.0)), raced("two", noisy, drifting(1.0))]
    measured = [t.measurements[0] for t in trials]
    assert [contenders(trials, measured, TIMES, reach) for reach in (30, math.inf)] == [set(), {"one", "two"}]


def test_an_undecided_pair_that_cannot_change_the_front_races_only_when_no_other_does() -> None:
    noisy = [t * (0.7, 1.0, 1.4)[i % 3] for i, t in enumerate(drifting(1.0))]
    memory = {"a": (drifting(1.0), drifting(1.2)), "b": (drifting(1.2), drifting(1.0))}
    trials = [raced(name, *times) for name, times in memory.items()]
    measured = [replace(t.measurements[0], readings={**t.measurements[0].readings}) for t in trials]
    for found, taken in zip(measured, (noisy, drifting(1.0)), strict=True):
        found.readings["e2e_s"] = Reading(1.0, 0.5, 2.0, tuple(taken))
    assert contenders(trials, measured, (*TIMES, "e2e_s")) == {"a", "b"}


def test_nobody_races_on_once_everything_is_decided() -> None:
    trials = [raced(str(f), drifting(f), drifting(1 / f)) for f in (1.0, 1.2, 1.5)]
    assert contenders(trials, [t.measurements[0] for t in trials], TIMES) == set()


def test_estimated_energy_ranks_nothing() -> None:
    joules = {"energy_j_per_token": Reading(1.0, 1.0, 1.0, ())}
    trials = [trial("a", tpot_s=exact(1.0), **joules), trial("b", tpot_s=exact(2.0), energy_j_per_token=exact(0.1))]
    modelled = [replace(t, measurements=(replace(t.measurements[0], energy_source="model"),)) for t in trials]
    metered = [replace(t, measurements=(replace(t.measurements[0], energy_source="rapl"),)) for t in trials]
    mixed = [modelled[0], metered[1]]

    def stand(found: list[Trial]) -> list[str]:
        return [s.status for s in standings(found, "w", ("tpot_s", "energy_j_per_token"), ())]

    assert (stand(metered), stand(modelled), stand(mixed)) == (
        ["pareto", "pareto"],
        ["pareto", "dominated"],
        ["pareto", "dominated"],
    )


readings = st.tuples(st.floats(0.1, 10), st.floats(0, 0.2)).map(lambda t: Reading(t[0], t[0] - t[1], t[0] + t[1], ()))
entrants = st.lists(st.tuples(readings, readings), min_size=1, max_size=12)


@given(entrants)
def test_the_front_is_never_empty_and_nobody_on_it_is_dominated(rows: list) -> None:
    trials = [trial(str(i), tpot_s=a, quality_kl=b) for i, (a, b) in enumerate(rows)]
    found = status(trials)
    by_name = {t.variant: Entrant(t.variant, t.measurements[0].readings) for t in trials}
    front = [name for name, s in found.items() if s in ("pareto", "undecided")]
    assert front
    assert not [(a, b) for a in front for b in front if a != b and dominates(by_name[a], by_name[b])]


@given(entrants)
def test_everyone_off_the_front_is_dominated_by_someone(rows: list) -> None:
    trials = [trial(str(i), tpot_s=a, quality_kl=b) for i, (a, b) in enumerate(rows)]
    by_name = {t.variant: Entrant(t.variant, t.measurements[0].readings) for t in trials}
    off = [name for name, s in status(trials).items() if s == "dominated"]
    assert all(any(dominates(by_name[o], by_name[name]) for o in by_name if o != name) for name in off)


positive = st.floats(0.1, 10)
races = st.lists(
    st.tuples(*(st.lists(positive, min_size=6, max_size=6) for _ in range(3)), positive), min_size=2, max_size=6
)


@given(races)
def test_the_front_of_a_race_is_never_empty(rows: list) -> None:
    trials = [raced(str(i), a, b, c[0]) for i, (a, b, c, _) in enumerate(rows)]
    found = standings(trials, "w", (*TIMES, "peak_memory_bytes"), ())
    assert any(s.status in ("pareto", "undecided") for s in found)


# --- when more rounds add nothing ---------------------------------------------------------------------------------

FRONT = (
    trial("fast", tpot_s=Reading(1.0, 0.95, 1.05, ()), quality_kl=exact(0.1)),
    trial("exact", tpot_s=Reading(3.0, 2.9, 3.1, ()), quality_kl=exact(0.0)),
)


@pytest.mark.parametrize(
    ("tpot", "kl", "expected"),
    [
        ((2.0, 1.9, 2.1), 0.05, True),  # between both, by either objective
        ((4.0, 3.9, 4.1), 0.2, True),  # behind both
        ((0.5, 0.4, 0.6), 0.0, True),  # ahead of both
        ((1.0, 0.9, 1.1), 0.2, False),  # perhaps the equal of the first in time
        ((1.0, 0.9, 1.1), 0.05, False),
        ((3.0, 2.8, 3.2), 0.05, False),  # the second is better in quality, and perhaps faster
        ((1.0, 0.9, 1.1), 0.0, False),
        ((5.0, 4.9, 5.1), 0.3, True),  # behind both, and the equal of one who is behind both
    ],
)
def test_a_variant_is_decided_once_it_stands_apart_from_the_front(
    tpot: tuple[float, float, float], kl: float, expected: bool
) -> None:
    new = trial("new", tpot_s=Reading(*tpot, ()), quality_kl=exact(kl))
    beaten = trial("beaten", tpot_s=Reading(5.0, 4.9, 5.1, ()), quality_kl=exact(0.3))
    names = ("tpot_s", "quality_kl")
    found = decided(replace(new, measurements=()), new.measurements[0], [*FRONT, beaten], names, ())
    assert found == expected


def test_what_a_bound_leaves_out_is_decided_unless_rounds_may_move_it() -> None:
    new = trial("new", tpot_s=Reading(1.0, 0.9, 1.1, ()), quality_kl=exact(0.2))
    asked = replace(new, measurements=()), new.measurements[0], FRONT, ("tpot_s", "quality_kl")
    assert decided(*asked, [parse_bound("quality_kl<=0.15")])
    assert not decided(*asked, [parse_bound("tpot_s<=1.05")])
    assert not decided(asked[0], asked[1], (), ("tpot_s",), ()), "with nobody to stand apart from"
