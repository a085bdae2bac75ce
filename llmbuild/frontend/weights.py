"""The weights of a model as a program stores them: rows in their formats, made from what is on the disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from llmbuild.frontend.checkpoint import Floats, Model
from llmbuild.frontend.formats import Formats
from llmbuild.kernels.layouts import Layout
from llmbuild.spec.formats import INTEGERS
from llmbuild.transform.panels import encode, encode_for
from llmbuild.transform.quantized import Quantized, pad_columns, rows_of
from llmbuild.transform.stored import Encoded
from llmbuild.transform.weights import pad_width


@dataclass(frozen=True)
class Patch:
    """What calibration made of some weights: tensors that it changed, and quantized layers, by name."""

    dense: Mapping[str, Floats] = field(default_factory=dict)
    ready: Mapping[str, Quantized] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """The weights of a model in the formats of its layers, with a patch in place of what is stored."""

    model: Model
    formats: Formats
    patch: Patch = field(default_factory=Patch)

    def rows(self, name: str, start: int, stop: int) -> Floats:
        """Return rows f32 of a tensor."""
        changed = self.patch.dense.get(name)
        return self.model.rows(name, start, stop) if changed is None else changed[start:stop]

    def whole(self, name: str) -> Floats:
        """Return a tensor f32."""
        return self.rows(name, 0, self.model.shape(name)[0])

    def padded(self, layer: str, width: int, start: int, stop: int) -> Encoded:
        """Return rows of a layer's matrix as the compiler's layouts have them, with zeros behind their columns."""
        ready = self.patch.ready.get(layer)
        if ready is not None and ready.codes.shape[1] == width:
            return rows_of(ready, start, stop)
        if (kept := self._blocks(layer, self.formats.of(layer), start, stop)) is not None:
            return pad_columns(kept, width)
        return encode(self.formats.of(layer), pad_width(self.rows(f"{layer}.weight", start, stop), width))

    def encoded_for(self, layout: Layout, layer: str, start: int, stop: int) -> Encoded:
        """Return rows of a layer's matrix as a layout of our kernels has them."""
        ready = self.patch.ready.get(layer)
        part = self._blocks(layer, layout.form, start, stop) if ready is None else rows_of(ready, start, stop)
        if part is not None and part.halves:
            return pad_columns(part, layout.columns)
        return encode_for(layout, self.rows(f"{layer}.weight", start, stop), part)

    def _blocks(self, layer: str, form: str, start: int, stop: int) -> Quantized | None:
        """Return rows as a file keeps them, if it keeps them in the blocks of this format."""
        name = f"{layer}.weight"
        if name in self.patch.dense or self.model.blocks(name) != form:
            return None
        found = self.model.quantized(name, start, stop)
        minimum = None if found.minimum is None else found.minimum.astype(np.float32)
        scale = found.scale.astype(np.float32)
        return Quantized(found.codes, scale, None, INTEGERS[form].bits, INTEGERS[form].group, minimum, "f16")
