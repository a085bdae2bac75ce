from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmbuild.errors import InputError
from llmbuild.kernels.choose import readable
from llmbuild.search.knobs.space import ALL, KNOBS, knobs_of, space_for
from llmbuild.search.knobs.traps import TRAPS
from llmbuild.search.losses import losses_of
from llmbuild.search.study import TrialStudy
from llmbuild.search.warm_start import initial_points
from llmbuild.spec.measurement import Measurement, Reading
from llmbuild.spec.recipe import Budget, Calibration, ModelSource, Quality, Recipe, Text
from llmbuild.spec.slo import METRICS, parse_bound
from llmbuild.spec.space import Condition, Knob, Point, Space
from llmbuild.spec.target import Target
from llmbuild.spec.trial import Trial
from llmbuild.spec.workload import Workload

AVX2 = Target("t", "llvm-cpu", "x86_64", "x86-64-v3", (), ("avx2", "f16c", "fma"))
AVX512 = ("avx512f", "avx512bw", "avx512vl")
PLAIN = Target("t", "llvm-cpu", "x86_64", "x86-64-v2")


def recipe(**knobs: tuple) -> Recipe:
    return Recipe(
        name="r",
        model=ModelSource("huggingface", "/m"),
        workloads=(Workload("w", 4, 4, 8),),
        objectives=("tpot_s",),
        constraints=(),
        quality=Quality(),
        budget=Budget(),
        knobs=tuple(knobs.items()),
    )


chosen = st.fixed_dictionaries({k.name: st.sampled_from(k.domain) for k in KNOBS})


@given(chosen)
def test_completing_twice_changes_nothing_and_stays_inside(values: dict) -> None:
    space = Space(KNOBS)
    once = space.complete(values)
    assert space.complete(once.as_dict()) == once
    assert space.contains(once)


def test_contains_agrees_with_listing() -> None:
    space = space_for(PLAIN, recipe(opt_level=("O2",), distribution_size=(64,), workers=(0,)), {})
    listed = set(space.points())
    everything = set(space_for(AVX2, recipe(), {}).points())
    assert {p for p in everything if space.contains(p)} == listed


def test_point_zero_is_the_compilers_defaults_whatever_a_recipe_pins() -> None:
    space = space_for(AVX2, recipe(opt_level=("O3",), weight_format=("int8",)), {})
    assert initial_points(space)[0] == Point.of({k.name: k.default for k in KNOBS})


def test_a_condition_names_an_earlier_knob() -> None:
    late = Knob("a", "model", (1, 2), 1, "", when=(Condition("b", (1,)),))
    with pytest.raises(ValueError, match="does not come before"):
        Space((late, Knob("b", "model", (1, 2), 1, "")))


def test_a_kernel_that_a_target_cannot_run_is_not_in_its_space() -> None:
    kernels = {k.name: k.domain for k in space_for(PLAIN, recipe(), {}).knobs}["kernel"]
    assert kernels == ("compiler",)
    with pytest.raises(InputError, match=r"lacks avx512f .* or avx2 fma f16c or .* for int8"):
        space_for(PLAIN, recipe(), {"kernel": "own"})


@pytest.mark.parametrize(
    ("pins", "told"),
    [({"optlevel": "O2"}, "unknown knob 'optlevel'"), ({"opt_level": "O9"}, "choose from O0, O1, O2, O3")],
)
def test_a_bad_pin_is_told(pins: dict, told: str) -> None:
    with pytest.raises(InputError, match=told):
        space_for(AVX2, recipe(), pins)


def test_command_line_values_take_the_type_of_the_domain() -> None:
    space = space_for(AVX2, recipe(), {"split_reduction": "true", "workers": "1", "distribution_size": "32"})
    domains = {k.name: k.domain for k in space.knobs}
    assert (domains["split_reduction"], domains["workers"], domains["distribution_size"]) == ((True,), (1,), (32,))


def failed(number: int, point: Point) -> Trial:
    from llmbuild.spec.variant import Failure

    failure = Failure("compile", "no", "cmd", "", lasting=True)
    return Trial("s", number, point, f"v{number}", number == 0, None, None, None, None, (), failure, 0.0)


def test_a_study_asks_for_every_point_once_and_then_ends() -> None:
    few = {"weight_format": ("f32",), "head_format": ("same",), "kv_dtype": ("f32",), "distribution_size": (64,)}
    space = space_for(PLAIN, recipe(**few, opt_level=("O0", "O2")), {})
    study, asked = TrialStudy(space, ("tpot_s",), 0, []), []
    while (point := study.ask()) is not None:
        asked.append(point)
        study.tell(failed(len(asked) - 1, point))
    assert len(asked) == len(set(asked))
    assert set(asked) == set(space.points()) | {space.default()}


def test_a_study_rebuilt_from_its_trials_repeats_none() -> None:
    space = space_for(AVX2, recipe(), {})
    first = TrialStudy(space, ("tpot_s",), 0, [])
    known = [failed(n, point) for n in range(12) if (point := first.ask())]
    second = TrialStudy(space, ("tpot_s",), 0, known)
    again = [second.ask() for _ in range(12)]
    assert {t.point for t in known} & set(again) == set()


def test_every_metric_names_its_unit_and_direction() -> None:
    assert {m.direction for m in METRICS.values()} == {"min", "max"}
    assert all(m.unit for m in METRICS.values())


def test_what_needs_calibration_text_is_not_searched_without_any() -> None:
    pinned = recipe(weight_format=("int4_g128",))
    domains = {k.name: k.domain for k in space_for(AVX2, pinned, {}).knobs}
    assert (domains["quantization"], domains["mixed"]) == (("rtn",), ("none",))
    with pytest.raises(InputError, match="quantization=gptq needs calibration text, and the recipe names none"):
        space_for(AVX2, pinned, {"quantization": "gptq"})
    with_text = replace(pinned, calibration=Calibration((Text(("ast",)),)))
    assert {k.name: k.domain for k in space_for(AVX2, with_text, {}).knobs}["quantization"] == ("rtn", "gptq")
    random = replace(with_text, model=ModelSource("huggingface", "/m", random_init=True))
    with pytest.raises(InputError, match="random weights have no text"):
        space_for(AVX2, random, {"mixed": "sensitive"})


def test_formats_that_are_not_searched_can_be_pinned() -> None:
    searched = {k.name: k.domain for k in space_for(AVX2, recipe(), {}).knobs}["weight_format"]
    assert "int8_g64" not in searched
    pinned = {k.name: k.domain for k in space_for(AVX2, recipe(), {"weight_format": "int8_g64"}).knobs}
    assert pinned["weight_format"] == ("int8_g64",)


def test_caches_of_four_bits_are_pinned_on_cpus_and_unknown_elsewhere() -> None:
    searched = {k.name: k.domain for k in space_for(AVX2, recipe(), {}).knobs}["kv_dtype"]
    assert searched == ("f32", "f16", "int8")
    pinned = space_for(AVX2, recipe(kernel=("own",), weight_format=("int8",)), {"kv_dtype": "int4"})
    assert {(p["kv_dtype"], p["kernel"]) for p in pinned.points()} == {("int4", "own")}
    domains = {k.name: k.domain for k in knobs_of("cuda")}
    assert domains["kv_dtype"] == ("f32", "f16", "int8")


@pytest.mark.parametrize(
    "requires", [AVX2.requires, AVX512, (*AVX512, "avx512vnni"), ("sse4.2",), ("dotprod",), ("i8mm",), ("neon",)]
)
def test_our_kernels_are_asked_about_only_where_they_can_read_weights_and_cache(requires: tuple[str, ...]) -> None:
    formats = set(readable(requires))
    points = list(space_for(replace(AVX2, requires=requires), recipe(opt_level=("O2",)), {}).points())
    own = [p for p in points if p["kernel"] == "own"]
    assert bool(own) == bool(formats)
    assert {p["layout"] for p in own} <= {"packed"}
    assert {p["weight_format"] for p in own} <= formats
    assert {p["head_format"] for p in own} <= {"same", *formats}
    assert {p["kv_dtype"] for p in own} == ({"f32", "f16", "int8"} if own else set())
    assert len(points) == len(set(points))


# --- the space as data -------------------------------------------------------------------------------------------


def test_a_recipe_may_ask_for_a_whole_domain() -> None:
    default = {k.name: k.domain for k in space_for(AVX2, recipe(), {}).knobs}["vector_width"]
    everything = {k.name: k.domain for k in space_for(AVX2, recipe(vector_width=("all",)), {}).knobs}["vector_width"]
    assert (default, everything) == ((0,), (0, 16, 32, 64))
    assert {k.name: k.domain for k in space_for(AVX2, recipe(), {"ukernels": "all"}).knobs}["ukernels"] == ("all",)


@pytest.mark.parametrize("backend", ["cuda", "rocm", "vulkan-spirv"])
def test_a_backend_has_its_own_knobs_and_no_other_backends(backend: str) -> None:
    names = {k.name for k in knobs_of(backend)}
    assert {"weight_format", "opt_level", "driver", "workers"} <= names
    assert not names & {"vector_width", "distribution_size", "scalable"}
    assert any(k.backends and backend in k.backends and k.level == "codegen" for k in knobs_of(backend))
    Space(knobs_of(backend))


def test_a_knob_of_another_backend_is_told_as_such() -> None:
    with pytest.raises(InputError, match="knob ptx is for cuda; target t is llvm-cpu"):
        space_for(AVX2, recipe(), {"ptx": "+ptx80"})


def test_names_are_unique_within_a_backend_and_searched_values_are_in_the_domain() -> None:
    for backend in ("llvm-cpu", "cuda", "rocm", "vulkan-spirv"):
        names = [k.name for k in knobs_of(backend)]
        assert len(names) == len(set(names))
    assert all(set(k.searched) <= set(k.domain) and k.default in k.domain for k in ALL)


def test_a_trap_is_no_knob_where_it_is_one_and_says_why() -> None:
    for trap in TRAPS:
        assert trap.reason
        for backend in trap.backends:
            assert trap.choice not in {k.name for k in knobs_of(backend)}


def test_a_broken_bound_is_as_infeasible_as_a_failure() -> None:
    slow = measured(0, Point.of({"a": 1}), tpot_s=0.2)
    assert losses_of(slow, ("tpot_s",)) is not None
    assert losses_of(slow, ("tpot_s",), [parse_bound("tpot_s<=0.1")]) is None
    assert losses_of(failed(0, slow.point), ("tpot_s",)) is None


def test_related_points_come_right_after_point_zero_as_far_as_the_space_has_them() -> None:
    space = space_for(PLAIN, recipe(), {})
    near = {**space.default().as_dict(), "opt_level": "O1", "data_tiling": "global"}
    foreign = {**near, "kernel": "own", "layout": "packed", "weight_format": "int8"}
    found = initial_points(space, [foreign, near])
    assert found[0] == space.default()
    assert Point.of(near) in found[1:3]
    assert all(point["kernel"] == "compiler" for point in found)


def measured(number: int, point: Point, **medians: float) -> Trial:
    readings = {name: Reading(v, v, v, ()) for name, v in medians.items()}
    body = Measurement(f"m{number}", f"v{number}", "a", Workload("w", 4, 4, 8), "host", readings, {}, {})
    return Trial("s", number, point, f"v{number}", number == 0, "p", "a", 10, 20, (body,), None, 0.0)


def test_our_kernels_alone_for_a_format_that_the_target_cannot_take_are_refused() -> None:
    target = replace(AVX2, requires=AVX512)
    with pytest.raises(InputError, match=r"target t lacks .*avx512vnni or .* for int8"):
        space_for(target, recipe(), {"kernel": "own", "weight_format": "int8"})
    assert next(space_for(target, recipe(), {"kernel": "own", "weight_format": "f16"}).points())
