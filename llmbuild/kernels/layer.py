"""One decoder layer as one dispatch: ten phases over T rows, from hidden states to hidden states, cache written in place."""

from __future__ import annotations

from dataclasses import dataclass

from llmbuild.kernels import avx512 as k
from llmbuild.kernels.phases import Phases, counter_bytes
from llmbuild.kernels.shapes import LINE, PANEL, DecoderShape, buffer_bytes, sections, up_to
from llmbuild.kernels.text import I64, PTR, VF, Writer

PHASES = 10
BINDING = "memref<?xi8, strided<[1], offset: ?>>"
"""Bytes at an offset that the compiler chooses when it merges bindings; with a plain memref the offset would be dropped."""


def bind(w: Writer, names: list[str], sizes: dict[str, int | str]) -> dict[str, str]:
    """Turn `!stream.binding` arguments into pointers; `sizes` are in bytes."""
    zero = w.constant("0", "index")
    found = {}
    for name in names:
        size = w.cast("arith.index_cast", w.integer(sizes[name]), I64, "index")
        view = w.let(f"stream.binding.subspan %{name}[{zero}] : !stream.binding -> {BINDING}{{{size}}}")
        address = w.let(f"memref.extract_aligned_pointer_as_index {view} : {BINDING} -> index")
        found[name] = w.cast("llvm.inttoptr", w.cast("arith.index_cast", address, "index", I64), I64, PTR)
    return found


def executable(name: str, arguments: list[str], body: str, workers: int) -> str:
    """Return a `stream.executable` with one entry point that takes bindings and then the row count as an index."""
    bindings = ", ".join(f"%{argument}: !stream.binding" for argument in arguments)
    pipeline = "#iree_codegen.translation_info<pipeline = #iree_codegen.no_pipeline>"
    return f"""stream.executable private @{name}_ex {{
stream.executable.export public @{name} workgroups() -> (index, index, index) {{
%x = arith.constant {workers} : index
%y = arith.constant 1 : index
stream.return %x, %y, %y : index, index, index
}}
builtin.module {{
func.func @{name}({bindings}, %rows: index) attributes {{translation_info = {pipeline}}} {{
{body}
return
}} }} }}"""


def worker(w: Writer) -> str:
    """Return the work-group's number as i64."""
    return w.cast("arith.index_cast", w.let("stream.dispatch.workgroup.id[0] : index"), "index", I64)


@dataclass(frozen=True)
class Scratch:
    """Offsets of the regions of a layer's scratch: `per_row` are bytes per row of T, after a part for each work-group."""

    scores: int
    per_row: dict[str, int]

    def total(self, rows: int) -> int:
        """Return the size for T rows, in bytes."""
        return self.scores + rows * sum(self.per_row.values())


def scratch(shape: DecoderShape) -> Scratch:
    """Return the scratch of a layer; every region is a multiple of a cache line per row."""
    widest = up_to(max(shape.hidden, shape.attended, shape.inner_padded), LINE)
    per_row = {
        "qkv": 4 * shape.projected,
        "attended": up_to(4 * shape.attended, LINE),
        "middle": up_to(4 * shape.hidden, LINE),
        "inner": 4 * shape.inner_padded,
        "bytes": widest,
        "scales": LINE,
        "sums": LINE,
    }
    return Scratch(_score_bytes(shape) * shape.workers, per_row)


def _score_bytes(shape: DecoderShape) -> int:
    return up_to(4 * (shape.context + 2 * k.LANES), LINE)


ARGUMENTS = ["x", "cosine", "sine", "start", "weights", "counters", "keys", "values", "out", "scratch"]


class LayerWriter:
    """Writes the body of the dispatch; each method is one phase."""

    def __init__(self, shape: DecoderShape) -> None:
        self.shape = shape
        self.w = w = Writer()
        self.rows = w.cast("arith.index_cast", "%rows", "index", I64)
        self.p = bind(w, ARGUMENTS, self._sizes())
        self.number = worker(w)
        self.start = w.load(self.p["start"], I64, 8)
        self.s, base = {}, scratch(shape).scores
        offset = w.integer(base)
        for region, size in scratch(shape).per_row.items():
            self.s[region] = w.at(self.p["scratch"], offset)
            offset = w.add(offset, w.mul(self.rows, size))
        self.parts = {name: w.at(self.p["weights"], part.offset) for name, part in sections(shape).items()}
        self.phases = Phases(w, self.p["counters"], self.number, shape.workers)

    def _sizes(self) -> dict[str, int | str]:
        w, shape, rows = self.w, self.shape, self.rows
        cache = shape.context * shape.cached * (2 if shape.half_cache else 4)
        row = w.mul(rows, 4 * shape.hidden)
        angle = w.mul(rows, 4 * shape.head_dim)
        size = scratch(shape)
        return {
            "x": row, "out": row, "cosine": angle, "sine": angle, "start": 8, "weights": buffer_bytes(shape),
            "keys": cache, "values": cache, "counters": counter_bytes(PHASES, shape.workers),
            "scratch": w.add(size.scores, w.mul(rows, size.total(1) - size.scores)),
        }  # fmt: skip

    def text(self) -> str:
        """Write all phases and return the body."""
        shape, s = self.shape, self.s
        hidden = 4 * shape.hidden
        self.normalize("norm1", self.p["x"], hidden)
        self.multiply("qkv", shape.projected, shape.hidden, self.plain(s["qkv"], 4 * shape.projected))
        self.rotate()
        self.attend()
        self.quantize(s["attended"], shape.attended, up_to(4 * shape.attended, LINE))
        self.multiply("out", shape.hidden, shape.attended, self.residual(self.p["x"], hidden, s["middle"], self._middle))
        self.normalize("norm2", s["middle"], self._middle)
        self.multiply("gate_up", 2 * shape.inner_padded, shape.hidden, self.gated)
        self.quantize(s["inner"], shape.inner_padded, 4 * shape.inner_padded)
        last = self.residual(s["middle"], self._middle, self.p["out"], hidden)
        self.multiply("down", shape.hidden, shape.inner_padded, last)
        return self.w.text()

    @property
    def _middle(self) -> int:
        return up_to(4 * self.shape.hidden, LINE)

    def quantized(self, columns: int) -> k.Quantized:
        """Return the rows of signed bytes, as wide as their current content."""
        return k.Quantized(self.s["bytes"], self.s["scales"], self.s["sums"], up_to(columns, LINE))

    def normalize(self, norm: str, source: str, stride: int) -> None:
        """Normalize rows and quantize them."""
        w, size = self.w, self.shape.hidden

        def unit(row: str) -> None:
            x = k.vectors(w, w.at(source, w.mul(row, stride)))
            factor = w.splat(k.inverse_norm(w, x, size, self.shape.epsilon))
            weight = k.vectors(w, self.parts[norm])

            def normal(i: str) -> str:
                return w.op("arith.mulf", w.op("arith.mulf", x(i), factor), weight(i))

            k.quantize_row(w, normal, size, self.quantized(size).row(w, row))

        self.phases.run(self.rows, unit)

    def quantize(self, source: str, size: int, stride: int) -> None:
        """Quantize rows."""
        w = self.w

        def unit(row: str) -> None:
            x = k.vectors(w, w.at(source, w.mul(row, stride)))
            k.quantize_row(w, x, size, self.quantized(size).row(w, row))

        self.phases.run(self.rows, unit)

    def multiply(self, name: str, outputs: int, columns: int, finish: k.Epilogue) -> None:
        """Multiply the quantized rows by a matrix, panel by panel."""
        parts = self.parts
        panels = k.Panels(parts[f"{name}.data"], parts[f"{name}.scale"], parts[f"{name}.bias"], columns)
        x = self.quantized(columns)
        self.phases.run(
            up_to(outputs, PANEL) // PANEL,
            lambda panel: k.multiply_panel(self.w, panels, panel, x, self.rows, finish),
        )

    def plain(self, target: str, stride: int) -> k.Epilogue:
        """Store a panel's outputs as they are; rows are whole panels wide."""
        w = self.w

        def finish(row: str, first: str, blocks: list[str]) -> None:
            for b, block in enumerate(blocks):
                w.store(block, w.at(target, w.mul(row, stride), w.mul(w.add(first, b * k.LANES), 4)), VF)

        return finish

    def residual(self, source: str, source_stride: int, target: str, target_stride: int) -> k.Epilogue:
        """Add the residual; outputs past the hidden size are left out."""
        w, size = self.w, self.shape.hidden

        def finish(row: str, first: str, blocks: list[str]) -> None:
            for b, block in enumerate(blocks):
                column = w.add(first, b * k.LANES)
                with w.when(w.below(column, size)):
                    old = w.load(w.at(source, w.mul(row, source_stride), w.mul(column, 4)), VF)
                    new = w.op("arith.addf", old, block)
                    w.store(new, w.at(target, w.mul(row, target_stride), w.mul(column, 4)), VF)

        return finish

    def gated(self, row: str, first: str, blocks: list[str]) -> None:
        """Store `silu(gate) * up`: a panel holds 32 gate rows and their 32 up rows."""
        w, stride = self.w, 4 * self.shape.inner_padded
        for b in range(2):
            value = k.sigmoid_gate(w, blocks[b], blocks[b + 2])
            place = w.add(w.mul(first, 2), b * k.LANES * 4)
            w.store(value, w.at(self.s["inner"], w.mul(row, stride), place), VF)

    def rotate(self) -> None:
        """Rotate queries in place, rotate keys into the cache, copy values into it."""
        w, shape = self.w, self.shape

        def unit(row: str) -> None:
            source = w.at(self.s["qkv"], w.mul(row, 4 * shape.projected))
            angle = w.mul(row, 4 * shape.head_dim)
            cosine, sine = w.at(self.p["cosine"], angle), w.at(self.p["sine"], angle)
            width = 2 if shape.half_cache else 4
            slot = w.mul(w.add(self.start, row), shape.cached * width)
            for head in range(shape.heads + shape.kv_heads):
                at = w.at(source, head * shape.head_dim * 4)
                key = w.at(self.p["keys"], slot, (head - shape.heads) * shape.head_dim * width)
                turned: list[tuple[int, str]] = []
                k.rotate(w, at, cosine, sine, shape.head_dim, lambda e, v: turned.append((e, v)))
                for e, vector in turned:
                    if head < shape.heads:
                        w.store(vector, w.at(at, e * 4), VF)
                    else:
                        k.store_cached(w, vector, w.at(key, e * width), shape.half_cache)
            values = w.at(source, (shape.attended + shape.cached) * 4)
            for e in range(0, shape.cached, k.LANES):
                vector = w.load(w.at(values, e * 4), VF)
                k.store_cached(w, vector, w.at(self.p["values"], slot, e * width), shape.half_cache)

        self.phases.run(self.rows, unit)

    def attend(self) -> None:
        """Attend, one row and one head at a time, to the positions that the row may see."""
        w, shape = self.w, self.shape
        width = 2 if shape.half_cache else 4
        scores = w.at(self.p["scratch"], w.mul(self.number, _score_bytes(shape)))

        def unit(index: str) -> None:
            row, head = w.integers("remui", index, self.rows), w.integers("divui", index, self.rows)
            group = w.integers("divui", head, shape.heads // shape.kv_heads)
            offset = w.mul(group, shape.head_dim * width)
            keys, values = (
                k.Cache(w.at(self.p[name], offset), shape.cached * width, shape.half_cache) for name in ("keys", "values")
            )
            at = w.mul(head, shape.head_dim * 4)
            query = w.at(self.s["qkv"], w.mul(row, 4 * shape.projected), at)
            out = w.at(self.s["attended"], w.mul(row, up_to(4 * shape.attended, LINE)), at)
            visible = w.add(self.start, row, 1)
            k.attend(w, query, keys, values, visible, shape.head_dim, shape.scale, scores, out)

        self.phases.run(w.mul(self.rows, shape.heads), unit)


def layer(name: str, shape: DecoderShape) -> str:
    """Return the executable and `util.func @name` that dispatches it.

    The function takes `x [T,hidden]`, `cosine` and `sine [T,head_dim]`, `start i64[1]`, the layer's weights, zeroed counters,
    `keys` and `values`; it returns the new hidden states and the cache, which are the caller's buffers.
    """
    row = scratch(shape)
    cache = f"tensor<{shape.context}x{shape.kv_heads}x{shape.head_dim}x{'f16' if shape.half_cache else 'f32'}>"
    wide, angle = f"tensor<?x{shape.hidden}xf32>", f"tensor<?x{shape.head_dim}xf32>"
    weights, counters = f"tensor<{buffer_bytes(shape)}xi8>", f"tensor<{counter_bytes(PHASES, shape.workers)}xi8>"
    room = "tensor<?xi8>"
    kinds = f"{wide}{{%rows}}, {angle}{{%rows}}, {angle}{{%rows}}, tensor<1xi64>, {weights}, {counters}, {cache}, {cache}, index"
    results = f"%counters, %keys, %values, {wide}{{%rows}}, {room}{{%room}}"
    return f"""{executable(name, ARGUMENTS, LayerWriter(shape).text(), shape.workers)}
util.func private @{name}(%x: {wide}, %cosine: {angle}, %sine: {angle}, %start: tensor<1xi64>, %weights: {weights},
    %keys: {cache}, %values: {cache}) -> ({wide}, {cache}, {cache}) {{
%zero = arith.constant 0 : index
%rows = tensor.dim %x, %zero : {wide}
%each = arith.constant {row.total(1) - row.scores} : index
%fixed = arith.constant {row.scores} : index
%grown = arith.muli %rows, %each : index
%room = arith.addi %grown, %fixed : index
%none = arith.constant 0 : i8
%counters = flow.tensor.splat %none : {counters}
%r:5 = flow.dispatch @{name}_ex::@{name}(%x, %cosine, %sine, %start, %weights, %counters, %keys, %values, %rows)
    : ({kinds}) -> ({results})
util.return %r#3, %r#1, %r#2 : {wide}, {cache}, {cache}
}}"""


