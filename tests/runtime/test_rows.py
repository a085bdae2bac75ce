"""How rows of several sequences are told to a step: each token with its position and the row of its table."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llmbuild.runtime.rows import Told, told

SEQUENCE = st.tuples(st.lists(st.integers(0, 99), min_size=1, max_size=4), st.integers(0, 50), st.integers(0, 4))
TABLES = np.arange(15).reshape(5, 3) * 7


def plainly(sequences: list[tuple[list[int], int, int]]) -> Told:
    """Return the same, row by row."""
    tokens = [token for ids, _, _ in sequences for token in ids]
    positions = [start + i for ids, start, _ in sequences for i in range(len(ids))]
    rows = [2 * len(tokens) + slot * TABLES.shape[1] for ids, _, slot in sequences for _ in ids]
    read = np.cumsum([len(ids) for ids, _, _ in sequences]) - 1
    where = [*positions, *rows, *TABLES.ravel()]
    return Told(np.array(tokens), np.array(positions), np.array(where), read)


def same(found: Told, expected: Told) -> bool:
    return all(np.array_equal(*both) and both[0].dtype == np.int64 for both in zip(found, expected, strict=True))


@given(st.lists(SEQUENCE, min_size=1, max_size=5))
def test_tokens_are_told_with_their_positions_and_tables(sequences: list[tuple[list[int], int, int]]) -> None:
    assert same(told(*zip(*sequences, strict=True), TABLES), plainly(sequences))


@given(st.lists(SEQUENCE, min_size=1, max_size=5))
def test_single_tokens_are_told_as_all_are(sequences: list[tuple[list[int], int, int]]) -> None:
    singles = [(ids[:1], start, slot) for ids, start, slot in sequences]
    assert same(told(*zip(*singles, strict=True), TABLES), plainly(singles))
