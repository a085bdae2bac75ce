"""The sizes of a decoder that our kernels are written for, and where a layer's weights lie in their one buffer."""

from __future__ import annotations

from dataclasses import dataclass

PANEL, HALF_PANEL, LANES, LINE = 64, 32, 16, 64


def up_to(size: int, multiple: int) -> int:
    """Return the size rounded up to a multiple."""
    return -(-size // multiple) * multiple


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

    def problem(self) -> str | None:
        """Return why the kernels do not take this shape, or nothing."""
        if self.hidden % LANES or self.attended % LANES:
            return f"its own kernels need widths that are multiples of {LANES}, found {self.hidden} and {self.attended}"
        if self.head_dim % (2 * LANES):
            return f"its own kernels need a head size that is a multiple of {2 * LANES}, found {self.head_dim}"
        return None


@dataclass(frozen=True)
class Section:
    """A part of a layer's buffer: `offset` and `size` in bytes."""

    offset: int
    size: int


def sections(shape: DecoderShape) -> dict[str, Section]:
    """Return the parts of a layer's buffer in the order of their use, each on a cache line of its own.

    `norm*` are f32[hidden]; a matrix `m` has `m.scale` and `m.bias` f32[rows] and `m.data`, packed quads.
    """
    sizes = {"norm1": 4 * shape.hidden}
    sizes |= _matrix("qkv", shape.projected, shape.hidden)
    sizes |= _matrix("out", up_to(shape.hidden, PANEL), shape.attended)
    sizes |= {"norm2": 4 * shape.hidden}
    sizes |= _matrix("gate_up", 2 * shape.inner_padded, shape.hidden)
    sizes |= _matrix("down", up_to(shape.hidden, PANEL), shape.inner_padded)
    found, offset = {}, 0
    for name, size in sizes.items():
        found[name] = Section(offset, size)
        offset += up_to(size, LINE)
    return found


def _matrix(name: str, rows: int, columns: int) -> dict[str, int]:
    return {f"{name}.scale": 4 * rows, f"{name}.bias": 4 * rows, f"{name}.data": rows * columns}


def buffer_bytes(shape: DecoderShape) -> int:
    """Return the size of a layer's buffer."""
    last = list(sections(shape).values())[-1]
    return last.offset + up_to(last.size, LINE)
