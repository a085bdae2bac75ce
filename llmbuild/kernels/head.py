"""The end of a decoder as one dispatch: final norm, output matrix, and the first largest logit."""

from __future__ import annotations

from dataclasses import dataclass

from llmbuild.kernels import elementwise as k
from llmbuild.kernels import products
from llmbuild.kernels.instructions import Instructions
from llmbuild.kernels.layer import bind, executable, worker
from llmbuild.kernels.layouts import PANEL, Layout, up_to
from llmbuild.kernels.phases import Phases, counter_bytes
from llmbuild.kernels.shapes import multiple
from llmbuild.kernels.text import I32, I64, VF, VI, Writer

PHASES = 3
ARGUMENTS = ["x", "norm", "data", "scale", "counters", "logits", "token", "scratch"]
LOWEST = -3.0e38


@dataclass(frozen=True)
class HeadShape:
    """Sizes of the output matrix, and how many work-groups share the work."""

    hidden: int
    vocabulary: int
    epsilon: float
    workers: int
    weights: str = "int8"
    narrow: bool = False
    layer_weights: str = ""
    """Format of the layers, which leave hidden states as they lie; "" where they want nothing of their own."""

    @property
    def width(self) -> int:
        """Hidden states as they lie in memory: zeros behind the hidden size."""
        return up_to(self.hidden, multiple(self.weights, self.layer_weights))

    @property
    def layout(self) -> Layout:
        """How the matrix lies in panels."""
        return Layout(self.weights, self.width, self.narrow)

    @property
    def padded(self) -> int:
        """Rows of the matrix, rounded up to panels."""
        return up_to(self.vocabulary, PANEL)


def _body(shape: HeadShape, unit: Instructions) -> str:
    w = Writer()
    rows = w.integer(1)
    p = bind(w, ARGUMENTS, dict(_sizes(shape)))
    phases = Phases(w, p["counters"], worker(w), shape.workers, unit.pause)

    def normalize(row: str) -> None:
        source, weight = k.vectors(w, p["x"]), k.vectors(w, p["norm"])
        factor = w.splat(k.inverse_norm(w, source, shape.hidden, shape.epsilon, shape.width))

        def normal(i: str) -> str:
            return w.op("arith.mulf", w.op("arith.mulf", source(i), factor), weight(i))

        products.prepare(w, shape.layout, normal, w.at(p["scratch"], w.mul(row, shape.layout.prepared_bytes)))

    def store(_: str, first: str, blocks: list[str]) -> None:
        for b, block in enumerate(blocks):
            w.store(block, w.at(p["logits"], w.mul(w.add(first, b * k.LANES), 4)), VF)

    panels = products.Panels(shape.layout, p["data"], p["scale"], None)
    phases.run(1, normalize)
    phases.run(
        shape.padded // PANEL,
        lambda panel: products.multiply_panel(w, unit, panels, panel, p["scratch"], rows, store),
    )
    phases.run(1, lambda _: w.store(_first_largest(w, p["logits"], shape.vocabulary), p["token"], I64, 8))
    return w.text()


def _sizes(shape: HeadShape) -> dict[str, int | str]:
    return {
        "x": 4 * shape.width,
        "norm": 4 * shape.width,
        "data": shape.padded // PANEL * shape.layout.panel_bytes,
        "scale": shape.padded // PANEL * shape.layout.scale_bytes,
        "counters": counter_bytes(PHASES, shape.workers),
        "logits": 4 * shape.padded,
        "token": 8,
        "scratch": shape.layout.prepared_bytes,
    }


def _first_largest(w: Writer, logits: str, count: int) -> str:
    """Return the index (i64) of the first largest of `count` values f32, none of which is NaN."""
    at = k.vectors(w, logits)
    masks = "vector<16xi1>"
    order = w.constant(f"dense<[{', '.join(str(lane) for lane in range(k.LANES))}]>", VI)

    def body(i: str, best: str, where: str) -> list[str]:
        places = w.op("arith.addi", w.splat(w.cast("arith.trunci", i, I64, I32), VI), order, kind=VI)
        value = at(i)
        if count % k.LANES:
            real = w.let(f"arith.cmpi slt, {places}, {w.lanes(count, VI)} : {VI}")
            value = w.let(f"arith.select {real}, {value}, {w.lanes(LOWEST)} : {masks}, {VF}")
        greater = w.let(f"arith.cmpf ogt, {value}, {best} : {VF}")
        return [
            w.let(f"arith.select {greater}, {value}, {best} : {masks}, {VF}"),
            w.let(f"arith.select {greater}, {places}, {where} : {masks}, {VI}"),
        ]

    best, where = w.loop(0, count, k.LANES, body, [(w.lanes(LOWEST), VF), (w.lanes(0, VI), VI)])
    top = w.splat(w.top(best))
    equal = w.let(f"arith.cmpf oeq, {best}, {top} : {VF}")
    left = w.let(f"arith.select {equal}, {where}, {w.lanes(2**31 - 1, VI)} : {masks}, {VI}")
    return w.cast("arith.extui", w.let(f"vector.reduction <minsi>, {left} : {VI} into {I32}"), I32, I64)


def head(name: str, shape: HeadShape, unit: Instructions) -> str:
    """Return the executable and `util.func @name(x [1,hidden], norm, data, scale) -> (logits [padded], token
    i64[1])`.
    """
    sizes, layout = _sizes(shape), shape.layout
    wide, norm = f"tensor<1x{shape.width}xf32>", f"tensor<{shape.width}xf32>"
    data = f"tensor<{shape.padded // PANEL * layout.panel_elements}x{layout.element}>"
    scale = f"tensor<{shape.padded * layout.groups}x{layout.scale_element}>"
    logits = f"tensor<{shape.padded}xf32>"
    counters, room = f"tensor<{sizes['counters']}xi8>", f"tensor<{sizes['scratch']}xi8>"
    kinds = f"{wide}, {norm}, {data}, {scale}, {counters}, index"
    return f"""{executable(name, ARGUMENTS, _body(shape, unit), shape.workers)}
util.func private @{name}(%x: {wide}, %norm: {norm}, %data: {data}, %scale: {scale}) -> ({logits}, tensor<1xi64>) {{
%one = arith.constant 1 : index
%none = arith.constant 0 : i8
%counters = flow.tensor.splat %none : {counters}
%r:4 = flow.dispatch @{name}_ex::@{name}(%x, %norm, %data, %scale, %counters, %one)
    : ({kinds}) -> (%counters, {logits}, tensor<1xi64>, {room})
util.return %r#1, %r#2 : {logits}, tensor<1xi64>
}}"""
