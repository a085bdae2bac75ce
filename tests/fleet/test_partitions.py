"""Partitions of GPUs: layouts that are enumerated from profiles, and the estimates of what a slice does."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbuild.fleet.profiles.divided import divided, of_slice
from llmbuild.spec.partitions import (
    COMPUTE_SLICES,
    GPUS,
    MEMORY_SLICES,
    Placement,
    Slice,
    fullest,
    layout_of,
    layouts,
    maximal,
    placed,
    placements,
    refusal,
)
from tests.support.fleets import divided_node, profile

H100 = GPUS["H100-80GB"]


def multisets(found: tuple[Placement, ...]) -> int:
    return len({layout_of(each for each, _ in one) for one in found})


def narrow(gpu: str) -> list[Slice]:
    """Return the slices without the wide one of one compute slice."""
    return [each for each in GPUS[gpu].slices if (each.compute, each.size) != (1, 2)]


@pytest.mark.parametrize("gpu", GPUS)
def test_the_layouts_are_as_many_as_are_known(gpu: str) -> None:
    some, all_ = placements(narrow(gpu)), placements(GPUS[gpu].slices)
    empty = 1  # counted in the known figures as well
    assert (len(some) + empty, multisets(some) + empty) == (298, 38)
    assert (len(maximal(some)), multisets(maximal(some))) == (19, 14)
    assert (len(all_) + empty, len(maximal(all_)), multisets(all_) + empty) == (723, 78, 78)
    assert multisets(maximal(all_)) == 38


@pytest.mark.parametrize("gpu", GPUS)
def test_no_slices_overlap_and_none_is_beyond_the_gpu(gpu: str) -> None:
    for layout in layouts(gpu):
        found = placed(gpu, layout)
        taken = [start + i for each, start in found for i in range(each.size)]
        assert len(taken) == len(set(taken))
        assert max(taken) < MEMORY_SLICES
        assert sum(each.compute for each in layout.slices) <= COMPUTE_SLICES
        assert all(start in each.starts for each, start in found)
        assert Counter(each for each, _ in found) == Counter(layout.slices)


def test_every_layout_is_part_of_a_fullest_one_and_no_fullest_one_of_another() -> None:
    full = fullest("A100-40GB")
    assert all(any(one.within(other) for other in full) for one in layouts("A100-40GB"))
    assert not any(one.within(other) for one in full for other in full if one != other)


def test_a_slice_begins_where_it_leaves_most_room() -> None:
    assert placed("H100-80GB", layout_of([H100.slices[2]])) == ((H100.slices[2], 4),)


@settings(max_examples=60, derandomize=True)
@given(names=st.lists(st.sampled_from([each.name for each in H100.slices]), min_size=1, max_size=8))
def test_what_is_refused_is_what_is_not_enumerated(names: list[str]) -> None:
    slices = [each for name in names if (each := H100.slice_of(name))]
    assert (refusal(H100, names) is None) == (layout_of(slices) in layouts(H100.name))


def test_what_a_slice_does_is_an_estimate_by_its_shares() -> None:
    whole = profile()
    part = H100.slices[2]
    found = of_slice(whole, "fast/3g.40gb", part)
    assert found.told == "estimated"
    assert found.source.startswith("estimated, 3g.40gb by 0.5 of the bandwidth and 0.455 of the multiprocessors, from:")
    assert found.step.seconds(1, 0, 0) == pytest.approx(2 * whole.step.seconds(1, 0, 0))
    assert found.step.prompt_s == pytest.approx(whole.step.prompt_s * 132 / 60)
    assert found.step.context_s == pytest.approx(2 * whole.step.context_s)
    assert found.step.rows_s(16.0) > 2 * whole.step.rows_s(16.0)
    assert found.power is not None and whole.power is not None
    assert found.power.rows_w(1) == pytest.approx(whole.power.rows_w(1) / 2)


def test_the_undivided_slice_of_an_h100_does_what_the_gpu_does() -> None:
    whole = profile()
    assert of_slice(whole, "fast", H100.slices[0]).step == whole.step


def test_a_slice_with_a_profile_of_its_own_gets_no_estimate() -> None:
    node = divided_node(layouts=("3g.40gb", "3g.40gb"), now=("7g.80gb",))
    own = profile("gpu/3g.40gb")
    found = divided([node], [profile("gpu"), own])
    assert [each.device for each in found] == ["gpu/7g.80gb"]
