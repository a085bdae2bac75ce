"""Archives that are written piece by piece: byte for byte those of IREE's own writer."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from iree.runtime import ParameterIndex

from llmbuild.transform.archive import Layout
from llmbuild.transform.stream import Draft, Piece
from tests.support.artifact import archived

NAMES = st.text(st.sampled_from("abz.019_é量"), min_size=1, max_size=40)
SIZES = st.integers(1, 300) | st.sampled_from((63, 64, 65, 4032, 4095, 4096, 4097, 70_000))


def tensors(sizes: dict[str, int]) -> dict[str, np.ndarray]:
    drawn = np.random.default_rng(len(sizes))
    return {name: drawn.integers(1, 255, size, np.uint8) for name, size in sizes.items()}


def by_iree(held: dict[str, np.ndarray], path: Path) -> bytes:
    index = ParameterIndex()
    for name in sorted(held):
        index.add_buffer(name, held[name])
    index.create_archive_file(str(path))
    return path.read_bytes()


def by_pieces(held: dict[str, np.ndarray], path: Path, reverse: bool) -> bytes:
    draft = Draft(path, Layout.of({name: len(data) for name, data in held.items()}))
    pieces = [Piece(name, at, data[at : at + 100]) for name, data in held.items() for at in range(0, len(data), 100)]
    for piece in reversed(pieces) if reverse else pieces:
        draft.write(piece)
    draft.close()
    return path.read_bytes()


@settings(max_examples=60)
@given(st.dictionaries(NAMES, SIZES, min_size=1, max_size=12), st.booleans())
def test_an_archive_is_byte_for_byte_that_of_iree(sizes: dict[str, int], reverse: bool) -> None:
    held = tensors(sizes)
    with TemporaryDirectory() as name:
        folder = Path(name)
        assert by_pieces(held, folder / "ours.irpa", reverse) == by_iree(held, folder / "theirs.irpa")
        assert archived(folder / "ours.irpa") == {name: data.tobytes() for name, data in held.items()}


@pytest.mark.parametrize("count", [1, 2, 53, 54, 55, 300])
def test_an_archive_of_many_tensors_is_that_of_iree(tmp_path: Path, count: int) -> None:
    """Entries and names reach over the places where the tensors of fewer would begin."""
    held = tensors({f"model.layers.{i}.mlp.down_proj.matrix.data": 64 + i % 3 for i in range(count)})
    layout = Layout.of({name: len(data) for name, data in held.items()})
    expected = by_iree(held, tmp_path / "theirs.irpa")
    assert by_pieces(held, tmp_path / "ours.irpa", False) == expected
    assert layout.file_bytes == len(expected)
    assert expected.startswith(layout.head)
    for name, at in layout.places.items():
        assert expected[at : at + len(held[name])] == held[name].tobytes()


def test_an_archive_without_tensors_is_one_too(tmp_path: Path) -> None:
    Draft(tmp_path / "none.irpa", Layout.of({})).close()
    assert archived(tmp_path / "none.irpa") == {}
