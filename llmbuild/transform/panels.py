"""Weight matrices in the panels that our kernels read, and back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmbuild.kernels.layouts import QUAD, Layout
from llmbuild.spec.formats import INTEGERS, SHARED
from llmbuild.transform import scales
from llmbuild.transform import shared_exponent as shared
from llmbuild.transform.quantized import Quantized, pad_columns, quantize, split_groups
from llmbuild.transform.weights import (
    PANEL,
    Array,
    from_bf16,
    pad_rows,
    pad_width,
    to_bf16,
)

EACH = np.uint32(0x01010101)
"""A bit of each of the four bytes of a quad."""


@dataclass(frozen=True)
class Matrix:
    """What a packed matrix says: `values * scale`, f32[N,K] and f32[N], plus a bias f32[N].

    The layout says how activations are rounded that it is multiplied by.
    """

    values: Array
    scale: Array
    bias: Array
    layout: Layout


def encode(form: str, dense: Array) -> Quantized | Array:
    """Return f32[N,K] in a format: as it is, quantized, or rounded to f16, to bf16 as u16, or to `f12_e4m7` as f32."""
    if form == "f32":
        return dense
    if form in INTEGERS:
        return quantize(dense, INTEGERS[form])
    if form == SHARED:
        return shared.nearest(dense)
    return dense.astype(np.float16) if form == "f16" else to_bf16(dense)


def encode_for(layout: Layout, dense: Array, ready: Quantized | None = None) -> Quantized | Array:
    """Return f32[N,K] in the format of a layout, with zeros in the columns that it has beyond K.

    What is `ready` was quantized before and is kept, unless it has groups that the layout has not.
    """
    if layout.is_block and ready is None:  # rounded first: a code of zero is chosen with the columns there are
        ready = quantize(dense, INTEGERS[layout.form])
    if ready is not None:
        kept = split_groups(pad_columns(ready, layout.columns), layout.group)
        if kept is not None:
            return kept
    return encode(layout.form, pad_width(dense, layout.columns))


def pack(layout: Layout, weights: Quantized | Array) -> tuple[Array, Array]:
    """Return data and scales as they lie there: data is int8, f16 or u16 (bf16), scales are also f32."""
    if layout.is_shared and not isinstance(weights, Quantized):
        rows = pad_rows(weights)
        bytes_ = shared.pack_codes(shared.codes(rows)).reshape(-1, PANEL, layout.columns // 8, 3, 4)
        return np.ascontiguousarray(bytes_.transpose(0, 2, 3, 1, 4)).reshape(-1).view(np.int8), shared.powers(rows)
    if not isinstance(weights, Quantized):
        rows = pad_rows(weights)
        each = 1 if layout.form == "f16" else 2
        data = rows.reshape(-1, PANEL, layout.columns // each, each).transpose(0, 2, 1, 3)
        return np.ascontiguousarray(data).reshape(-1), np.ones(len(rows), np.float32)
    form = INTEGERS[layout.form]
    if (weights.scales, weights.minimum is not None) != (form.scale, form.minimum):
        raise ValueError(f"{layout.form}: weights have other scales or minima than the layout")
    if weights.group != layout.group or weights.bits != form.bits:
        raise ValueError(f"{layout.form}: weights in groups of {weights.group} where the layout has {layout.group}")
    data = pack_codes(layout, weights.codes)
    scale = pad_rows(weights.scale.astype(np.float32))
    if layout.is_block:
        stored = [scale] if weights.minimum is None else [scale, pad_rows(weights.minimum)]
        halves = np.stack(stored, axis=2).astype(np.float16).reshape(-1, PANEL, layout.groups, len(stored))
        return data.reshape(-1).view(np.int8), np.ascontiguousarray(halves.transpose(0, 2, 3, 1)).reshape(-1)
    if layout.by_row:
        return data.reshape(-1).view(np.int8), np.ascontiguousarray(scale[:, 0])
    if layout.has_powers:
        return data.reshape(-1).view(np.int8), _pack_bytes(layout, weights.scale)
    short = to_bf16(scale).reshape(-1, PANEL, layout.groups).transpose(0, 2, 1)
    return data.reshape(-1).view(np.int8), np.ascontiguousarray(short).reshape(-1)


def _pack_bytes(layout: Layout, scale: Array) -> Array:
    """Return scales f32[N,groups] as they lie: int8 of a panel's groups, and then the bytes of its rows' powers."""
    codes, powers = (pad_rows(part) for part in scales.in_bytes(scale.astype(np.float32)))
    turned = codes.reshape(-1, PANEL, layout.groups).transpose(0, 2, 1).reshape(-1, PANEL * layout.groups)
    return np.concatenate([turned, powers.reshape(-1, PANEL).view(np.int8)], axis=1).reshape(-1)


def _unpack_bytes(layout: Layout, scale: Array) -> tuple[Array, Array]:
    """Return int8[N,groups] and powers f32[N] of what `_pack_bytes` made."""
    codes, powers = np.split(scale.view(np.int8).reshape(-1, layout.scale_bytes), [PANEL * layout.groups], axis=1)
    turned = codes.reshape(-1, layout.groups, PANEL).transpose(0, 2, 1).reshape(-1, layout.groups)
    return turned, np.ascontiguousarray(powers).view(np.float32).reshape(-1)


def unpack(layout: Layout, data: Array, scale: Array) -> tuple[Array, Array]:
    """Return values f32[N,K] and scales f32[N] of what `pack` made, given as bytes; rows that were added are there."""
    panels = len(data) // layout.panel_bytes
    if layout.is_half:
        each, kind = (1, np.float16) if layout.form == "f16" else (2, np.uint16)
        flat = data.view(kind).reshape(panels, layout.columns // each, PANEL, each).transpose(0, 2, 1, 3)
        stored = np.ascontiguousarray(flat).reshape(panels * PANEL, layout.columns)
        values = stored.astype(np.float32) if layout.form == "f16" else from_bf16(stored)
    elif layout.is_shared:
        bytes_ = data.view(np.uint8).reshape(panels, layout.columns // 8, 3, PANEL, 4).transpose(0, 3, 1, 2, 4)
        values = shared.values(shared.unpack_codes(bytes_)).reshape(panels * PANEL, layout.columns)
    else:
        values = unpack_codes(layout, data.view(np.uint8)).astype(np.float32)
    if layout.by_row:
        return values, scale.view(np.float32)
    if layout.has_powers:
        of_groups, powers = _unpack_bytes(layout, scale)
        values *= np.repeat(of_groups, layout.group, axis=1)
        return values, powers
    if layout.is_block:
        halves = scale.view(np.float16).astype(np.float32).reshape(panels, layout.groups, -1, PANEL)
        spread = np.repeat(halves.transpose(0, 3, 1, 2), layout.group, axis=2).reshape(*values.shape, -1)
        values *= spread[..., 0]
        return values + spread[..., 1] if layout.has_minimum else values, np.ones(panels * PANEL, np.float32)
    short = scale.view(np.uint16).reshape(panels, layout.groups, PANEL).transpose(0, 2, 1)
    grouped = from_bf16(np.ascontiguousarray(short)).reshape(panels * PANEL, layout.groups)
    values *= np.repeat(grouped, layout.group, axis=1)
    return values, np.ones(panels * PANEL, np.float32)


def pack_codes(layout: Layout, codes: Array) -> Array:
    """Return bytes u8[N/64, K/(4*quads), bytes, 64, 4] of codes int8[N,K] as the layout has them."""
    of = layout.codes
    shifted = pad_rows(codes).view(np.uint8) + np.uint8(layout.offset)  # modulo 256: none is negative then
    turns = shifted.view("<u4").reshape(-1, PANEL, codes.shape[1] // of.columns, of.quads)
    quads = np.ascontiguousarray(turns.transpose(0, 2, 3, 1))
    stored = quads[:, :, : of.bytes_].copy()  # the quads that are in the lower bits of a byte each
    for number in range(of.bytes_, of.quads):
        for bits in of.pieces(number):
            stored[:, :, bits.byte] |= (quads[:, :, number] >> bits.place & bits.mask * EACH) << bits.start
    return stored.view(np.uint8).reshape(*stored.shape, QUAD)


def unpack_codes(layout: Layout, data: Array) -> Array:
    """Return the codes int16[N,K] of what `pack_codes` made, given as bytes; rows that were added are there."""
    of = layout.codes
    stored = np.ascontiguousarray(data).view("<u4").reshape(-1, layout.columns // of.columns, of.bytes_, PANEL)
    quads = np.zeros((*stored.shape[:2], of.quads, PANEL), np.uint32)
    for number in range(of.quads):
        for bits in of.pieces(number):
            quads[:, :, number] |= (stored[:, :, bits.byte] >> bits.start & bits.mask * EACH) << bits.place
    rows = np.ascontiguousarray(quads.transpose(0, 3, 1, 2)).view(np.uint8)
    return rows.reshape(-1, layout.columns).astype(np.int16) - layout.offset
