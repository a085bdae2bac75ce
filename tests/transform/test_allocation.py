"""Bits shared out among kinds of matrices."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmbuild.spec.formats import INTEGERS
from llmbuild.transform.allocation import EXTRA, Kind, modelled, neighbours, share

BASES = ("int3_g32", "int4_g64", "int5_g128", "int6_g32", "int7_g64")
kinds = st.dictionaries(
    st.sampled_from(["qkv", "out", "gate_up", "down"]),
    st.builds(Kind, st.integers(1, 10**6), st.floats(0, 10)),
    min_size=1,
)


def bits(found: dict[str, str], of: dict[str, Kind]) -> int:
    return sum(kind.weights * INTEGERS[found[name]].bits for name, kind in of.items())


@given(kinds, st.sampled_from(BASES))
def test_no_more_bits_than_asked_and_no_more_harm_than_the_same_bits_for_all(of: dict[str, Kind], base: str) -> None:
    found = share(of, base)
    assert found.keys() == of.keys()
    assert {*found.values()} <= {*neighbours(base)}
    assert bits(found, of) <= bits(dict.fromkeys(of, base), of) + EXTRA * sum(kind.weights for kind in of.values())
    assert modelled(of, base, found) <= modelled(of, base, dict.fromkeys(of, base))


@given(kinds, st.sampled_from(BASES), st.randoms())
def test_the_order_of_kinds_does_not_matter(of: dict[str, Kind], base: str, random: object) -> None:
    names = sorted(of)
    random.shuffle(names)  # type: ignore[attr-defined]
    assert share({name: of[name] for name in names}, base) == share(of, base)


@given(kinds, st.sampled_from(BASES))
def test_of_two_kinds_of_one_size_the_more_sensitive_one_has_as_many_bits_or_more(
    of: dict[str, Kind], base: str
) -> None:
    size = next(iter(of.values())).weights
    alike = {name: Kind(size, kind.harm) for name, kind in of.items()}
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
            {"a": "int7_g32", "b": "int6_g32", "c": "int6_g32", "d": "int3_g32"},
        ),
    ],
)
def test_bits_move_to_what_they_do_more_for(harms: dict[str, float], expected: dict[str, str]) -> None:
    assert share({name: Kind(1000, harm) for name, harm in harms.items()}, "int5_g32") == expected


@pytest.mark.parametrize("form", ["int8", "int8_g32", "int4a_g32", "q4_0", "q4_1", "f16", "f32"])
def test_other_formats_have_no_neighbours(form: str) -> None:
    assert neighbours(form) == ()
