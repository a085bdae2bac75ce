from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmbuild import digest
from llmbuild.spec.program import abi_from

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(), plain, max_size=6))
def test_key_order_changes_nothing(value: dict) -> None:
    assert digest.of(dict(reversed(value.items()))) == digest.of(value)


@given(plain, plain)
def test_equal_digests_mean_equal_canonical_text(a: object, b: object) -> None:
    assert (digest.canonical(a) == digest.canonical(b)) == (digest.of(a) == digest.of(b))


def test_dataclasses_and_tuples_are_named_by_what_they_hold() -> None:
    @dataclass(frozen=True)
    class Pair:
        left: int
        right: tuple[int, ...]

    assert digest.of({"left": 1, "right": [2, 3]}) == digest.of(Pair(1, (2, 3)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), Path("x"), object()])
def test_what_json_cannot_say_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match="not canonical"):
        digest.of({"value": value})


def test_a_file_is_named_by_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"bytes")
    assert hashlib.sha256(b"bytes").hexdigest() == digest.of_file(tmp_path / "a")


def test_a_field_that_is_omitted_at_its_default_changes_no_earlier_digest() -> None:
    body = {"vocabulary": 3, "context": 4, "kv": [], "eos_tokens": [1], "parameters": 5}
    body |= {"batch": 1, "required_features": []}
    abi = abi_from(body)
    assert digest.plain(abi) == body
    scoring = replace(abi, score=True)
    assert digest.plain(scoring) == {**body, "score": True}
    assert (abi_from(digest.plain(scoring)), digest.of(scoring) == digest.of(abi)) == (scoring, False)
