from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState

from llmbuild import digest
from llmbuild.search import surrogate
from llmbuild.search.candidates import Candidates, draw, neighbours
from llmbuild.search.hypervolume import expected_gain, free_cells, hypervolume, nondominated
from llmbuild.search.knobs.space import KNOBS
from llmbuild.search.losses import Interest, Losses, Reach
from llmbuild.search.replay import read, replay
from llmbuild.search.sampler import FEASIBLE, POINT
from llmbuild.search.study import Study, params_of, sampler_of
from llmbuild.spec.recipe import SAMPLERS
from llmbuild.spec.space import Condition, Knob, Point, Space

SMALL = Space(
    (
        Knob("a", "model", (0, 1, 2), 0, ""),
        Knob("b", "codegen", (0, 1, 2, 3), 0, "", when=(Condition("a", (1, 2)),)),
        Knob("c", "runtime", (False, True), False, ""),
        Knob("d", "codegen", ("x", "y", "z"), "x", ""),
    )
)
HALF = Space(tuple(replace(knob, domain=(False,)) if knob.name == "c" else knob for knob in SMALL.knobs))
HUGE = Space(tuple(Knob(f"k{i}", "codegen", tuple(range(6)), 0, "") for i in range(20)))

fronts = st.integers(1, 4).flatmap(
    lambda d: st.lists(st.lists(st.integers(0, 6), min_size=d, max_size=d), min_size=1, max_size=6)
)


# --- hypervolume -------------------------------------------------------------------------------------------------


@given(fronts)
def test_volume_counts_the_unit_cells_some_row_is_better_than(rows: list[list[int]]) -> None:
    losses = np.array(rows, dtype=float)
    reference = np.full(losses.shape[1], 5.0)
    cells = np.stack(np.meshgrid(*[np.arange(5)] * losses.shape[1], indexing="ij"), -1).reshape(-1, losses.shape[1])
    covered = (losses[None, :, :] <= cells[:, None, :]).all(-1).any(-1).sum()
    assert hypervolume(losses, reference) == pytest.approx(covered)


@given(fronts)
def test_free_cells_fill_what_the_front_leaves(rows: list[list[int]]) -> None:
    losses, d = np.array(rows, dtype=float), len(rows[0])
    reference, floor = np.full(d, 5.0), np.zeros(d)
    low, high = free_cells(losses, reference)
    sizes = np.maximum(0.0, np.minimum(high, reference) - np.maximum(low, floor)).prod(-1)
    assert sizes.sum() + hypervolume(losses, reference) == pytest.approx(5.0**d)


@settings(max_examples=15)
@given(fronts, st.integers(0, 100))
def test_expected_gain_is_the_mean_gain_of_draws(rows: list[list[int]], seed: int) -> None:
    losses, source = np.array(rows, dtype=float), np.random.default_rng(seed)
    d = losses.shape[1]
    reference, mean, spread = np.full(d, 5.0), source.uniform(0, 6, (1, d)), np.full((1, d), 0.7)
    base = hypervolume(losses, reference)
    drawn = mean + spread * source.standard_normal((2000, d))
    better = (drawn < reference).all(-1) & ~(losses[:, None] <= drawn).all(-1).any(0)  # the others gain nothing
    gains = np.zeros(len(drawn))
    gains[better] = [hypervolume(np.vstack([losses, row]), reference) - base for row in drawn[better]]
    expected = expected_gain(mean, spread, losses, reference)[0]
    unseen = 2e-3  # gains so rare that 2,000 draws may show none of them
    assert abs(expected - np.mean(gains)) <= 5 * np.std(gains) / np.sqrt(len(gains)) + unseen


def test_the_front_keeps_one_of_equal_rows() -> None:
    rows = np.array([[1.0, 2.0], [1.0, 2.0], [2.0, 1.0], [2.0, 2.0]])
    assert nondominated(rows).tolist() == [[1.0, 2.0], [2.0, 1.0]]


# --- surrogate ---------------------------------------------------------------------------------------------------


def test_a_process_finds_which_choices_matter() -> None:
    codes = np.array([[a, b, c] for a in range(3) for b in range(4) for c in range(2)])
    values = codes[:, 0] * 1.0 + (codes[:, 2] == 1) * 0.3
    taken = np.arange(0, len(codes), 2) + np.arange(12) % 2
    process, _ = surrogate.fit(codes[taken], values[taken])
    mean, spread = process.predict(codes)
    assert np.corrcoef(mean, values)[0, 1] > 0.98
    assert process.exponents[1] < process.exponents[0]
    assert (spread >= 0).all()


def test_the_slope_is_that_of_the_likelihood() -> None:
    source = np.random.default_rng(0)
    codes = source.integers(0, 3, (9, 3))
    target = source.standard_normal(9)
    differ = (codes[:, None, :] != codes[None, :, :]).astype(float)

    def likelihood(p: np.ndarray) -> float:
        covariance = np.exp(-(differ @ np.exp(p[:-1]))) + (np.exp(p[-1]) + surrogate.JITTER) * np.eye(9)
        return float(-0.5 * target @ np.linalg.solve(covariance, target) - 0.5 * np.linalg.slogdet(covariance)[1])

    at, step = np.array([-0.3, 0.2, -1.0, -2.0]), 1e-5
    numeric = [(likelihood(at + step * e) - likelihood(at - step * e)) / (2 * step) for e in np.eye(4)]
    assert surrogate._slope(at, differ, target) == pytest.approx(numeric, rel=1e-4, abs=1e-6)


# --- candidates and samplers -------------------------------------------------------------------------------------


@given(st.integers(0, 1000))
def test_what_is_drawn_and_its_neighbours_are_of_the_space(seed: int) -> None:
    space = Space(KNOBS)
    point = draw(space, random.Random(seed))
    assert space.contains(point)
    near = list(islice(neighbours(space, point), 40))
    assert near and all(space.contains(n) and n != point for n in near)


def test_a_huge_space_is_never_listed() -> None:
    candidates = Candidates(HUGE, random.Random(0))
    assert candidates.all is None
    assert 100 < len(candidates.unknown(set(), [HUGE.default()])) < 5000
    assert candidates.any(set()) is not None


BOTH = (Reach(1.0), Reach(1.0))


def search(space: Space, name: str, seed: int, reach: Interest = BOTH, initial: Sequence[Point] = ()) -> Study:
    """Return a study of unnamed objectives without anything to learn from."""
    objectives = [f"y{d}" for d in range(len(reach))]
    return Study(space, objectives, sampler_of(name, space, objectives, reach, seed), seed, initial)


def losses(point: Point) -> Losses | None:
    a, b, c, d = (point[k] for k in "abcd")
    if d == "z":
        return None
    return (3.0 - int(a) + 0.1 * int(b) + 0.5 * (d == "y"), float(a) + 0.2 * bool(c) - 0.1 * int(b))


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_study_asks_for_every_point_once(name: str) -> None:
    study = search(HALF, name, 0)
    asked = []
    while (point := study.ask()) is not None:
        asked.append(point)
        study.tell(point, losses(point))
    assert len(asked) == len(set(asked))
    assert set(asked) == set(HALF.points())
    assert len(asked) == 27


def test_points_under_way_are_not_asked_for_again() -> None:
    study = search(SMALL, "auto", 0, (Reach(1.0), Reach(value=3.0)))
    for point in islice(SMALL.points(), 6):
        study.tell(point, losses(point))
    batch = [study.ask() for _ in range(4)]
    assert len(set(batch)) == 4


@pytest.mark.parametrize("name", SAMPLERS)
def test_initial_points_are_asked_for_first_but_for_those_that_are_known(name: str) -> None:
    first = list(islice(SMALL.points(), 3))
    outside = Point.of({**SMALL.default().as_dict(), "d": "elsewhere"})
    study = search(SMALL, name, 0, initial=[outside, *first])
    study.tell(first[1], losses(first[1]))
    asked = [study.ask() for _ in range(3)]
    assert asked == [outside, first[0], first[2]]
    for point in (first[0], first[2]):
        study.tell(point, losses(point))
    study.tell(outside, None)
    following = study.ask()
    assert following is not None and following not in {outside, *first}


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_study_of_optuna_has_every_point_with_its_losses_and_constraint(name: str) -> None:
    study = search(SMALL, name, 0)
    told = {}
    for _ in range(12):
        point = study.ask()
        assert point is not None
        told[point] = losses(point)
        study.tell(point, told[point])
    trials = [t for t in study.study.trials if t.state == TrialState.COMPLETE]
    kept = {Point.of(t.user_attrs[POINT]): t for t in trials}
    assert {p: None if t.constraints[FEASIBLE] > 0 else tuple(t.values) for p, t in kept.items()} == told
    assert all(t.params == params_of(SMALL, p) for p, t in kept.items())


def write_study(path: Path, named: str = "abcd") -> Path:
    """Write a study of the small space, every point recorded; its artifacts differ where the knobs `named` do."""
    head = {
        "study": "small",
        "machine": "none",
        "objectives": ["tpot_s", "ttft_s"],
        "bounds": ["quality_kl<=0.5"],
        "knobs": [
            {
                "name": k.name,
                "level": k.level,
                "domain": list(k.domain),
                "default": k.default,
                "meaning": "",
                "when": [],
            }
            | {"when": [{"knob": c.knob, "values": list(c.values)} for c in k.when]}
            for k in SMALL.knobs
        ],
        "baseline_repeats": [{"tpot_s": [1.0]}],
    }
    lines = [head]
    for point in SMALL.points():
        found = losses(point)
        tpot, ttft = np.exp(found) if found else (None, None)
        lines.append(
            {
                "point": point.as_dict(),
                "failure": None if found else {"stage": "compile", "reason": "no"},
                "tpot_s": tpot,
                "ttft_s": ttft,
                "quality_kl": 0.9 if point["d"] == "y" and point["c"] else 0.1,
                "samples": {"tpot_s": [tpot]} if found else {},
                "features": {"dispatches": 3},
                "artifact": digest.of({k: point[k] for k in named}),
                "artifact_bytes": 10,
                "parameter_bytes": 20,
                "import": str(point["a"]),
                "import_s": 10.0,
                "compile_s": 5.0,
                "measure_s": 1.0,
            }
        )
    path.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))
    return path


def test_a_replay_of_all_points_reaches_the_whole_front_and_pays_for_each_import_once(tmp_path: Path) -> None:
    study = read(write_study(tmp_path / "small.jsonl.gz"))
    points = len(study.rows)
    run = replay(study, search(study.space, "random", 0), points)
    assert points == len(list(SMALL.points()))
    assert run.shares[-1] == pytest.approx(1.0)
    assert list(run.shares) == sorted(run.shares)
    builds = len({row.build for row in study.rows.values()})
    assert run.seconds[-1] == pytest.approx(3 * 10 + builds * 5 + points)
    assert run.evaluations_to(2.0) is None


def test_an_executable_that_was_measured_is_no_further_evaluation(tmp_path: Path) -> None:
    study = read(write_study(tmp_path / "small.jsonl.gz", named="abd"))
    run = replay(study, search(study.space, "random", 0), len(study.rows))
    assert len(run.shares) == study.distinct == len({(p["a"], p["b"], p["d"]) for p in SMALL.points()})
    by_run = {row.run: row.losses for row in study.rows.values()}
    assert all(row.losses == by_run[row.run] for row in study.rows.values())


def test_a_point_that_misses_a_bound_is_infeasible_in_a_study(tmp_path: Path) -> None:
    study = read(write_study(tmp_path / "small.jsonl.gz"))
    missed = [p for p, row in study.rows.items() if row.losses is None]
    assert {p["d"] for p in missed} == {"y", "z"}
    assert all(p["d"] == "z" or p["c"] for p in missed)


def test_the_model_needs_fewer_evaluations_than_chance(tmp_path: Path) -> None:
    study = read(write_study(tmp_path / "small.jsonl.gz"))

    def needed(make: Callable[[int], Study]) -> float:
        runs = [replay(study, make(seed), len(study.rows), until=0.95) for seed in range(12)]
        return float(np.median([run.evaluations_to(0.95) or len(study.rows) for run in runs]))

    def by_chance(seed: int) -> Study:
        points = random.Random(seed).sample(list(study.rows), len(study.rows))
        return search(study.space, "random", seed, study.interest, points)

    assert needed(lambda seed: search(study.space, "auto", seed, study.interest)) < 0.7 * needed(by_chance)
