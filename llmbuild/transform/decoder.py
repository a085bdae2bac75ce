"""The weights of one decoder layer as the one buffer that our kernels read."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from llmbuild.kernels.shapes import DecoderShape, buffer_bytes, sections, up_to
from llmbuild.transform.weights import PANEL, Array, interleave, pack_quads, pad_rows, quantize_rows


def layer_buffer(shape: DecoderShape, arrays: Mapping[str, Array]) -> Array:
    """Return bytes u8[buffer_bytes(shape)].

    `arrays` holds `norm1`, `norm2` f32[hidden] and the matrices f32[N,K] `query`, `key`, `value`, `out`, `gate`,
    `up`, `down`; a bias f32[N] of one of them is `<name>.bias`.
    """
    matrices = {
        "qkv": np.concatenate([arrays[name] for name in ("query", "key", "value")]),
        "out": arrays["out"],
        "gate_up": interleave(arrays["gate"], arrays["up"]),
        "down": _widen(arrays["down"], shape.inner_padded),
    }
    biases = {
        "qkv": np.concatenate([_bias(arrays, name) for name in ("query", "key", "value")]),
        "out": _bias(arrays, "out"),
        "gate_up": interleave(_bias(arrays, "gate"), _bias(arrays, "up")),
        "down": _bias(arrays, "down"),
    }
    parts = {"norm1": arrays["norm1"], "norm2": arrays["norm2"]}
    for name, dense in matrices.items():
        quantized, scale = quantize_rows(dense)
        parts |= {
            f"{name}.data": pack_quads(quantized),
            f"{name}.scale": pad_rows(scale),
            f"{name}.bias": pad_rows(biases[name]),
        }
    buffer = np.zeros(buffer_bytes(shape), np.uint8)
    for name, section in sections(shape).items():
        part = np.ascontiguousarray(parts[name])
        if part.nbytes != section.size:
            raise ValueError(f"{name}: {part.nbytes} bytes where the layout has {section.size}")
        buffer[section.offset : section.offset + section.size] = part.reshape(-1).view(np.uint8)
    return buffer


def _bias(arrays: Mapping[str, Array], name: str) -> Array:
    bias = arrays.get(f"{name}.bias")
    return np.zeros(len(arrays[name]), np.float32) if bias is None else bias


def _widen(dense: Array, columns: int) -> Array:
    wide = np.zeros((len(dense), columns), dense.dtype)
    wide[:, : dense.shape[1]] = dense
    return wide


def layer_matrices(shape: DecoderShape, buffer: Array) -> dict[str, tuple[Array, Array, Array]]:
    """Return int8[N,K], scales f32[N] and biases f32[N] of `qkv`, `out`, `gate_up` and `down`, padded as they lie
    there.
    """
    found = {}
    columns = {"qkv": shape.hidden, "out": shape.attended, "gate_up": shape.hidden, "down": shape.inner_padded}
    for name, width in columns.items():
        data, scale, bias = (section_of(shape, buffer, f"{name}.{part}") for part in ("data", "scale", "bias"))
        rows = up_to(len(data) // width, PANEL)
        quads = data.reshape(rows // PANEL, width // 4, 4, 16, 4)
        panels = quads.transpose(0, 2, 3, 1, 4).reshape(rows, width)
        found[name] = ((panels.astype(np.int16) - 128).astype(np.int8), scale.view(np.float32), bias.view(np.float32))
    return found


def section_of(shape: DecoderShape, buffer: Array, name: str) -> Array:
    """Return the bytes of one part of a layer's buffer."""
    section = sections(shape)[name]
    return buffer[section.offset : section.offset + section.size]
