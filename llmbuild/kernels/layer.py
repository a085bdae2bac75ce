"""Decoder layers as one dispatch: ten phases each over T rows, from hidden states to hidden states, cache written
in place.

Fewer and longer dispatches keep the workers awake: between two of them a worker may sleep, and its partner then
works alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import gcd

from llmbuild.kernels import attention, cache, products
from llmbuild.kernels import elementwise as k
from llmbuild.kernels.instructions import Instructions
from llmbuild.kernels.kept import Kept
from llmbuild.kernels.layer_weights import LayerWeights, offsets
from llmbuild.kernels.layouts import LINE, Layout, up_to
from llmbuild.kernels.phases import Ahead, Phases, counter_bytes
from llmbuild.kernels.scratch import MAX_PARTS, score_bytes, scratch, spread_bytes
from llmbuild.kernels.shapes import HEAD_NORMS, DecoderShape, panels_of
from llmbuild.kernels.text import I64, PTR, VF, Writer

PHASES = 10
MAX_BINDINGS = 32
"""What IREE's HAL module takes for one dispatch (3.13): `OUT_OF_RANGE; binding count 36 > 32`."""
BINDING = "memref<?xi8, strided<[1], offset: ?>>"
"""Bytes at an offset that the compiler chooses when it merges bindings; with a plain memref the offset would be
dropped.
"""


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


def executable(name: str, arguments: list[str], w: Writer, workers: int, more: Sequence[str] = ()) -> str:
    """Return a `stream.executable` with one entry point, whose body `w` has. It takes bindings, then the row count as
    an index, and then what `more` names, each an index.
    """
    bindings = ", ".join(f"%{argument}: !stream.binding" for argument in arguments)
    numbers = ", ".join(f"%{number}: index" for number in ("rows", *more))
    pipeline = "#iree_codegen.translation_info<pipeline = #iree_codegen.no_pipeline>"
    functions = "\n".join(w.functions)
    return f"""stream.executable private @{name}_ex {{
stream.executable.export public @{name} workgroups() -> (index, index, index) {{
%x = arith.constant {workers} : index
%y = arith.constant 1 : index
stream.return %x, %y, %y : index, index, index
}}
builtin.module {{
func.func @{name}({bindings}, {numbers}) attributes {{translation_info = {pipeline}}} {{
{w.text()}
return
}}
{functions}
}} }}"""


def worker(w: Writer) -> str:
    """Return the work-group's number as i64."""
    return w.cast("arith.index_cast", w.let("stream.dispatch.workgroup.id[0] : index"), "index", I64)


BEFORE = ["x", "cosine", "sine", "where", "weights", "counters"]
AFTER = ["out", "scratch"]
MAX_LAYERS = (MAX_BINDINGS - len(BEFORE) - len(AFTER)) // 2


def paged(name: str) -> str:
    """Return the name of the function that runs the layers of a kernel on a cache that sequences share."""
    return f"{name}_paged"


def cache_names(layers: int) -> list[str]:
    """Return the names of the cache buffers, keys before values, layer by layer."""
    return [f"{part}{layer}" for layer in range(layers) for part in ("keys", "values")]


class LayerWriter:
    """Writes the body of the dispatch; each method is one phase of a layer."""

    def __init__(self, name: str, shapes: Sequence[DecoderShape], unit: Instructions) -> None:
        """Take the layers' shapes: one another but for the formats of their matrices."""
        self.shapes, self.layers = shapes, len(shapes)
        self.shape = shape = shapes[0]
        self.unit = unit
        self.w = w = Writer(name)
        self.rows = w.cast("arith.index_cast", "%rows", "index", I64)
        self.p = bind(w, BEFORE + cache_names(self.layers) + AFTER, self._sizes())
        self.weights = LayerWeights(w, self.p["weights"], shapes)
        self.number = worker(w)
        self.shift = w.cast("arith.index_cast", "%shift", "index", I64)
        self.some = w.cast("arith.extui", w.below(self.shift, attention.UNPAGED), "i1", I64)
        self.s, offset = {}, w.integer(scratch(shapes).fixed)
        for region, size in scratch(shapes).per_row.items():
            self.s[region] = w.at(self.p["scratch"], offset)
            offset = w.add(offset, w.mul(self.rows, size))
        self.parts: dict[str, str] = {}
        self.keys = self.values = ""
        self.alone = w.let(f"arith.cmpi eq, {self.rows}, {w.integer(1)} : {I64}")
        self.phases = Phases(w, self.p["counters"], self.number, shape.workers, unit.pause)
        self.ahead: Ahead | None = None

    def _sizes(self) -> dict[str, int | str]:
        w, shape, rows = self.w, self.shape, self.rows
        places = [shape.kv_heads * kept.bytes for kept in shape.kept]  # of one; how many there are is the caller's
        row = w.mul(rows, 4 * shape.width)
        angle = w.mul(rows, 4 * shape.head_dim)
        size = scratch(self.shapes)
        sizes: dict[str, int | str] = {
            "x": row, "out": row, "cosine": angle, "sine": angle, "where": w.mul(rows, 8),
            "weights": offsets(self.shapes)[-1], "counters": counters_bytes(shape, self.layers),
            "scratch": w.add(size.fixed, w.mul(rows, size.total(1) - size.fixed)),
        }  # fmt: skip
        return sizes | dict(zip(cache_names(self.layers), places * self.layers, strict=True))

    def write(self) -> Writer:
        """Write all phases of all layers."""
        w, width = self.w, 4 * self.shape.width
        table = w.let(f"llvm.alloca {w.integer(2 * self.layers)} x {PTR} : ({I64}) -> {PTR}")
        for i, name in enumerate(cache_names(self.layers)):
            w.store(self.p[name], w.at(table, 8 * i), PTR, 8)
        self.weights.prepare()
        self.phases.run(self.rows, lambda row: self._copy(w.mul(row, width)))
        first = w.at(self.p["counters"], counter_bytes(1, self.shape.workers))

        def body(layer: str) -> list[str]:
            counters = w.at(first, w.mul(layer, counter_bytes(PHASES, self.shape.workers)))
            self.phases = Phases(w, counters, self.number, self.shape.workers, self.unit.pause)
            self.weights.at(layer)
            self.parts = self.weights.parts()
            self.keys, self.values = (w.load(w.at(table, w.mul(layer, 16), 8 * i), PTR, 8) for i in range(2))
            self._layer()
            return []

        w.loop(0, self.layers, 1, body)
        return w

    def _copy(self, offset: str) -> None:
        w = self.w

        def body(i: str) -> list[str]:
            place = w.add(offset, w.mul(i, 4))
            w.store(w.load(w.at(self.p["x"], place), VF), w.at(self.p["out"], place), VF)
            return []

        w.loop(0, self.shape.width, k.LANES, body)

    def _layer(self) -> None:
        """Write one layer, from `out` through `middle` back to `out`."""
        shape, s, out = self.shape, self.s, self.p["out"]
        hidden = 4 * shape.width
        self.ahead = self._first_of("qkv")
        self.normalize("norm1", out, hidden, "qkv")
        self.ahead = self._first_of("out")
        self.multiply("qkv", self.plain(s["qkv"], 4 * shape.projected))
        self.rotate()
        self.attend()
        self.prepare(s["attended"], self._attended, "out", self._join_parts)
        self.ahead = self._first_of("gate_up")
        self.multiply("out", self.residual(out, hidden, s["middle"], self._middle))
        self.normalize("norm2", s["middle"], self._middle, "gate_up")
        self.ahead = self._first_of("down")
        self.multiply("gate_up", self.gated)
        self.prepare(s["inner"], 4 * shape.inner_padded, "down")
        self.ahead = self._first_of("qkv", 1)
        last = self.residual(s["middle"], self._middle, out, hidden)
        self.multiply("down", last)

    def _first_of(self, name: str, further: int = 0) -> Ahead:
        """Return the data of a matrix of this layer, or of one that comes so many layers `further`."""
        return self.weights.ahead(name, self.parts[f"{name}.data"], further)

    def _run(self, units: int | str, unit: Callable[[str], None]) -> None:
        self.phases.run(units, unit, self.ahead)

    @property
    def _middle(self) -> int:
        return up_to(4 * self.shape.width, LINE)

    def prepared(self, layout: Layout, row: str) -> str:
        """Return the pointer of a row that is ready for a product."""
        return self.w.at(self.s["prepared"], self.w.mul(row, layout.prepared_bytes))

    def _put(self, name: str, source: k.Reader, row: str) -> None:
        """Prepare a row for a matrix."""
        self.weights.each(name, lambda by: products.prepare(self.w, by, source, self.prepared(by, row)))

    def normalize(self, norm: str, source: str, stride: int, name: str) -> None:
        """Normalize rows and prepare them for a matrix."""
        w, shape = self.w, self.shape

        def unit(row: str) -> None:
            x = k.vectors(w, w.at(source, w.mul(row, stride)))
            factor = w.splat(k.inverse_norm(w, x, shape.hidden, shape.epsilon, shape.width))
            weight = k.vectors(w, self.parts[norm])

            def normal(i: str) -> str:
                return w.op("arith.mulf", w.op("arith.mulf", x(i), factor), weight(i))

            self._put(name, normal, row)

        self._run(self.rows, unit)

    def prepare(self, source: str, stride: int, name: str, before: Callable[[], None] = lambda: None) -> None:
        """Prepare rows for a matrix, after what `before` writes for each row."""
        w = self.w

        def unit(row: str) -> None:
            before()
            self._put(name, k.vectors(w, w.at(source, w.mul(row, stride))), row)

        self._run(self.rows, unit)

    def multiply(self, name: str, finish: products.Epilogue) -> None:
        """Multiply the prepared rows by a matrix, panel by panel."""
        w, parts, x = self.w, self.parts, self.s["prepared"]
        room = w.at(self.p["scratch"], scratch(self.shapes).spread, w.mul(self.number, spread_bytes(self.shapes)))

        def unit(panel: str) -> None:
            def by(layout: Layout) -> None:
                panels = products.Panels(layout, parts[f"{name}.data"], parts[f"{name}.scale"], parts[f"{name}.bias"])
                products.multiply_panel(w, self.unit, panels, panel, x, self.rows, finish, room)

            self.weights.each(name, by)

        self._run(panels_of(self.shape, name), unit)

    def plain(self, target: str, stride: int) -> products.Epilogue:
        """Store a panel's outputs as they are; rows are whole panels wide."""
        w = self.w

        def finish(row: str, first: str, blocks: list[str]) -> None:
            for b, block in enumerate(blocks):
                w.store(block, w.at(target, w.mul(row, stride), w.mul(w.add(first, b * k.LANES), 4)), VF)

        return finish

    def residual(self, source: str, source_stride: int, target: str, target_stride: int) -> products.Epilogue:
        """Add the residual; outputs past the width are left out."""
        w, size = self.w, self.shape.width

        def finish(row: str, first: str, blocks: list[str]) -> None:
            for b, block in enumerate(blocks):
                column = w.add(first, b * k.LANES)
                with w.when(w.below(column, size)):
                    old = w.load(w.at(source, w.mul(row, source_stride), w.mul(column, 4)), VF)
                    new = w.op("arith.addf", old, block)
                    w.store(new, w.at(target, w.mul(row, target_stride), w.mul(column, 4)), VF)

        return finish

    def gated(self, row: str, first: str, blocks: list[str]) -> None:
        """Store `activation(gate) * up`: a panel holds 32 gate rows and their 32 up rows."""
        w, stride, activation = self.w, 4 * self.shape.inner_padded, k.ACTIVATIONS[self.shape.activation]
        for b in range(2):
            value = w.op("arith.mulf", activation(w, blocks[b]), blocks[b + 2])
            place = w.add(w.mul(first, 2), b * k.LANES * 4)
            w.store(value, w.at(self.s["inner"], w.mul(row, stride), place), VF)

    def rotate(self) -> None:
        """Rotate queries in place, rotate keys into the cache, copy values into it; zeros go behind what is attended
        to.
        """
        w, shape = self.w, self.shape

        def unit(row: str) -> None:
            source = w.at(self.s["qkv"], w.mul(row, 4 * shape.projected))
            angle = w.mul(row, 4 * shape.head_dim)
            cosine, sine = w.at(self.p["cosine"], angle), w.at(self.p["sine"], angle)
            (of_keys, of_values), size, kind = shape.kept, shape.head_dim, k.head_vector(shape.head_dim)
            place = self._pages(row).place(w, self._position(row))

            def query(head: str) -> list[str]:
                at = w.at(source, w.mul(head, size * 4))
                self._normal_head(at, HEAD_NORMS[0])
                parts = k.rotated(w, at, cosine, sine, size)
                if of_keys.is_integer:
                    parts = k.times(w, k.turned(w, parts, kind, of_keys.turned), kind, 1 / of_keys.turned)
                for e, vector in parts:
                    w.store(vector, w.at(at, e * 4), kind)
                return []

            def key(head: str) -> list[str]:
                at = w.at(source, w.mul(w.add(head, shape.heads), size * 4))
                self._normal_head(at, HEAD_NORMS[1])
                put(of_keys, k.rotated(w, at, cosine, sine, size), self.keys, head)
                return []

            def value(head: str) -> list[str]:
                at = w.at(source, w.mul(w.add(head, shape.heads + shape.kv_heads), size * 4))
                parts = [(e, w.load(w.at(at, e * 4), kind)) for e in range(0, size, gcd(size // 2, k.LANES))]
                put(of_values, parts, self.values, head)
                return []

            def put(kept: Kept, parts: Sequence[cache.Part], base: str, head: str) -> None:
                slot = w.mul(w.add(w.mul(place, shape.kv_heads), head), kept.bytes)
                cache.store(w, kept, parts, kind, w.at(base, slot))

            w.loop(0, shape.heads, 1, query)
            w.loop(0, shape.kv_heads, 1, key)
            w.loop(0, shape.kv_heads, 1, value)
            self._clear_attended(row)

        self._run(self.rows, unit)

    def _normal_head(self, pointer: str, norm: str) -> None:
        """Normalize a query or a key in place, in a model that does."""
        if self.shape.head_norms:
            k.normal_head(self.w, pointer, self.parts[norm], self.shape.head_dim, self.shape.epsilon)

    def _clear_attended(self, row: str) -> None:
        """Write zeros over the vectors of a row of attention in which columns without a head are."""
        w, shape = self.w, self.shape
        of_row = w.at(self.s["attended"], w.mul(row, self._attended)) if shape.attended < shape.attended_padded else ""
        for e in range(shape.attended // k.LANES * k.LANES, shape.attended_padded, k.LANES):
            w.store(w.lanes(0.0), w.at(of_row, e * 4), VF)

    def _position(self, row: str) -> str:
        """Return the position of a row in its sequence."""
        return self.w.load(self.w.at(self.p["where"], self.w.mul(row, 8)), I64, 8)

    def _pages(self, row: str) -> attention.Pages:
        """Return where the positions of a row's sequence are."""
        w = self.w
        named = w.mul(w.add(self.rows, row), self.some)
        first = w.mul(w.load(w.at(self.p["where"], w.mul(named, 8)), I64, 8), self.some)
        return attention.Pages(w.at(self.p["where"], w.mul(first, 8)), self.shift, self.some)

    def attend(self) -> None:
        """Attend to the positions that a row may see, a row and a head at a time: a single row in parts, which are then
        joined; of several rows all parts one after the other. What comes out is the same.
        """
        w, shape = self.w, self.shape
        per_group = shape.heads // shape.kv_heads
        cuts = self._parts_of(self._position(w.integer(0)))[0]
        cuts = w.let(f"arith.select {self.alone}, {cuts}, {w.integer(1)} : {I64}")

        def unit(index: str) -> None:
            member, of_row = w.integers("remui", index, per_group), w.integers("divui", index, per_group)
            row, of_cut = w.integers("remui", of_row, self.rows), w.integers("divui", of_row, self.rows)
            cut, group = w.integers("remui", of_cut, cuts), w.integers("divui", of_cut, cuts)
            self._attend_to(row, group, w.add(w.mul(group, per_group), member), cut)

        self._run(w.mul(self.rows, shape.heads, cuts), unit)

    def _attend_to(self, row: str, group: str, head: str, cut: str) -> None:
        """Attend with a row's head to one part of the positions, for a single row, or else to all of them."""
        w, shape = self.w, self.shape
        scores = w.at(self.p["scratch"], w.mul(self.number, score_bytes(shape)))
        position, pages = self._position(row), self._pages(row)
        count, length = self._parts_of(position)
        at = w.mul(head, shape.head_dim * 4)
        query = w.at(self.s["qkv"], w.mul(row, 4 * shape.projected), at)
        keys, values = (
            cache.Cache(w.at(base, w.mul(group, kept.bytes)), shape.kv_heads * kept.bytes, kept)
            for base, kept in zip((self.keys, self.values), shape.kept, strict=True)
        )
        whole, several = w.at(self.s["attended"], w.mul(row, self._attended), at), w.below(1, count)
        room = w.let(f"arith.select {self.alone}, {head}, {self.number} : {I64}")

        def part(number: str) -> list[str]:
            first, slot = w.mul(number, length), self._part(room, number)
            visible = w.integers("minsi", w.integers("subi", w.add(position, 1), first), length)
            out = w.either(several, slot, whole)
            outcome = w.either(several, w.at(slot, up_to(4 * shape.head_dim, LINE)), scores)
            attention.attend(
                w,
                self.unit,
                query,
                keys,
                values,
                pages,
                first,
                visible,
                shape.head_dim,
                shape.scale,
                scores,
                out,
                outcome,
            )
            return []

        begin = w.let(f"arith.select {self.alone}, {cut}, {w.integer(0)} : {I64}")
        end = w.let(f"arith.select {self.alone}, {w.add(cut, 1)}, {count} : {I64}")
        w.loop(begin, end, 1, part)
        with w.when(w.op("arith.andi", several, w.below(1, self.rows), kind="i1")):
            self._join(room, count, whole)

    def _parts_of(self, position: str) -> tuple[str, str]:
        """Return into how many parts the positions up to a row's own are cut, and how many are in each: whatever the
        other rows are, so that a row's sums are always the same.
        """
        w = self.w
        seen = w.add(position, 1)
        wanted = w.integers("minsi", w.rounded_up(seen, self.shape.part), MAX_PARTS)
        length = w.mul(w.rounded_up(w.rounded_up(seen, wanted), k.LANES), k.LANES)
        return w.rounded_up(seen, length), length

    def _part(self, room: int | str, part: int | str) -> str:
        """Return where the result for a part of the positions goes, in the room of a head or of a work-group."""
        w, stride = self.w, attention.Parts.stride(self.shape.head_dim)
        number = w.add(w.mul(room, MAX_PARTS), part)
        return w.at(self.p["scratch"], scratch(self.shapes).parts, w.mul(number, stride))

    def _join(self, room: int | str, count: str, out: str) -> None:
        """Make one result of as many parts as `count`."""
        found = attention.Parts(self._part(room, 0), count, self.shape.head_dim)
        found.join(self.w, attention.lanes_of(self.unit, self.shape.head_dim), out)

    def _join_parts(self) -> None:
        """Make one result of each head's parts, for a single row."""
        w, shape = self.w, self.shape
        count, _ = self._parts_of(self._position(w.integer(0)))
        split = w.op("arith.andi", self.alone, w.below(1, count), kind="i1")
        with w.when(split):
            w.loop(0, shape.heads, 1, lambda head: self._joined_head(head, count))

    def _joined_head(self, head: str, count: str) -> list[str]:
        self._join(head, count, self.w.at(self.s["attended"], self.w.mul(head, self.shape.head_dim * 4)))
        return []

    @property
    def _attended(self) -> int:
        return up_to(4 * self.shape.attended_padded, LINE)


def counters_bytes(shape: DecoderShape, layers: int) -> int:
    """Return the size of the zeroed counters of a dispatch of so many layers."""
    return counter_bytes(1 + layers * PHASES, shape.workers)


def layers(names: Sequence[str], shapes: Sequence[DecoderShape], unit: Instructions) -> str:
    """Return an executable and, for each of the names, two functions that dispatch it, `util.func @name` and
    `@paged(name)`.

    `shapes` are those of the layers, one another but for the formats of their matrices.

    They take `x [T,width]`, `cosine` and `sine [T,head_dim]`, `where i64[W]`, the layers' weights one after the other,
    and keys and values of each layer, which they write in place; they return the new hidden states. Rows attend to
    positions up to their own, all rows of a call and what was there before. `where` begins with the position of each
    row. For `@name` the cache is that of one sequence, `[context, kv_heads, Kept.elements]`. For the other it is one of
    many sequences, `[places, kv_heads, Kept.elements]`: for each row `where` then says at which of its own items the
    row's pages begin, the numbers of the blocks of the cache in which its sequence's positions are, `page` of them in
    each.
    """
    own, shape = names[0], shapes[0]
    body = LayerWriter(own, shapes, unit).write()
    made = executable(own, BEFORE + cache_names(len(shapes)) + AFTER, body, shape.workers, ("shift",))
    for name in names:
        made += "\n" + _dispatch(name, own, shapes, str(shape.context), attention.UNPAGED)
        made += "\n" + _dispatch(paged(name), own, shapes, "?", shape.page.bit_length() - 1)
    return made


def _dispatch(function: str, name: str, shapes: Sequence[DecoderShape], places: str, shift: int) -> str:
    """Return a function that dispatches the executable of some layers on caches of so many places."""
    shape, count = shapes[0], len(shapes)
    row, names = scratch(shapes), cache_names(count)
    held = [f"tensor<{places}x{shape.kv_heads}x{kept.elements}x{kept.element}>" for kept in shape.kept] * count
    behind = "{%places}" if places == "?" else ""
    wide, angle = f"tensor<?x{shape.width}xf32>", f"tensor<?x{shape.head_dim}xf32>"
    weights, counters = f"tensor<{offsets(shapes)[-1]}xi8>", f"tensor<{counters_bytes(shape, count)}xi8>"
    taken, caches = (
        ", ".join(f"%{n}: {kind}" for n, kind in zip(names, held, strict=True)),
        ", ".join(f"%{n}" for n in names),
    )
    written = ", ".join(f"%{n}{behind}" for n in names)
    kinds = ", ".join(
        [f"{wide}{{%rows}}", f"{angle}{{%rows}}", f"{angle}{{%rows}}", "tensor<?xi64>{%items}", weights, counters]
        + [kind + behind for kind in held]
        + ["index", "index"]
    )
    return f"""util.func private @{function}(%x: {wide}, %cosine: {angle}, %sine: {angle}, %where: tensor<?xi64>,
    %weights: {weights}, {taken}) -> {wide} {{
%zero = arith.constant 0 : index
%rows = tensor.dim %x, %zero : {wide}
%items = tensor.dim %where, %zero : tensor<?xi64>
%places = tensor.dim %{names[0]}, %zero : {held[0]}
%shift = arith.constant {shift} : index
%each = arith.constant {row.total(1) - row.fixed} : index
%fixed = arith.constant {row.fixed} : index
%grown = arith.muli %rows, %each : index
%room = arith.addi %grown, %fixed : index
%none = arith.constant 0 : i8
%counters = flow.tensor.splat %none : {counters}
%r:{len(names) + 3} = flow.dispatch @{name}_ex::@{name}(
    %x, %cosine, %sine, %where, %weights, %counters, {caches}, %rows, %shift)
    : ({kinds}) -> (%counters, {written}, {wide}{{%rows}}, tensor<?xi8>{{%room}})
util.return %r#{len(names) + 1} : {wide}
}}"""
