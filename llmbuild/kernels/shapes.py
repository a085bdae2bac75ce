"""The sizes of a decoder that our kernels are written for, and where a layer's weights lie in their one buffer."""

from __future__ import annotations

from dataclasses import dataclass

from llmbuild.kernels.layouts import LINE, PANEL, Layout, up_to

HALF_PANEL, LANES = 32, 16


NORMS = {"qkv": "norm1", "gate_up": "norm2"}
"""The norm before a matrix."""


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
    half_cache: bool
    workers: int
    weights: str = "int8"
    part: int = 256
    """Positions that a unit of attention takes, where a single row has several such parts to see."""
    narrow: bool = False
    """Whether activations of floating-point weights are rounded to bf16."""

    @property
    def attended(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def cached(self) -> int:
        """Width of all key heads together."""
        return self.kv_heads * self.head_dim

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
        columns = {"qkv": self.hidden, "out": self.attended, "gate_up": self.hidden, "down": self.inner_padded}
        return {name: Layout(self.weights, width, self.narrow) for name, width in columns.items()}

    def problem(self) -> str | None:
        """Return why the kernels do not take this shape, or nothing."""
        if self.hidden % LANES or self.attended % LANES:
            return f"its own kernels need widths that are multiples of {LANES}, found {self.hidden} and {self.attended}"
        if problem := self.layouts()["qkv"].problem():
            return problem
        if self.head_dim % (2 * LANES):
            return f"its own kernels need a head size that is a multiple of {2 * LANES}, found {self.head_dim}"
        return None


@dataclass(frozen=True)
class Section:
    """A part of a layer's buffer: `offset` and `size` in bytes."""

    offset: int
    size: int


def panels_of(shape: DecoderShape, name: str) -> int:
    """Return how many panels a matrix of a layer has."""
    rows = {"qkv": shape.projected, "out": shape.hidden, "gate_up": 2 * shape.inner_padded, "down": shape.hidden}
    return up_to(rows[name], PANEL) // PANEL


def sections(shape: DecoderShape) -> dict[str, Section]:
    """Return the parts of a layer's buffer in the order of their use, each on a cache line of its own.

    `norm*` are f32[hidden]; a matrix `m` has `m.bias` f32[rows], and `m.scale` and `m.data` in panels.
    """
    sizes = {}
    for name, layout in shape.layouts().items():
        if name in NORMS:
            sizes[NORMS[name]] = 4 * shape.hidden
        panels = panels_of(shape, name)
        sizes |= {f"{name}.scale": panels * layout.scale_bytes, f"{name}.bias": 4 * PANEL * panels}
        sizes[f"{name}.data"] = panels * layout.panel_bytes
    found, offset = {}, 0
    for name, size in sizes.items():
        found[name] = Section(offset, size)
        offset += up_to(size, LINE)
    return found


def buffer_bytes(shape: DecoderShape) -> int:
    """Return the size of a layer's buffer."""
    last = list(sections(shape).values())[-1]
    return last.offset + up_to(last.size, LINE)
