"""What an archive would hold of some tensors, made in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from llmbuild.kernels.shapes import DecoderShape, buffer_bytes
from llmbuild.transform.decoder import PARTS, layer_units
from llmbuild.transform.panels import encode_for
from llmbuild.transform.stored import Encoded
from llmbuild.transform.stream import Unit
from llmbuild.transform.weights import Array


def make(units: Iterable[Unit], tensors: Mapping[str, Array]) -> None:
    """Run the tasks of units; write what they make into tensors u8[n], and see that it is just what they promise."""
    for unit in units:
        covered = {region.tensor: np.zeros(len(tensors[region.tensor]), np.uint8) for region in unit.regions}
        for piece in (piece for task in unit.tasks for piece in task()):
            data = np.ascontiguousarray(piece.data).reshape(-1).view(np.uint8)
            tensors[piece.tensor][piece.offset : piece.offset + len(data)] = data
            covered[piece.tensor][piece.offset : piece.offset + len(data)] += 1
        for region in unit.regions:
            covered[region.tensor][region.offset : region.offset + region.size] -= 1
        assert not any(each.any() for each in covered.values()), f"{unit.name}: pieces are not the regions"


def layer_buffer(shape: DecoderShape, arrays: Mapping[str, Array]) -> Array:
    """Return the bytes u8[buffer_bytes(shape)] of a layer.

    `arrays` holds `norm1`, `norm2` f32[hidden], the `HEAD_NORMS` f32[head_dim] of a shape that has them, and the
    matrices f32[N,K] `query`, `key`, `value`, `out`, `gate`, `up`, `down`; a bias f32[N] of one of them is
    `<name>.bias`. Matrices are rounded to the nearest.
    """
    layouts = {part: layout for name, layout in shape.layouts().items() for part in PARTS[name]}

    def encode(part: str, start: int, stop: int) -> Encoded:
        return encode_for(layouts[part], arrays[part][start:stop])

    buffer = np.zeros(buffer_bytes(shape), np.uint8)
    make(layer_units("layer", 0, shape, arrays, encode, None), {"layer": buffer})
    return buffer
