"""A module of nothing but products, to see what they are and what they become."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from llmbuild.kernels.instructions import Instructions
from llmbuild.kernels.layer import bind, executable
from llmbuild.kernels.layouts import LOW, LOW_BITS, Layout
from llmbuild.kernels.text import I64, PTR, VF, Writer
from llmbuild.transform.panels import pack
from llmbuild.transform.quantized import Quantized
from llmbuild.transform.weights import Array


def panel(layout: Layout, weights: Quantized | Array) -> Any:
    """Return the bytes of one panel, with its scales behind its data where products take them."""
    data, scales = (part.view(np.int8) for part in pack(layout, weights))
    return data if layout.by_row else np.concatenate([data, scales])


def prepared(layout: Layout, x: Any) -> Any:
    """Return rows of integers as the layout wants them, with scales of one."""
    rows = np.zeros((len(x), layout.prepared_bytes), np.uint8)
    factors, first = np.ones((len(x), layout.blocks), np.float32), layout.header_bytes
    rows[:, : 4 * layout.blocks] = factors.view(np.uint8)
    total = x.reshape(len(x), layout.blocks, -1).sum(2).astype(np.int32)
    starts = total.astype(np.float32) if layout.has_minimum else -layout.offset * total
    rows[:, layout.factors_bytes : layout.factors_bytes + 4 * layout.blocks] = starts.view(np.uint8)
    high = x + LOW // 2 >> LOW_BITS
    for plane, numbers in enumerate((high, x - (high << LOW_BITS)) if layout.wide else (x,)):
        place = first + plane * layout.plane_bytes
        rows[:, place : place + layout.columns] = numbers.astype(np.int8).view(np.uint8)
    return rows.reshape(-1).view(np.int8)


def products_module(unit: Instructions, layout: Layout, rows: int, calls: int = 1) -> str:
    """Return MLIR of `main(panel, prepared rows, ...) -> (f32[64 * rows], ...)`, of as many products as `calls`.

    Panels are as `panel` gives them. Several rows have codes that share bytes taken apart first, as in our kernels.
    """
    w, names, row = Writer(), ["panel", "x", "out"], layout.prepared_bytes
    size = layout.panel_bytes + (0 if layout.by_row else layout.scale_bytes)
    p = bind(w, names, {"panel": size, "x": rows * row, "out": 4 * 64 * rows})
    kernel = unit.kernels[layout.family]
    lies, data, scales = layout, p["panel"], w.at(p["panel"], layout.panel_bytes)
    if rows > 1 and kernel.spread is not None and layout.spread_bytes:
        aligned = f"{w.integer(layout.spread_bytes)} x i8 {{alignment = 64 : i64}}"
        lies, data = replace(layout, spread=True), w.let(f"llvm.alloca {aligned} : ({I64}) -> {PTR}")
        kernel.spread(w, layout, p["panel"], data)
    sums = kernel.sums(w, lies, data, scales, [w.at(p["x"], r * row) for r in range(rows)], data)
    for i, block in enumerate(block for blocks in sums for block in blocks):
        w.store(block, w.at(p["out"], 64 * i), VF)
    panel, x, out = f"tensor<{size}xi8>", f"tensor<{rows * row}xi8>", f"tensor<{64 * rows}xf32>"
    taken = ", ".join(f"%panel{i}: {panel}, %x{i}: {x}" for i in range(calls))
    products = "\n".join(
        f"%out{i} = flow.dispatch @products_ex::@products(%panel{i}, %x{i}, %one) : ({panel}, {x}, index) -> {out}"
        for i in range(calls)
    )
    made = ", ".join([out] * calls)
    return f"""{executable("products", names, w, 1)}
util.func public @main({taken}) -> ({made}) {{
%one = arith.constant 1 : index
{products}
util.return {", ".join(f"%out{i}" for i in range(calls))} : {made}
}}"""
