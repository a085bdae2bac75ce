"""What a search learns from other models' studies before it has measured anything but point 0."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbuild.search.losses import Reach
from llmbuild.search.sampler import FrontSampler, Prior
from llmbuild.search.study import Study
from llmbuild.search.transfer import LEAST, Lesson, learn, lesson, packed, prior, shipped, unpacked
from llmbuild.spec.measurement import Measurement, Reading
from llmbuild.spec.space import Knob, Point, Space
from llmbuild.spec.trial import Trial
from llmbuild.spec.variant import Failure
from llmbuild.spec.workload import Workload

FORMAT = Knob("weight_format", "model", ("f32", "f16", "int8"), "f32", "")
TILE = Knob("tile", "codegen", (0, 16, 32, 64), 0, "")
SPACE = Space((FORMAT, TILE))
SECONDS = {"f32": 4.0, "f16": 2.0, "int8": 1.0}
REACH = (Reach(beyond=math.log(1.5)),)


def seconds(point: Point, scale: float) -> float:
    """A model's time: the format counts most, one tile is better than the others, scale is the model's size."""
    return math.log(scale * SECONDS[str(point["weight_format"])] * (0.8 if point["tile"] == 32 else 1.0))


def study(scale: float) -> Lesson:
    return Lesson(("tpot_s",), SPACE.default(), {p: (seconds(p, scale),) for p in SPACE.points()})


def search_from(expected: Prior) -> Study:
    """Return a search that begins with point 0 and what is expected."""
    return Study(SPACE, ("tpot_s",), FrontSampler(SPACE, REACH, 0, expected), 0, [SPACE.default()])


def test_the_first_point_after_point_0_is_what_was_best_elsewhere() -> None:
    search = search_from(prior([study(scale=7.0)], ("tpot_s",)))
    zero = search.ask()
    assert zero == SPACE.default()
    search.tell(zero, (seconds(zero, 1.0),))
    assert search.ask() == Point.of({"weight_format": "int8", "tile": 32})


def test_a_prior_that_is_wrong_is_overruled_by_what_is_measured() -> None:
    learned = learn([study(1.0)])
    assert learned
    search = search_from(lambda points: -learned.predict(points, ["tpot_s"]))
    asked = []
    while (point := search.ask()) is not None:
        asked.append(point)
        search.tell(point, (seconds(point, 1.0),))
    assert set(asked) == set(SPACE.points())
    assert asked.index(Point.of({"weight_format": "int8", "tile": 32})) < len(asked) - 3


def test_an_objective_that_no_study_had_is_left_to_be_measured() -> None:
    learned = learn([study(1.0)])
    assert learned
    told = learned.predict(list(SPACE.points()), ["quality_kl", "tpot_s"])
    assert not told[:, 0].any()
    assert told[:, 1].any()


def test_objectives_are_matched_by_name_across_studies() -> None:
    other = study(1.0)
    two = Lesson(("parameter_bytes", "tpot_s"), other.zero, {p: (3.0, *y) for p, y in other.losses.items() if y})
    one, both = learn([other]), learn([other, two])
    assert one and both
    points = list(SPACE.points())
    assert both.predict(points, ["tpot_s"]) == pytest.approx(one.predict(points, ["tpot_s"]), abs=0.05)
    assert both.predict(points, ["parameter_bytes"]) == pytest.approx(0.0)


def test_too_few_points_or_a_study_without_point_0_teach_nothing() -> None:
    losses = dict(list(study(1.0).losses.items())[: LEAST - 1])
    assert learn([Lesson(("tpot_s",), SPACE.default(), losses)]) is None
    assert learn([Lesson(("tpot_s",), Point.of({"weight_format": "f32", "tile": 99}), study(1.0).losses)]) is None
    assert learn([]) is None


def expected(form: str, lessons: list[Lesson], objective: str) -> float:
    return float(prior(lessons, (objective,))([Point.of({"weight_format": form, "tile": 0})])[0, 0])


def test_sizes_and_quality_of_a_format_that_no_study_had_follow_from_its_bits() -> None:
    forms = ("f32", "f16", "int8", "int4_g128", "int4_g32")
    sizes = [expected(form, [], "parameter_bytes") for form in forms]
    assert sizes == pytest.approx([0.0, math.log(1 / 2), math.log(1 / 4), math.log(4.125 / 32), math.log(4.5 / 32)])
    loss = [expected(form, [], "quality_kl") for form in ("f32", "f16", "int8", "int4_g128")]
    assert loss == sorted(loss)
    assert loss[:2] == [0.0, 0.0]
    assert expected("int8", [], "tpot_s") == 0.0
    few = ("int4_g32", "int4_g32s8", "int3_g32s8", "int2_g32", "int2_g32s8")
    loss = [expected(form, [], "quality_kl") for form in few]
    assert loss == sorted({*loss})


def test_sizes_are_those_of_the_layout_that_kernels_read() -> None:
    own = {"kernel": "own", "layout": "packed"}
    for choices, bits in ((own, 2.25), ({**own, "layout": "row_major"}, 8.5), ({"layout": "packed"}, 8.5)):
        point = Point.of({"weight_format": "int2_g32s8", **choices})
        assert prior([], ("parameter_bytes",))([point])[0, 0] == pytest.approx(math.log(bits / 32))


def test_what_a_study_measured_comes_before_arithmetic() -> None:
    points = {p: (1.0 if p["weight_format"] == "int8" else 0.0,) for p in SPACE.points()}
    lessons = [Lesson(("parameter_bytes",), SPACE.default(), points)]
    assert expected("int8", lessons, "parameter_bytes") > 0.5
    assert expected("int4_g128", lessons, "parameter_bytes") == pytest.approx(math.log(4.125 / 32))


values = st.floats(-30, 30).map(lambda v: float(f"{v:.5g}"))


@settings(max_examples=30)
@given(st.lists(st.one_of(st.none(), st.tuples(values)), min_size=12, max_size=12))
def test_a_packed_lesson_is_the_lesson(rows: list[tuple[float, ...] | None]) -> None:
    made = Lesson(("tpot_s",), SPACE.default(), dict(zip(SPACE.points(), rows, strict=True)))
    assert unpacked(packed("name", made)) == made


def test_what_ships_teaches_the_metrics_of_a_recipe_and_only_for_cpus() -> None:
    lessons = shipped("llvm-cpu")
    assert min(len(found.losses) for found in lessons) >= 200
    assert all(found.losses[found.zero] is not None for found in lessons)
    assert {"tpot_s", "ttft_s", "quality_kl", "parameter_bytes"} == {n for found in lessons for n in found.objectives}
    assert shipped("cuda") == []


def trial(number: int, point: Point, tpot: float | None) -> Trial:
    """A trial with one reading, or a failed one."""
    failure = Failure("compile", "no", "cmd", "log", True) if tpot is None else None
    reading = Reading(tpot or 0.0, tpot or 0.0, tpot or 0.0, ())
    found = Measurement("k", "v", "a", Workload("w", 1, 1, 4), "m", {"tpot_s": reading}, {}, {})
    told = () if failure else (found,)
    return Trial("s", number, point, f"v{number}", point == SPACE.default(), None, None, 1, 1, told, failure, 0.0)


def test_a_lesson_from_trials_has_the_objectives_they_all_have_and_keeps_failures() -> None:
    zero, other, broken = (Point.of({"weight_format": f, "tile": 0}) for f in ("f32", "int8", "f16"))
    trials = [trial(0, zero, 0.5), trial(1, other, 0.25), trial(2, broken, None)]
    found = lesson(trials, ("tpot_s", "quality_kl"))
    assert found == Lesson(("tpot_s",), zero, {zero: (math.log(0.5),), other: (math.log(0.25),), broken: None})
    assert lesson(trials[1:], ("tpot_s",)) is None
