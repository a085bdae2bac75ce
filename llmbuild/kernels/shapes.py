"""The sizes of a decoder that our kernels are written for, and where a layer's weights lie in their one buffer."""

from __future__ import annotations

from dataclasses import dataclass

from llmbuild.kernels.kept import Kept, keys_and_values
from llmbuild.kernels.layouts import LINE, PANEL, PERIOD, Layout, up_to
from llmbuild.spec.formats import INTEGERS

HALF_PANEL, LANES = 32, 16
PAGE = 32
"""Positions of a page of a cache that sequences share: how finely they share it, and how long memory is read on end."""
NORMS = {"qkv": "norm1", "gate_up": "norm2"}
"""The norm before a matrix."""
HEAD_NORMS = ("query_norm", "key_norm")
"""The norms of each head's query and key, where there are any."""


def multiple(*formats: str) -> int:
    """Return what widths are rounded up to for matrices in these formats: columns beyond a width are zero."""
    return PERIOD if {*INTEGERS}.intersection(formats) else LANES


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of one decoder layer, of its cache, and how many work-groups share the work."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    epsilon: float
    scale: float
    context: int
    cache: str
    """What keys and values are kept as: one of `kept.CACHES`."""
    workers: int
    weights: str = "int8"
    part: int = 256
    """Positions that a unit of attention takes, where a single row has several such parts to see."""
    narrow: bool = False
    """Whether activations of floating-point weights are rounded to bf16."""
    wide: tuple[str, ...] = ()
    """Matrices of integers whose activations are rounded to two bytes each."""
    formats: tuple[tuple[str, str], ...] = ()
    """Matrices (`qkv`, `out`, `gate_up`, `down`) whose format is not `weights`, and which: integers where those are."""
    activation: str = "silu"
    """What is done with the gate, one of `elementwise.ACTIVATIONS`."""
    head_norms: bool = False
    """Whether each head's query and key are normalized before they are rotated."""
    head_weights: str = ""
    """Format of the output matrix, which reads the hidden states as they lie; "" where it wants nothing of its own."""
    page: int = PAGE
    """Positions of a page where sequences share a cache: a power of two, 16 or more."""

    @property
    def width(self) -> int:
        """Hidden states as they lie in memory: zeros behind the hidden size."""
        return up_to(self.hidden, multiple(self.weights, self.head_weights))

    @property
    def attended(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def attended_padded(self) -> int:
        """Columns of the output projection, zeros behind the heads."""
        return up_to(self.attended, multiple(self.weights))

    @property
    def cached(self) -> int:
        """Width of all key heads together."""
        return self.kv_heads * self.head_dim

    @property
    def kept(self) -> tuple[Kept, Kept]:
        """How a head's keys and its values at a position lie in the cache."""
        return keys_and_values(self.cache, self.head_dim)

    @property
    def projected(self) -> int:
        """Rows of the fused query, key and value matrix, rounded up to panels."""
        return up_to(self.attended + 2 * self.cached, PANEL)

    @property
    def inner_padded(self) -> int:
        """Width between gate/up and down: gate and up rows take turns of 32."""
        return up_to(self.inner, HALF_PANEL)

    def layouts(self) -> dict[str, Layout]:
        """Return how each matrix of a layer lies in panels."""
        width = self.width
        columns = {"qkv": width, "out": self.attended_padded, "gate_up": width, "down": self.inner_padded}
        formats = dict.fromkeys(columns, self.weights) | dict(self.formats)
        return {name: Layout(formats[name], size, self.narrow, name in self.wide) for name, size in columns.items()}


@dataclass(frozen=True)
class Section:
    """A part of a layer's buffer: `offset` and `size` in bytes."""

    offset: int
    size: int


def panels_of(shape: DecoderShape, name: str) -> int:
    """Return how many panels a matrix of a layer has."""
    rows = {"qkv": shape.projected, "out": shape.width, "gate_up": 2 * shape.inner_padded, "down": shape.width}
    return up_to(rows[name], PANEL) // PANEL


def sections(shape: DecoderShape) -> dict[str, Section]:
    """Return the parts of a layer's buffer in the order of their use, each on a cache line of its own.

    `norm*` are f32[width], norms of heads f32[head_dim]; a matrix `m` has `m.bias` f32[rows], and `m.scale` and
    `m.data` in panels.
    """
    sizes = {}
    for name, layout in shape.layouts().items():
        if name in NORMS:
            sizes[NORMS[name]] = 4 * shape.width
        panels = panels_of(shape, name)
        sizes |= {f"{name}.scale": panels * layout.scale_bytes, f"{name}.bias": 4 * PANEL * panels}
        sizes[f"{name}.data"] = panels * layout.panel_bytes
        if name == "qkv" and shape.head_norms:
            sizes |= dict.fromkeys(HEAD_NORMS, 4 * shape.head_dim)
    found, offset = {}, 0
    for name, size in sizes.items():
        found[name] = Section(offset, size)
        offset += up_to(size, LINE)
    return found


def buffer_bytes(shape: DecoderShape) -> int:
    """Return the size of a layer's buffer."""
    last = list(sections(shape).values())[-1]
    return last.offset + up_to(last.size, LINE)
