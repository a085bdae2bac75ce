"""Which format each layer's weights are stored in, and the weights in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from llmbuild.frontend.modules import Weights
from llmbuild.spec.formats import INTEGERS, SHARED
from llmbuild.transform.quantized import Quantized, quantize
from llmbuild.transform.shared_exponent import nearest

FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
TABLES = ("model.embed_tokens", "lm_head")
"""Layers whose rows are tokens: their format is chosen apart, and tied ones are one table."""


@dataclass(frozen=True)
class Formats:
    """The stored weights of a model by the name of their layer: call it with a name and the weights f32[N,K].

    `head` is the format of the token tables, `layers` that of all else, `kept` those of layers that differ from it.
    What `ready` has was quantized before; everything else is rounded to the nearest. Rows of the token table are
    multiplied by `looked_up` f32[K] when they are looked up, if there is one: a head that was scaled lends its table.
    """

    layers: str
    head: str
    kept: Mapping[str, str] = field(default_factory=dict)
    ready: Mapping[str, Quantized] = field(default_factory=dict)
    looked_up: torch.Tensor | None = None

    def of(self, name: str) -> str:
        """Return the format of a layer."""
        return self.head if name in TABLES else self.kept.get(name, self.layers)

    def __call__(self, name: str, dense: np.ndarray) -> Weights:
        """Return what is stored of a layer's weights; numbers of 12 bits are bf16 here, which has all of them."""
        form = self.of(name)
        if form == SHARED:
            return torch.from_numpy(nearest(dense)).to(torch.bfloat16)
        if form in FLOATS:
            return torch.from_numpy(dense).to(FLOATS[form])
        return self.quantized(name, dense)

    def quantized(self, name: str, dense: np.ndarray) -> Quantized:
        """Return the integers of a layer whose format is one of integers."""
        return self.ready[name] if name in self.ready else quantize(dense, INTEGERS[self.of(name)])
