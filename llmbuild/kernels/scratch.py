"""The scratch memory of decoder layers: what is in it, and where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmbuild.kernels import elementwise as k
from llmbuild.kernels.attention import Parts
from llmbuild.kernels.layouts import LINE, Layout, up_to
from llmbuild.kernels.shapes import DecoderShape

MAX_PARTS = 16
"""Parts that the positions a row sees are cut into at most."""


@dataclass(frozen=True)
class Scratch:
    """Offsets of the regions of a layer's scratch: scores of each work-group, from `parts` on what parts of the
    positions came to, of each head or each work-group, from `spread` on a panel of each work-group whose codes have a
    byte each, and from `fixed` on `per_row` bytes per row of T.
    """

    parts: int
    spread: int
    fixed: int
    per_row: dict[str, int]

    def total(self, rows: int) -> int:
        """Return the size for T rows, in bytes."""
        return self.fixed + rows * sum(self.per_row.values())


def scratch(shapes: Sequence[DecoderShape]) -> Scratch:
    """Return the scratch of layers, one another but for their formats; every region is a multiple of a cache line per
    row.
    """
    shape = shapes[0]
    per_row = {
        "qkv": 4 * shape.projected,
        "attended": up_to(4 * shape.attended_padded, LINE),
        "middle": up_to(4 * shape.width, LINE),
        "inner": 4 * shape.inner_padded,
        "prepared": max(layout.prepared_bytes for layout in _layouts(shapes)),
    }
    parts = score_bytes(shape) * shape.workers
    spread = parts + max(shape.heads, shape.workers) * MAX_PARTS * Parts.stride(shape.head_dim)
    return Scratch(parts, spread, spread + spread_bytes(shapes) * shape.workers, per_row)


def spread_bytes(shapes: Sequence[DecoderShape]) -> int:
    """Return the room for a panel whose codes have a byte each."""
    return max(layout.spread_bytes for layout in _layouts(shapes))


def _layouts(shapes: Sequence[DecoderShape]) -> set[Layout]:
    return {layout for shape in shapes for layout in shape.layouts().values()}


def score_bytes(shape: DecoderShape) -> int:
    """Return the room for the scores of a head."""
    return up_to(4 * (shape.context + 2 * k.LANES), LINE)
