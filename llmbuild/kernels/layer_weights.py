"""Where the weights of the layers of one dispatch lie: one after the other, alike or each in formats of its own.

Layers that are alike lie a fixed number of bytes apart. Where formats differ, a table on the stack has the offset of
each part of each layer, and which of a matrix's layouts it has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

from llmbuild.kernels.layouts import Layout
from llmbuild.kernels.phases import Ahead
from llmbuild.kernels.shapes import DecoderShape, buffer_bytes, panels_of, sections
from llmbuild.kernels.text import I64, PTR, Writer

ITEM = 8
"""Bytes of an item of the table."""


def offsets(shapes: Sequence[DecoderShape]) -> list[int]:
    """Return where each layer's weights begin, and behind the last one where they end, in bytes."""
    return [0, *accumulate(map(buffer_bytes, shapes))]


class LayerWeights:
    """Writes where the weights of the layer at work lie; `at` names that layer."""

    def __init__(self, w: Writer, weights: str, shapes: Sequence[DecoderShape]) -> None:
        """Take the pointer to the first layer's weights, and the layers' shapes: one another but for their formats."""
        self._w, self._weights, self._shapes = w, weights, tuple(shapes)
        self._alike = len({*shapes}) == 1
        self._layouts = {
            name: list(dict.fromkeys(shape.layouts()[name] for shape in shapes)) for name in shapes[0].layouts()
        }
        self._columns = {name: n for n, name in enumerate(self._items(0))}
        self._table = self._layer = ""

    def prepare(self) -> None:
        """Write what comes before the first layer."""
        if self._alike:
            return
        w, count = self._w, len(self._shapes)
        self._table = w.let(f"llvm.alloca {w.integer((count + 1) * len(self._columns))} x {I64} : ({I64}) -> {PTR}")
        for layer in range(count + 1):
            for name, item in self._items(min(layer, count - 1)).items():
                w.store(
                    w.integer(item),
                    w.at(self._table, ITEM * (layer * len(self._columns) + self._columns[name])),
                    I64,
                    ITEM,
                )

    def _items(self, layer: int) -> dict[str, int]:
        """Return a layer's row of the table by the names of its columns."""
        shape, begin = self._shapes[layer], offsets(self._shapes)[layer]
        items = {name: begin + part.offset for name, part in sections(shape).items()}
        for name, layout in shape.layouts().items():
            items[f"{name}.layout"] = self._layouts[name].index(layout)
            items[f"{name}.panel"] = layout.panel_bytes
        return items

    def at(self, layer: str) -> None:
        """Go to a layer, i64."""
        self._layer = layer

    def parts(self) -> dict[str, str]:
        """Return the pointers of the layer's parts, by their names in `sections`."""
        w, names = self._w, sections(self._shapes[0])
        if self._alike:
            buffer = w.at(self._weights, w.mul(self._layer, buffer_bytes(self._shapes[0])))
            return {name: w.at(buffer, part.offset) for name, part in names.items()}
        return {name: w.at(self._weights, self._item(name)) for name in names}

    def _item(self, name: str, further: int = 0) -> str:
        w, row = self._w, ITEM * len(self._columns)
        return w.load(w.at(self._table, w.mul(w.add(self._layer, further), row), ITEM * self._columns[name]), I64, ITEM)

    def ahead(self, name: str, data: str, further: int = 0) -> Ahead:
        """Return the data of a matrix, of this layer or of the one that comes `further` layers later.

        `data` points to this layer's.
        """
        w, shape = self._w, self._shapes[0]
        if self._alike:
            pointer = w.at(data, further * buffer_bytes(shape))
            return Ahead(pointer, panels_of(shape, name), shape.layouts()[name].panel_bytes)
        pointer = w.at(self._weights, self._item(f"{name}.data", further))
        return Ahead(pointer, panels_of(shape, name), self._item(f"{name}.panel", further))

    def each(self, name: str, body: Callable[[Layout], None]) -> None:
        """Write what is done with a matrix for each layout that it has in one of the layers; the layer's own is run."""
        found = self._layouts[name]
        if len(found) == 1:
            body(found[0])
            return
        own = self._item(f"{name}.layout")
        for number, layout in enumerate(found):
            with self._w.when(self._w.let(f"arith.cmpi eq, {own}, {self._w.integer(number)} : {I64}")):
                body(layout)
