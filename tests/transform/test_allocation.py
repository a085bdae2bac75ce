"""Bits shared out among matrices."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmbuild.spec.formats import INTEGERS
from llmbuild.transform.allocation import Part, modelled, neighbours, share

BASES = ("int2_g32", "int3_g32", "int4_g64", "int5_g128", "int6_g32s8", "int7_g64")
parts = st.dictionaries(
    st.sampled_from(["qkv", "out", "gate_up", "down"]),
    st.builds(Part, st.integers(1, 10**6), st.floats(0, 10)),
    min_size=1,
)


def bits(found: dict[str, str], of: dict[str, Part]) -> int:
    return sum(part.weights * INTEGERS[found[name]].bits for name, part in of.items())


@given(parts, st.sampled_from(BASES), st.sampled_from([0.0, 0.5]))
def test_no_more_bits_than_asked_and_no_more_harm_than_the_same_bits_for_all(
    of: dict[str, Part], base: str, extra: float
) -> None:
    found = share(of, base, extra)
    assert found.keys() == of.keys()
    assert {*found.values()} <= {*neighbours(base)}
    assert bits(found, of) <= bits(dict.fromkeys(of, base), of) + extra * sum(part.weights for part in of.values())
    assert modelled(of, base, found) <= modelled(of, base, dict.fromkeys(of, base))


@given(parts, st.sampled_from(BASES))
def test_of_two_parts_of_one_size_the_more_sensitive_one_has_as_many_bits_or_more(
    of: dict[str, Part], base: str
) -> None:
    size = next(iter(of.values())).weights
    alike = {name: Part(size, part.harm) for name, part in of.items()}
    found = share(alike, base)
    for one in alike:
        for other in alike:
            if alike[one].harm > alike[other].harm:
                assert INTEGERS[found[one]].bits >= INTEGERS[found[other]].bits


@pytest.mark.parametrize(
    ("harms", "expected"),
    [
        ({"a": 1.1, "b": 1.0}, {"a": "int6_g32", "b": "int5_g32"}),
        ({"a": 100.0, "b": 1.0}, {"a": "int7_g32", "b": "int4_g32"}),
        (
            {"a": 3.0, "b": 1.0, "c": 1.0, "d": 0.0},
            {"a": "int7_g32", "b": "int7_g32", "c": "int6_g32", "d": "int2_g32"},
        ),
    ],
)
def test_bits_move_to_what_they_do_more_for(harms: dict[str, float], expected: dict[str, str]) -> None:
    assert share({name: Part(1000, harm) for name, harm in harms.items()}, "int5_g32", 0.5) == expected


@pytest.mark.parametrize("kind", ["g32", "g64", "g128", "g32s8"])
def test_neighbours_share_groups_and_the_type_of_their_scales(kind: str) -> None:
    family = {f"int{bits}_{kind}" for bits in range(2, 8)}
    assert {frozenset(neighbours(form)) for form in family} == {frozenset(family)}


@pytest.mark.parametrize("form", ["int8", "int8_g32", "int4a_g32", "q4_0", "q4_1", "f16", "f32"])
def test_other_formats_have_no_neighbours(form: str) -> None:
    assert neighbours(form) == ()
