"""The look-up of tokens in an output matrix that lies in panels, as one dispatch: rows of it as f32.

It is plain code for any CPU: a row takes microseconds.
"""

from __future__ import annotations

from collections.abc import Callable

from llmbuild.kernels import shared_exponent as shared
from llmbuild.kernels.head import HeadShape, types
from llmbuild.kernels.layer import bind, executable, worker
from llmbuild.kernels.layouts import LIFT, PANEL, QUAD, Layout
from llmbuild.kernels.text import F32, I32, I64, Writer

FOUR, FOUR_INTEGERS, FOUR_BYTES = "vector<4xf32>", "vector<4xi32>", "vector<4xi8>"
ONE, ONE_INTEGER = "vector<1xf32>", "vector<1xi32>"

Put = Callable[[int | str, str, str], None]
"""Takes a column (i64), the f32 from it on, and their type."""


class LookWriter:
    """Writes what becomes of one token (i64); `factor` points to f32[width] that rows are multiplied by."""

    def __init__(self, w: Writer, layout: Layout, data: str, scale: str, token: str, factor: str = "") -> None:
        self.w, self.layout, self.factor = w, layout, factor
        panel, self.row = w.integers("divui", token, PANEL), w.integers("remui", token, PANEL)
        self.data = w.at(data, w.mul(panel, layout.panel_bytes))
        self.scales = w.at(scale, w.mul(panel, layout.scale_bytes))

    def write(self, out: str) -> None:
        """Write the token's row at a pointer."""
        w, layout = self.w, self.layout
        whole = self._scale(0) if layout.by_row else ""

        def put(column: int | str, values: str, kind: str) -> None:
            scale = whole or self._scale(w.integers("divui", column, layout.group))
            found = w.op("arith.mulf", values, w.splat(scale, kind), kind=kind)
            if layout.has_minimum:
                least = self._scale(w.integers("divui", column, layout.group), 1)
                found = w.op("arith.addf", found, w.splat(least, kind), kind=kind)
            place = w.mul(column, 4)
            if self.factor:
                found = w.op("arith.mulf", found, w.load(w.at(self.factor, place), kind), kind=kind)
            w.store(found, w.at(out, place), kind)

        if layout.is_shared:
            self._turns(shared.STEP, lambda first: self._shared(first, put))
        elif layout.is_half:
            self._turns(2, lambda first: self._halves(first, put))
        else:
            self._turns(layout.codes.columns, lambda first: self._codes(first, put))

    def _turns(self, step: int, body: Callable[[str], None]) -> None:
        def turn(first: str) -> list[str]:
            body(first)
            return []

        self.w.loop(0, self.layout.columns, step, turn)

    def _scale(self, group: int | str, which: int = 0) -> str:
        """Return the scale f32 of a group, or with `which` 1 its minimum."""
        w, layout = self.w, self.layout
        if layout.by_row:
            return self._of_row()
        each = layout.scales // layout.groups
        number = w.add(w.mul(w.add(w.mul(group, each), which), PANEL), self.row)
        place = w.at(self.scales, w.mul(number, layout.scale_size))
        if layout.has_powers:
            code = w.cast("arith.sitofp", w.cast("arith.extsi", w.load(place, "i8", 1), "i8", I32), I32, F32)
            return w.op("arith.mulf", code, self._of_row(), kind=F32)
        return self._half(place) if layout.is_block else self._brain(place)

    def _of_row(self) -> str:
        """Return the scale f32 of the whole row."""
        return self.w.load(self.w.at(self.scales, self.layout.row_scales or 0, self.w.mul(self.row, 4)), F32)

    def _half(self, place: str) -> str:
        return self.w.cast("arith.extf", self.w.load(place, "f16", 2), "f16", F32)

    def _brain(self, place: str) -> str:
        w = self.w
        wide = w.cast("arith.extui", w.load(place, "i16", 2), "i16", I32)
        return w.cast("arith.bitcast", w.op("arith.shli", wide, w.constant("16", I32), kind=I32), I32, F32)

    def _halves(self, first: str, put: Put) -> None:
        """Put two columns of f16 or bf16."""
        w, layout = self.w, self.layout
        for side in range(2):
            column = w.add(first, side)
            if layout.form == "f16":
                stored = self._half(w.at(self.data, w.mul(w.add(w.mul(column, PANEL), self.row), 2)))
            else:
                stored = self._brain(w.at(self.data, w.mul(w.add(w.mul(first, PANEL // 2), self.row), 4), 2 * side))
            put(column, w.splat(stored, ONE), ONE)

    def _shared(self, first: str, put: Put) -> None:
        """Put eight columns of numbers that share the exponent of their row."""
        w = self.w
        place = w.at(self.data, w.mul(first, self.layout.panel_bytes // self.layout.columns), w.mul(self.row, QUAD))
        parts = [w.load(w.at(place, i * QUAD * PANEL), ONE_INTEGER) for i in range(len(shared.MOVED))]
        for number, pair in enumerate(shared.pairs(w, 1, parts)):
            for side, low in enumerate(shared.split(w, 1, pair)):
                lifted = w.op("arith.mulf", low, w.lanes(LIFT, ONE), kind=ONE)
                put(w.add(first, 2 * number + side), lifted, ONE)

    def _codes(self, first: str, put: Put) -> None:
        """Put the columns whose codes lie together, a quad at a time."""
        w, codes = self.w, self.layout.codes
        turn = w.integers("divui", first, codes.columns)
        place = w.at(self.data, w.mul(turn, codes.bytes_ * QUAD * PANEL), w.mul(self.row, QUAD))
        stored = [
            w.cast("arith.extui", w.load(w.at(place, i * QUAD * PANEL), FOUR_BYTES), FOUR_BYTES, FOUR_INTEGERS)
            for i in range(codes.bytes_)
        ]
        offset = w.lanes(self.layout.offset, FOUR_INTEGERS)
        for number in range(codes.quads):
            whole = w.lanes(0, FOUR_INTEGERS)
            for piece in codes.pieces(number):
                part = w.op("arith.shrui", stored[piece.byte], w.lanes(piece.start, FOUR_INTEGERS), kind=FOUR_INTEGERS)
                part = w.op("arith.andi", part, w.lanes(piece.mask, FOUR_INTEGERS), kind=FOUR_INTEGERS)
                part = w.op("arith.shli", part, w.lanes(piece.place, FOUR_INTEGERS), kind=FOUR_INTEGERS)
                whole = w.op("arith.ori", whole, part, kind=FOUR_INTEGERS)
            code = w.op("arith.subi", whole, offset, kind=FOUR_INTEGERS)
            values = w.cast("arith.sitofp", code, FOUR_INTEGERS, FOUR)
            put(w.add(first, QUAD * number), values, FOUR)


def look(name: str, shape: HeadShape, scaled: bool = False) -> str:
    """Return the executable and `util.func @name(tokens i64[1,T], data, scale) -> f32[1,T,width]`.

    With `scaled` the function takes f32[width] last, which rows are multiplied by.
    """
    layout, of = shape.layout, types(shape)
    names = ["tokens", "data", "scale", *(["factor"] if scaled else []), "out"]
    w, panels = Writer(), shape.padded // PANEL
    rows = w.cast("arith.index_cast", "%rows", "index", I64)
    row_bytes = 4 * shape.width
    sizes: dict[str, int | str] = {
        "tokens": w.mul(rows, 8), "data": panels * layout.panel_bytes, "scale": panels * layout.scale_bytes,
        "factor": row_bytes, "out": w.mul(rows, row_bytes),
    }  # fmt: skip
    p = bind(w, names, {n: sizes[n] for n in names})

    def row(number: str) -> list[str]:
        token = w.load(w.at(p["tokens"], w.mul(number, 8)), I64, 8)
        found = LookWriter(w, layout, p["data"], p["scale"], token, p.get("factor", ""))
        found.write(w.at(p["out"], w.mul(number, row_bytes)))
        return []

    w.loop(worker(w), rows, shape.workers, row)
    taken = [("data", of.data), ("scale", of.scale), *([("factor", f"tensor<{shape.width}xf32>")] if scaled else [])]
    tokens, wide = "tensor<1x?xi64>", f"tensor<1x?x{shape.width}xf32>"
    declared = ", ".join(f"%{n}: {kind}" for n, kind in [("tokens", tokens), *taken])
    given = ", ".join(["%tokens", *(f"%{n}" for n, _ in taken), "%rows"])
    kinds = ", ".join([f"{tokens}{{%rows}}", *(kind for _, kind in taken), "index"])
    return f"""{executable(name, names, w, shape.workers)}
util.func private @{name}({declared}) -> {wide} {{
%one = arith.constant 1 : index
%rows = tensor.dim %tokens, %one : {tokens}
%found = flow.dispatch @{name}_ex::@{name}({given}) : ({kinds}) -> {wide}{{%rows}}
util.return %found : {wide}
}}"""
