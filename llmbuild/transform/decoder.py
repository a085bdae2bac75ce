"""The weights of one decoder layer as the one buffer that our kernels read."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from llmbuild.kernels.layouts import Layout
from llmbuild.kernels.shapes import HEAD_NORMS, NORMS, DecoderShape, sections
from llmbuild.transform.panels import Matrix, pack, unpack
from llmbuild.transform.stored import Encode, Encoded, Keep, Place, Rows, regions, tasks
from llmbuild.transform.stream import Piece, Region, Unit
from llmbuild.transform.weights import Array, interleave, pad_rows, pad_width

PARTS = {"qkv": ("query", "key", "value"), "out": ("out",), "gate_up": ("gate", "up"), "down": ("down",)}
"""The matrices of a layer, and those of the model that each is made of."""


def part_shapes(shape: DecoderShape) -> dict[str, tuple[int, int]]:
    """Return rows and columns of each of a layer's matrices as the model has them."""
    hidden, inner = shape.hidden, shape.inner
    return {
        "query": (shape.attended, hidden),
        "key": (shape.cached, hidden),
        "value": (shape.cached, hidden),
        "out": (hidden, shape.attended),
        "gate": (inner, hidden),
        "up": (inner, hidden),
        "down": (hidden, inner),
    }


def layer_units(
    tensor: str, base: int, shape: DecoderShape, vectors: Mapping[str, Array], encode: Encode, keep: Keep | None
) -> list[Unit]:
    """Return the units that make a layer's buffer, from byte `base` of a tensor on.

    `vectors` holds `norm1`, `norm2` f32[hidden], the `HEAD_NORMS` f32[head_dim] of a shape that has them, and biases
    `<part>.bias` f32[N]; `encode` and `keep` name a matrix by its part (`query`, `gate` ...), and rows that are encoded
    have the columns of their layout.
    """
    sizes, places = part_shapes(shape), sections(shape)
    small = {name: pad_width(vectors[name], shape.width) for name in NORMS.values()}
    small |= {name: vectors[name] for name in HEAD_NORMS if shape.head_norms}
    units = []
    for name, layout in shape.layouts().items():
        rows = Rows(tuple((part, sizes[part][0]) for part in PARTS[name]), turns=name == "gate_up")
        biases = [vectors.get(f"{part}.bias", np.zeros(sizes[part][0], np.float32)) for part in PARTS[name]]
        small[f"{name}.bias"] = pad_rows(interleave(*biases) if rows.turns else np.concatenate(biases))
        where = {
            part: Place(tensor, base + places[f"{name}.{part}"].offset, each, places[f"{name}.{part}"].size)
            for part, each in (("data", layout.panel_bytes), ("scale", layout.scale_bytes))
        }
        made = tasks(rows, sizes[PARTS[name][0]][1], encode, packer(layout), where, keep)
        units.append(Unit(f"{tensor}+{base} {name}", regions(where), made))
    pieces = tuple(
        Piece(tensor, base + places[name].offset, array.astype(np.float32, copy=False)) for name, array in small.items()
    )
    covered = tuple(Region(p.tensor, p.offset, p.data.nbytes) for p in pieces)
    return [*units, Unit(f"{tensor}+{base} vectors", covered, (lambda: pieces,))]


def packer(layout: Layout) -> Callable[[Encoded], dict[str, Array]]:
    """Return what puts encoded rows into panels."""

    def packed(part: Encoded) -> dict[str, Array]:
        data, scale = pack(layout, part)
        return {"data": data, "scale": scale}

    return packed


def layer_matrices(shape: DecoderShape, buffer: Array) -> dict[str, Matrix]:
    """Return what `qkv`, `out`, `gate_up` and `down` say, padded as they lie there."""
    found = {}
    for name, layout in shape.layouts().items():
        data, scale, bias = (section_of(shape, buffer, f"{name}.{part}") for part in ("data", "scale", "bias"))
        found[name] = Matrix(*unpack(layout, data, scale), bias.view(np.float32), layout)
    return found


def section_of(shape: DecoderShape, buffer: Array, name: str) -> Array:
    """Return the bytes of one part of a layer's buffer."""
    section = sections(shape)[name]
    return buffer[section.offset : section.offset + section.size]
