"""The weights of one decoder layer as the one buffer that our kernels read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from llmbuild.kernels.layouts import Layout
from llmbuild.kernels.shapes import DecoderShape, buffer_bytes, sections
from llmbuild.transform.panels import Matrix, encode, pack, unpack
from llmbuild.transform.quantized import Quantized
from llmbuild.transform.weights import Array, interleave, pad_rows

PARTS = {"qkv": ("query", "key", "value"), "out": ("out",), "gate_up": ("gate", "up"), "down": ("down",)}
"""The matrices of a layer, and those of the model that each is made of."""


def layer_buffer(
    shape: DecoderShape, arrays: Mapping[str, Array], ready: Mapping[str, Quantized] | None = None
) -> Array:
    """Return bytes u8[buffer_bytes(shape)].

    `arrays` holds `norm1`, `norm2` f32[hidden] and the matrices f32[N,K] `query`, `key`, `value`, `out`, `gate`,
    `up`, `down`; a bias f32[N] of one of them is `<name>.bias`. A matrix that is `ready` was quantized before; the
    others are rounded to the nearest.
    """
    parts = {"norm1": arrays["norm1"], "norm2": arrays["norm2"]}
    for name, layout in shape.layouts().items():
        encoded = [_encoded(layout, arrays[part], (ready or {}).get(part)) for part in PARTS[name]]
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


def _encoded(layout: Layout, dense: Array, ready: Quantized | None) -> Quantized | Array:
    if ready is not None and dense.shape[1] == layout.columns:
        return ready
    return encode(layout.form, _widen(dense, layout.columns))


def _joined(parts: list[Quantized | Array], join: Callable[..., Array]) -> Quantized | Array:
    """Return matrices of one format as one; `join` says in which order their rows come."""
    quantized = [part for part in parts if isinstance(part, Quantized)]
    if not quantized:
        return join(*parts)
    codes, scale = (join(*[getattr(part, field) for part in quantized]) for field in ("codes", "scale"))
    return replace(quantized[0], codes=codes, scale=scale)


def _stack(*parts: Array) -> Array:
    return np.concatenate(parts)


def _bias(arrays: Mapping[str, Array], name: str) -> Array:
    bias = arrays.get(f"{name}.bias")
    return np.zeros(len(arrays[name]), np.float32) if bias is None else bias


def _widen(dense: Array, columns: int) -> Array:
    wide = np.zeros((len(dense), columns), dense.dtype)
    wide[:, : dense.shape[1]] = dense
    return wide


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
