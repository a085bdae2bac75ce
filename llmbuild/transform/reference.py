"""The arithmetic of our own kernels in NumPy: slow, plain, and the truth that they are checked against."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from llmbuild.kernels.elementwise import QUICK
from llmbuild.kernels.layouts import Layout
from llmbuild.kernels.shapes import HEAD_NORMS, DecoderShape
from llmbuild.transform.decoder import layer_matrices, section_of
from llmbuild.transform.kept import packed, unpacked
from llmbuild.transform.panels import Matrix
from llmbuild.transform.weights import Array, from_bf16, pad_width, to_bf16


def quantized_rows(x: Array, most: int = 127) -> tuple[Array, Array]:
    """Return integers (as f64) in -most..most and scales [T,1] of rows [T,K]: `round(x * most / max|x|)`."""
    top = np.abs(x).max(axis=1, keepdims=True).astype(np.float32)
    factor = np.float32(most) / np.maximum(top, np.float32(1e-30))
    return np.rint(x.astype(np.float32) * factor).astype(np.float64), top / np.float32(most)


def multiply(x: Array, matrix: Matrix) -> Array:
    """Return f32[T,N] of rows [T,K] times a matrix, rounded first if it wants them so."""
    rows = rounded_rows(x, matrix.layout)
    out: Array = (rows @ matrix.values.astype(np.float64).T * matrix.scale + matrix.bias).astype(np.float32)
    return out


def rounded_rows(x: Array, layout: Layout) -> Array:
    """Return rows f64[T,K] as they are when they meet weights of a layout."""
    if layout.block:
        codes, scale = quantized_rows(x.reshape(-1, layout.block), layout.most)
        return (codes * scale).reshape(x.shape)
    return (from_bf16(to_bf16(x)) if layout.narrow else x).astype(np.float64)


def normalize(x: Array, weight: Array, epsilon: float, size: int = 0) -> Array:
    """Return rows [...,K] scaled to a root mean square of 1, times the weight; behind `size` columns are zeros."""
    mean = np.square(x.astype(np.float64)).sum(axis=-1, keepdims=True) / (size or x.shape[-1])
    out: Array = (x / np.sqrt(mean + epsilon) * weight).astype(np.float32)
    return out


def activated(kind: str, gate: Array) -> Array:
    """Return f64 of what the kernels do with a gate, by the name they have for it."""
    x: Array = gate.astype(np.float64)
    if kind in ("relu", "relu_squared"):
        positive: Array = np.maximum(x, 0)
        return positive if kind == "relu" else np.square(positive)
    if kind == "gelu":
        factor: Array = (1 + np.vectorize(math.erf, otypes=[float])(x * math.sqrt(0.5))) / 2
    else:
        inner = {
            "silu": x,
            "gelu_quick": QUICK * x,
            "gelu_tanh": 2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3),
        }[kind]
        with np.errstate(over="ignore"):
            factor = 1 / (1 + np.exp(-inner))
    out: Array = x * factor
    return out


def rotated(x: Array, cosine: Array, sine: Array) -> Array:
    """Return heads [T,heads,head_dim] rotated by angles [T,head_dim]."""
    half = x.shape[-1] // 2
    turned = np.concatenate([-x[..., half:], x[..., :half]], axis=-1)
    out: Array = x * cosine[:, None] + turned * sine[:, None]
    return out


def layer(
    shape: DecoderShape,
    x: Array,
    cosine: Array,
    sine: Array,
    seen: Sequence[Array],
    buffer: Array,
    keys: Array,
    values: Array,
) -> tuple[Array, Array, Array]:
    """Return the new hidden states f32[T,width] and the new cache; arguments are those of the kernel, but that `seen`
    are the places in the cache that each row attends to, its own last.
    """
    matrices, rows = layer_matrices(shape, buffer), len(x)
    norms = [section_of(shape, buffer, name).view(np.float32) for name in ("norm1", "norm2")]
    qkv = multiply(normalize(x, norms[0], shape.epsilon, shape.hidden), matrices["qkv"])
    query, key, value = np.split(qkv, np.cumsum([shape.attended, shape.cached]), axis=1)
    query, key = query.reshape(rows, shape.heads, -1), key.reshape(rows, shape.kv_heads, -1)
    if shape.head_norms:
        weights = [section_of(shape, buffer, name).view(np.float32) for name in HEAD_NORMS]
        query, key = (normalize(part, w, shape.epsilon) for part, w in zip((query, key), weights, strict=True))
    key = rotated(key, cosine, sine)
    keys, values, own = keys.copy(), values.copy(), [places[-1] for places in seen]
    new = key, value[:, : shape.cached].reshape(rows, shape.kv_heads, -1)
    keys[own], values[own] = (packed(kept, part) for kept, part in zip(shape.kept, new, strict=True))
    attended = pad_width(_attend(shape, rotated(query, cosine, sine), seen, keys, values), shape.attended_padded)
    middle = x + multiply(attended, matrices["out"])[:, : shape.width]
    normal = normalize(middle, norms[1], shape.epsilon, shape.hidden)
    turns = multiply(normal, matrices["gate_up"]).reshape(rows, -1, 2, 32)
    inner = (activated(shape.activation, turns[:, :, 0]) * turns[:, :, 1]).reshape(rows, -1).astype(np.float32)
    return middle + multiply(inner, matrices["down"])[:, : shape.width], keys, values


def places(positions: Array, tables: Sequence[Array] = (), page: int = 0) -> list[Array]:
    """Return the places in a cache of what each row at these positions sees: of one sequence, or of rows whose pages
    are in the blocks that their tables name.
    """
    if not page:
        return [np.arange(position + 1) for position in positions]
    each = [np.arange(position + 1) for position in positions]
    return [table[seen // page] * page + seen % page for table, seen in zip(tables, each, strict=True)]


def _attend(shape: DecoderShape, query: Array, seen: Sequence[Array], keys: Array, values: Array) -> Array:
    groups = shape.heads // shape.kv_heads
    keys, values = (
        unpacked(kept, stored).astype(np.float64) for kept, stored in zip(shape.kept, (keys, values), strict=True)
    )
    out = np.zeros((len(query), shape.heads, shape.head_dim))
    for row in range(len(query)):
        for head in range(shape.heads):
            scores = keys[seen[row], head // groups] @ query[row, head] * shape.scale
            weights = np.exp(scores - scores.max())
            out[row, head] = weights @ values[seen[row], head // groups] / weights.sum()
    return out.reshape(len(query), -1).astype(np.float32)
