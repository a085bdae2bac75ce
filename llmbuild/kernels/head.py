"""The end of a decoder as one dispatch: final norm and output matrix of any number of rows, and the first largest logit
of each.
"""

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
ARGUMENTS = ["x", "norm", "data", "scale", "read", "counters", "logits", "tokens", "scratch"]
NUMBERS = ["picked", "chosen"]
"""What the dispatch takes behind the rows: 1 where `read` names them, else 0; and for how many tokens are chosen."""
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
    wide: bool = False
    layer_weights: str = ""
    """Format of the layers, which leave hidden states as they lie; "" where they want nothing of their own."""

    @property
    def width(self) -> int:
        """Hidden states as they lie in memory: zeros behind the hidden size."""
        return up_to(self.hidden, multiple(self.weights, self.layer_weights))

    @property
    def layout(self) -> Layout:
        """How the matrix lies in panels."""
        return Layout(self.weights, self.width, self.narrow, self.wide)

    @property
    def padded(self) -> int:
        """Rows of the matrix, rounded up to panels."""
        return up_to(self.vocabulary, PANEL)


class HeadWriter:
    """Writes the body of a dispatch; each method is one phase."""

    def __init__(self, w: Writer, shape: HeadShape, unit: Instructions) -> None:
        self.w, self.shape, self.unit = w, shape, unit
        rows, self.picked, self.chosen = (
            w.cast("arith.index_cast", f"%{name}", "index", I64) for name in ("rows", *NUMBERS)
        )
        self.rows = rows
        self.p = bind(w, ARGUMENTS, {name: _size(w, shape, name, rows) for name in ARGUMENTS})
        number = worker(w)
        self.phases = Phases(w, self.p["counters"], number, shape.workers, unit.pause)
        behind = w.mul(self.rows, shape.layout.prepared_bytes)
        self.room = w.at(self.p["scratch"], behind, w.mul(number, shape.layout.spread_bytes))

    def normalize(self) -> None:
        """Normalize rows and prepare them for the matrix."""
        w, shape, layout = self.w, self.shape, self.shape.layout

        def unit(row: str) -> None:
            source = k.vectors(w, w.at(self.p["x"], w.mul(self._source(row), 4 * shape.width)))
            weight = k.vectors(w, self.p["norm"])
            factor = w.splat(k.inverse_norm(w, source, shape.hidden, shape.epsilon, shape.width))

            def normal(i: str) -> str:
                return w.op("arith.mulf", w.op("arith.mulf", source(i), factor), weight(i))

            products.prepare(w, layout, normal, w.at(self.p["scratch"], w.mul(row, layout.prepared_bytes)))

        self.phases.run(self.rows, unit)

    def _source(self, row: str) -> str:
        """Return which hidden states a row is made from."""
        w = self.w
        named = w.load(w.at(self.p["read"], w.mul(row, self.picked, 8)), I64, 8)
        return w.add(row, w.mul(self.picked, w.integers("subi", named, row)))

    def multiply(self) -> None:
        """Multiply the prepared rows by the matrix, panel by panel."""
        w, p, shape = self.w, self.p, self.shape
        panels = products.Panels(shape.layout, p["data"], p["scale"], None)

        def store(row: str, first: str, blocks: list[str]) -> None:
            for b, block in enumerate(blocks):
                place = w.mul(w.add(first, b * k.LANES), 4)
                w.store(block, w.at(p["logits"], w.mul(row, 4 * shape.padded), place), VF)

        self.phases.run(
            shape.padded // PANEL,
            lambda panel: products.multiply_panel(
                w, self.unit, panels, panel, p["scratch"], self.rows, store, self.room
            ),
        )

    def choose(self) -> None:
        """Find the tokens of rows."""
        w, p, shape = self.w, self.p, self.shape

        def unit(row: str) -> None:
            found = _first_largest(w, w.at(p["logits"], w.mul(row, 4 * shape.padded)), shape.vocabulary)
            w.store(found, w.at(p["tokens"], w.mul(row, 8)), I64, 8)

        self.phases.run(self.chosen, unit)


def _size(w: Writer, shape: HeadShape, name: str, rows: str) -> int | str:
    """Return the bytes of an argument."""
    size, per_row = _bytes(shape)[name]
    more = _spread_bytes(shape) if name == "scratch" else 0
    return w.add(w.mul(rows, size), more) if per_row else size


def _spread_bytes(shape: HeadShape) -> int:
    """Return the room behind prepared rows: a panel of each work-group whose codes have a byte each."""
    return shape.workers * shape.layout.spread_bytes


def _bytes(shape: HeadShape) -> dict[str, tuple[int, bool]]:
    """Return the bytes of each argument, and whether they are for each row."""
    panels = shape.padded // PANEL
    return {
        "x": (4 * shape.width, True),
        "norm": (4 * shape.width, False),
        "data": (panels * shape.layout.panel_bytes, False),
        "scale": (panels * shape.layout.scale_bytes, False),
        "counters": (counter_bytes(PHASES, shape.workers), False),
        "logits": (4 * shape.padded, True),
        "read": (8, False),
        "tokens": (8, True),
        "scratch": (shape.layout.prepared_bytes, True),
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


@dataclass(frozen=True)
class Types:
    """The types of MLIR that a dispatch takes besides its rows."""

    norm: str
    data: str
    scale: str
    counters: str


def types(shape: HeadShape) -> Types:
    """Return the types of an output matrix and of what belongs to it."""
    layout = shape.layout
    return Types(
        f"tensor<{shape.width}xf32>",
        f"tensor<{shape.padded // PANEL * layout.panel_elements}x{layout.element}>",
        f"tensor<{shape.padded // PANEL * layout.scale_elements}x{layout.scale_element}>",
        f"tensor<{_bytes(shape)['counters'][0]}xi8>",
    )


def scores(name: str) -> str:
    """Return the name of the function that gives the logits of all rows."""
    return f"{name}_scores"


def picked(name: str) -> str:
    """Return the name of the function that gives logits and tokens of some rows."""
    return f"{name}_picked"


def head(name: str, shape: HeadShape, unit: Instructions) -> str:
    """Return one executable and the three functions that dispatch it:

    `util.func @name(x [1,width], norm, data, scale) -> (logits [padded], token i64[1])`,
    `@scores(name)(x [T,width], norm, data, scale) -> logits [T,padded]`, and
    `@picked(name)(x [T,width], read i64[R], norm, data, scale) -> (logits [R,padded], tokens i64[R])` of the rows that
    `read` names. A row is rounded and summed alike in all of them.
    """
    w = Writer(name)
    body = HeadWriter(w, shape, unit)
    body.normalize()
    body.multiply()
    body.choose()
    return "\n".join(
        [
            executable(name, ARGUMENTS, w, shape.workers, NUMBERS),
            _one(name, shape),
            _all(name, shape),
            _some(name, shape),
        ]
    )


def _one(name: str, shape: HeadShape) -> str:
    of, wide, logits = types(shape), f"tensor<1x{shape.width}xf32>", f"tensor<{shape.padded}xf32>"
    room = f"tensor<{shape.layout.prepared_bytes + _spread_bytes(shape)}xi8>"
    kinds = f"{wide}, {of.norm}, {of.data}, {of.scale}, {wide}, {of.counters}, index, index, index"
    return f"""util.func private @{name}(%x: {wide}, %norm: {of.norm}, %data: {of.data}, %scale: {of.scale})
    -> ({logits}, tensor<1xi64>) {{
%zero = arith.constant 0 : index
%one = arith.constant 1 : index
{_counters(shape)}
%r:4 = flow.dispatch @{name}_ex::@{name}(%x, %norm, %data, %scale, %x, %counters, %one, %zero, %one)
    : ({kinds}) -> (%counters, {logits}, tensor<1xi64>, {room})
util.return %r#1, %r#2 : {logits}, tensor<1xi64>
}}"""


def _all(name: str, shape: HeadShape) -> str:
    of, wide, logits = types(shape), f"tensor<?x{shape.width}xf32>", f"tensor<?x{shape.padded}xf32>"
    sized = f"{wide}{{%rows}}"
    kinds = f"{sized}, {of.norm}, {of.data}, {of.scale}, {sized}, {of.counters}, index, index, index"
    return f"""util.func private @{scores(name)}(%x: {wide}, %norm: {of.norm}, %data: {of.data}, %scale: {of.scale})
    -> {logits} {{
%zero = arith.constant 0 : index
%rows = tensor.dim %x, %zero : {wide}
{_room(shape)}
{_counters(shape)}
%r:4 = flow.dispatch @{name}_ex::@{name}(%x, %norm, %data, %scale, %x, %counters, %rows, %zero, %zero)
    : ({kinds}) -> (%counters, {logits}{{%rows}}, tensor<?xi64>{{%rows}}, tensor<?xi8>{{%room}})
util.return %r#1 : {logits}
}}"""


def _some(name: str, shape: HeadShape) -> str:
    of, wide, logits = types(shape), f"tensor<?x{shape.width}xf32>", f"tensor<?x{shape.padded}xf32>"
    read = "tensor<?xi64>"
    kinds = f"{wide}{{%all}}, {of.norm}, {of.data}, {of.scale}, {read}{{%rows}}, {of.counters}, index, index, index"
    return f"""util.func private @{picked(name)}(%x: {wide}, %read: {read}, %norm: {of.norm}, %data: {of.data},
    %scale: {of.scale}) -> ({logits}, {read}) {{
%zero = arith.constant 0 : index
%one = arith.constant 1 : index
%all = tensor.dim %x, %zero : {wide}
%rows = tensor.dim %read, %zero : {read}
{_room(shape)}
{_counters(shape)}
%r:4 = flow.dispatch @{name}_ex::@{name}(%x, %norm, %data, %scale, %read, %counters, %rows, %one, %rows)
    : ({kinds}) -> (%counters, {logits}{{%rows}}, {read}{{%rows}}, tensor<?xi8>{{%room}})
util.return %r#1, %r#2 : {logits}, {read}
}}"""


def _counters(shape: HeadShape) -> str:
    return f"""%none = arith.constant 0 : i8
%counters = flow.tensor.splat %none : {types(shape).counters}"""


def _room(shape: HeadShape) -> str:
    """Return the operations that make `%room` of `%rows`."""
    return f"""%each = arith.constant {shape.layout.prepared_bytes} : index
%panels = arith.constant {_spread_bytes(shape)} : index
%grown = arith.muli %rows, %each : index
%room = arith.addi %grown, %panels : index"""
