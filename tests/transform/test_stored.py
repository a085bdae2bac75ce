"""Matrices made in chunks: the same bytes as when they are made at once, in every format, layout and size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbuild.kernels.layouts import FORMATS, Layout
from llmbuild.kernels.shapes import HEAD_NORMS, DecoderShape, buffer_bytes
from llmbuild.spec.formats import INTEGERS, WEIGHT_FORMATS
from llmbuild.transform import stored
from llmbuild.transform.decoder import part_shapes
from llmbuild.transform.panels import encode, encode_for
from llmbuild.transform.stored import Encoded, Rows, StoredMatrix, joined, matrix_unit, plain
from llmbuild.transform.weights import interleave
from tests.support.buffers import layer_buffer, make

CHUNKS = st.sampled_from((1, 1 << 12, 1 << 14, 1 << 40))
"""Weights that are encoded at once: a panel, some, or all of them."""


def drawn(sizes: dict[str, tuple[int, int]]) -> dict[str, np.ndarray]:
    random = np.random.default_rng(sum(rows * columns for rows, columns in sizes.values()))
    return {name: random.standard_normal(size).astype(np.float32) for name, size in sizes.items()}


def made(matrix: StoredMatrix, dense: dict[str, np.ndarray], chunk: int) -> tuple[dict[str, bytes], Any]:
    """Return what a unit writes of a matrix, by tensor, and what it hands on of each part."""
    held = {f"m.{part}": np.zeros(kind.nbytes, np.uint8) for part, kind in matrix.tensors().items()}
    kept = {name: np.zeros_like(rows) for name, rows in dense.items()}

    def keep(name: str, start: int, rows: np.ndarray) -> None:
        kept[name][start : start + len(rows)] = rows

    def encoded(name: str, start: int, stop: int) -> Encoded:
        return encode(matrix.form, dense[name][start:stop])

    with patch.object(stored, "CHUNK", chunk):
        make([matrix_unit("m", matrix, encoded, keep)], held)
    return {name.removeprefix("m."): data.tobytes() for name, data in held.items()}, kept


@settings(max_examples=120)
@given(
    st.sampled_from(WEIGHT_FORMATS),
    st.booleans(),
    st.lists(st.integers(1, 150), min_size=1, max_size=3),
    st.integers(1, 70) | st.sampled_from((96, 128, 130)),
    CHUNKS,
)
def test_chunks_of_a_matrix_are_the_matrix(form: str, packed: bool, rows: list[int], columns: int, chunk: int) -> None:
    parts = {f"part{i}": count for i, count in enumerate(rows)}
    matrix = StoredMatrix(Rows(tuple(parts.items())), columns, form, packed)
    dense = drawn({name: (count, columns) for name, count in parts.items()})
    whole = [encode(form, each) for each in dense.values()]
    expected = {name: array.tobytes() for name, array in matrix.encode(joined(matrix.rows, whole)).items()}
    actual, kept = made(matrix, dense, chunk)
    assert actual == expected
    for name, part in zip(dense, whole, strict=True):
        assert np.array_equal(kept[name], plain(part, columns))


@settings(max_examples=60)
@given(st.sampled_from(WEIGHT_FORMATS), st.booleans(), st.integers(1, 140), st.integers(1, 140))
def test_tensors_have_the_sizes_that_are_told(form: str, packed: bool, rows: int, columns: int) -> None:
    matrix = StoredMatrix(Rows((("m", rows),)), columns, form, packed)
    part = encode(form, drawn({"m": (rows, columns)})["m"])
    told = {name: (kind.nbytes, kind.shape) for name, kind in matrix.tensors().items()}
    assert {name: (array.nbytes, array.shape) for name, array in matrix.encode(part).items()} == told


@given(st.lists(st.integers(1, 99), min_size=1, max_size=4), st.data())
def test_spans_are_the_rows_between(counts: list[int], data: st.DataObject) -> None:
    rows = Rows(tuple((str(i), count) for i, count in enumerate(counts)))
    all_rows = [(name, row) for name, count in rows.parts for row in range(count)]
    start = data.draw(st.integers(0, rows.count))
    stop = data.draw(st.integers(start, rows.count))
    found = [(name, row) for name, first, last in rows.spans(start, stop) for row in range(first, last)]
    assert found == all_rows[start:stop]


@settings(max_examples=40)
@given(st.integers(1, 200), st.integers(1, 5))
def test_rows_in_turns_are_those_of_both_parts(count: int, panels: int) -> None:
    rows = Rows((("gate", count), ("up", count)), turns=True)
    dense = drawn({"gate": (count, 3), "up": (count, 3)})
    dense["up"] *= -1
    step, found = 64 * panels, []
    for start in range(0, rows.count, step):
        spans = rows.spans(start, min(start + step, rows.count))
        found.append(rows.joined([dense[name][first:last] for name, first, last in spans]))
    assert np.array_equal(np.concatenate(found), interleave(dense["gate"], dense["up"]))


SHAPES = st.builds(
    DecoderShape,
    hidden=st.integers(9, 150),
    heads=st.just(4),
    kv_heads=st.sampled_from((1, 2, 4)),
    head_dim=st.sampled_from((8, 24, 32)),
    inner=st.integers(1, 200),
    epsilon=st.just(1e-5),
    scale=st.just(0.5),
    context=st.just(40),
    cache=st.just("f32"),
    workers=st.just(2),
    weights=st.sampled_from(FORMATS),
    head_norms=st.booleans(),
)


@settings(max_examples=40)
@given(SHAPES, st.sampled_from((1, 1 << 13)))
def test_chunks_of_a_layers_buffer_are_the_buffer(shape: DecoderShape, chunk: int) -> None:
    sizes = part_shapes(shape)
    arrays = drawn(sizes)
    arrays |= {f"{name}.bias": arrays[name][:, 0].copy() for name in sizes if name != "down"}
    arrays |= {norm: np.full(shape.hidden, i + 1, np.float32) for i, norm in enumerate(("norm1", "norm2"))}
    arrays |= {norm: np.full(shape.head_dim, i + 3, np.float32) for i, norm in enumerate(HEAD_NORMS)}
    with patch.object(stored, "CHUNK", 1 << 40):
        whole = layer_buffer(shape, arrays)
    with patch.object(stored, "CHUNK", chunk):
        assert np.array_equal(layer_buffer(shape, arrays), whole)
    assert len(whole) == buffer_bytes(shape)


@pytest.mark.parametrize("form", ["int8", "int4_g32", "int7_g32", "int2_g32", "int6_g32s8"])
def test_rows_that_were_quantized_before_are_kept_with_columns_of_zeros(form: str) -> None:
    layout, dense = Layout(form, 96), drawn({"m": (70, 90)})["m"]
    ready = encode(form, dense[:, :64])
    assert not isinstance(ready, np.ndarray)
    kept = encode_for(layout, dense, replace(ready, scale=ready.scale * 2))
    assert not isinstance(kept, np.ndarray)
    assert np.array_equal(plain(kept, 64), 2 * plain(ready, 64))
    assert not plain(kept, 96)[:, 64:].any()
    assert INTEGERS[form].group == 0 or kept.group == layout.group
