"""The weights of one decoder layer as the one buffer that our kernels read."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from llmbuild.kernels.shapes import HEAD_NORMS, NORMS, DecoderShape, buffer_bytes, sections
from llmbuild.transform.panels import Matrix, encode_for, pack, unpack
from llmbuild.transform.quantized import Quantized, joined
from llmbuild.transform.weights import Array, interleave, pad_rows, pad_width

PARTS = {"qkv": ("query", "key", "value"), "out": ("out",), "gate_up": ("gate", "up"), "down": ("down",)}
"""The matrices of a layer, and those of the model that each is made of."""


def layer_buffer(
    shape: DecoderShape, arrays: Mapping[str, Array], ready: Mapping[str, Quantized] | None = None
) -> Array:
    """Return bytes u8[buffer_bytes(shape)].

    `arrays` holds `norm1`, `norm2` f32[hidden], the `HEAD_NORMS` f32[head_dim] of a shape that has them, and the
    matrices f32[N,K] `query`, `key`, `value`, `out`, `gate`, `up`, `down`; a bias f32[N] of one of them is
    `<name>.bias`. A matrix that is `ready` was quantized before; the others are rounded to the nearest.
    """
    parts = {name: pad_width(arrays[name], shape.width) for name in NORMS.values()}
    parts |= {name: arrays[name] for name in HEAD_NORMS if shape.head_norms}
    for name, layout in shape.layouts().items():
        encoded = [encode_for(layout, arrays[part], (ready or {}).get(part)) for part in PARTS[name]]
        join = interleave if name == "gate_up" else _stack
        data, scale = pack(layout, _joined(encoded, join))
        bias = join(*[_bias(arrays, part) for part in PARTS[name]])
        parts |= {f"{name}.data": data, f"{name}.scale": scale, f"{name}.bias": pad_rows(bias)}
    buffer = np.zeros(buffer_bytes(shape), np.uint8)
    for name, section in sections(shape).items():
        stored = np.ascontiguousarray(parts[name])
        if stored.nbytes != section.size:
            raise ValueError(f"{name}: {stored.nbytes} bytes where the layout has {section.size}")
        buffer[section.offset : section.offset + section.size] = stored.reshape(-1).view(np.uint8)
    return buffer


def _joined(parts: list[Quantized | Array], join: Callable[..., Array]) -> Quantized | Array:
    """Return matrices of one format as one; `join` says in which order their rows come."""
    quantized = [part for part in parts if isinstance(part, Quantized)]
    if not quantized:
        return join(*parts)
    return joined(quantized, join)


def _stack(*parts: Array) -> Array:
    return np.concatenate(parts)


def _bias(arrays: Mapping[str, Array], name: str) -> Array:
    bias = arrays.get(f"{name}.bias")
    return np.zeros(len(arrays[name]), np.float32) if bias is None else bias


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
