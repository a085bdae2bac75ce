"""How each tensor of a program is made: the plan of its archive, by what the modules in the model say of themselves."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from llmbuild.frontend.formats import TABLES
from llmbuild.frontend.modules import Linear, Matrix, ScaledColumns
from llmbuild.frontend.own import NAMES, NORM_NAMES, OwnHead, OwnLayers, PanelEmbedding
from llmbuild.frontend.weights import Source
from llmbuild.kernels.layer_weights import offsets
from llmbuild.kernels.layouts import PANEL
from llmbuild.transform.archive import Layout
from llmbuild.transform.decoder import layer_units, packer
from llmbuild.transform.stored import Encoded, Keep, Place, Rows, matrix_unit, plain, regions, tasks
from llmbuild.transform.stream import Unit, whole
from llmbuild.transform.weights import pad_width

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
LOOKED_UP = "looked_up"
"""The name in a patch of the factor f32[hidden] by which rows of a tied table are multiplied."""

Make = Callable[[Source, Keep | None], list[Unit]]


@dataclass(frozen=True)
class Plan:
    """The layout of an archive, and what makes its tensors: those of each layer, of the token tables, and the rest."""

    layout: Layout
    layers: tuple[tuple[Make, ...], ...]
    tables: tuple[Make, ...]
    rest: tuple[Make, ...]

    def units(self, makes: Iterable[Make], source: Source, keep: Keep | None = None) -> list[Unit]:
        """Return the units of some tensors."""
        return [unit for make in makes for unit in make(source, keep)]


def plan(model: Any, sizes: Mapping[str, int], constants: Mapping[str, np.ndarray]) -> Plan:
    """Return the plan of the tensors that a program names, with their sizes in bytes.

    `constants` are tensors of the library that are computed, not read. Tensors that a program does not name are left
    out.
    """
    layers: list[list[Make]] = [[] for _ in range(model.config.num_hidden_layers)]
    tables: list[Make] = []
    rest: list[Make] = []
    for name, module in model.named_modules():
        for number, make in _makes(name, module, constants, sizes):
            (tables if number is None else rest if number < 0 else layers[number]).append(make)
    return Plan(Layout.of(sizes), tuple(map(tuple, layers)), tuple(tables), tuple(rest))


def _makes(
    name: str, module: nn.Module, constants: Mapping[str, np.ndarray], sizes: Mapping[str, int]
) -> Iterable[tuple[int | None, Make]]:
    """Yield what makes a module's own tensors, each with its layer: None for token tables, -1 for the rest."""
    found = _LAYER.match(f"{name}.")
    number = int(found[1]) if found else -1
    if isinstance(module, OwnLayers):
        for index in range(module.count):
            yield module.first + index, partial(_own_layer, f"{name}.buffer", index, module)
    elif isinstance(module, OwnHead):
        yield None, partial(_own_head, name, module)
    elif isinstance(module, Matrix):
        is_table = module.stored.rows.parts[0][0] in TABLES
        yield (None if is_table else number), partial(_matrix, name, module)
    elif isinstance(module, ScaledColumns):
        yield -1, partial(_factor, f"{name}.factor", module)
    elif isinstance(module, Linear):
        if module.bias is not None:
            yield number, partial(_bias, f"{name}.bias", module.matrix.stored.rows)
    else:
        for own in (*dict(module.named_parameters(recurse=False)), *dict(module.named_buffers(recurse=False))):
            full = f"{name}.{own}"
            if full in sizes:
                yield number, partial(_plain, full, constants)


def _plain(name: str, constants: Mapping[str, np.ndarray], source: Source, _: Keep | None) -> list[Unit]:
    found = constants[name] if name in constants else source.whole(name)
    return [whole(name, {name: found.astype(np.float32, copy=False)})]


def _bias(name: str, rows: Rows, source: Source, _: Keep | None) -> list[Unit]:
    return [whole(name, {name: np.concatenate([source.whole(f"{layer}.bias") for layer, _ in rows.parts])})]


def _factor(name: str, module: ScaledColumns, source: Source, _: Keep | None) -> list[Unit]:
    return [whole(name, {name: pad_width(source.patch.dense[LOOKED_UP], module.factor.shape[0])})]


def _matrix(name: str, module: Matrix, source: Source, keep: Keep | None) -> list[Unit]:
    def encode(layer: str, start: int, stop: int) -> Encoded:
        return source.padded(layer, module.columns, start, stop)

    return [matrix_unit(name, module.stored, encode, keep)]


def _own_layer(tensor: str, index: int, module: OwnLayers, source: Source, keep: Keep | None) -> list[Unit]:
    shape = module.shapes[index]
    layouts, begin = shape.layouts(), offsets(module.shapes)[index]
    prefix = f"model.layers.{module.first + index}."
    homes = {"query": "qkv", "key": "qkv", "value": "qkv", "gate": "gate_up", "up": "gate_up"}

    def encode(part: str, start: int, stop: int) -> Encoded:
        return source.encoded_for(layouts[homes.get(part, part)], prefix + NAMES[part], start, stop)

    def kept(part: str, start: int, rows: np.ndarray) -> None:
        assert keep is not None
        keep(prefix + NAMES[part], start, rows)

    norms = {ours: theirs for ours, theirs in NORM_NAMES.items() if shape.head_norms or ours.startswith("norm")}
    vectors = {ours: source.whole(f"{prefix}{theirs}.weight") for ours, theirs in norms.items()}
    for part, theirs in NAMES.items():
        if source.model.has(f"{prefix}{theirs}.bias"):
            vectors[f"{part}.bias"] = source.whole(f"{prefix}{theirs}.bias")
    return layer_units(tensor, begin, shape, vectors, encode, None if keep is None else kept)


def _own_head(name: str, module: OwnHead, source: Source, keep: Keep | None) -> list[Unit]:
    shape, layer = module.shape, TABLES[1]
    layout, panels = shape.layout, shape.padded // PANEL
    places = {
        part: Place(f"{name}.{part}", 0, each, panels * each)
        for part, each in (("data", layout.panel_bytes), ("scale", layout.scale_bytes))
    }
    rows = Rows(((layer, shape.vocabulary),))
    made = tasks(rows, shape.hidden, partial(source.encoded_for, layout), packer(layout), places, keep)
    norm = pad_width(source.whole("model.norm.weight"), shape.width)
    return [Unit(name, regions(places), made), whole(f"{name}.norm", {f"{name}.norm": norm})]


def vectors(model: Any, source: Source) -> Callable[[int], np.ndarray]:
    """Return what looks a token up, f32[1,hidden], as the program with these weights has it."""
    table = model.model.embed_tokens
    factor = source.patch.dense.get(LOOKED_UP)
    if isinstance(table, ScaledColumns):
        table = table.table
    hidden = model.config.hidden_size

    def look(token: int) -> np.ndarray:
        if isinstance(table, PanelEmbedding):
            row = source.encoded_for(table.head.shape.layout, TABLES[1], token, token + 1)
        else:
            layer = table.matrix.stored.rows.parts[0][0]
            row = source.padded(layer, table.matrix.columns, token, token + 1)
        found = plain(row, hidden)
        return found if factor is None else found * factor

    return look
