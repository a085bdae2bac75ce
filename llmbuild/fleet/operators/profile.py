"""What the operators of a model take on a device: seconds and bytes of each kind, by rows and by positions seen.

A decoder layer runs `qkv`, `attention`, `out` and `mlp` in this order; `head` runs once behind the layers. `mlp` is the
feed-forward part: one set of matrices, or experts. Norms, rotary angles, sums and the activation are counted to the
product that they stand before or behind.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from llmbuild.spec.decoder import Decoder
from llmbuild.spec.figures import Machine
from llmbuild.spec.fleet import Basis, Line, weakest

Kind = Literal["qkv", "attention", "out", "mlp", "head"]
DENSE: tuple[Kind, ...] = ("qkv", "out", "mlp", "head")
"""Kinds that read weights. `attention` reads keys and values instead."""
LAYER: tuple[Kind, ...] = ("qkv", "attention", "out", "mlp")
"""Kinds of a layer, in the order in which they run."""
WIDTH = 2.0
"""Bytes of a number: 16 bits, for weights, activations, keys and values."""


@dataclass(frozen=True)
class Shape:
    """A model's sizes, or those of the part that one of `devices` equal devices holds of it."""

    name: str
    decoder: Decoder
    layers: int
    devices: int = 1
    """Devices that each matrix is divided over (tensor parallel)."""
    experts: int = 1
    """Of which each row goes through `chosen`; `mlp` is all of them."""
    chosen: int = 1

    @property
    def kv_bytes(self) -> float:
        """Return the bytes of keys and values of one position, of all layers, on one device."""
        return 2 * self.decoder.cached * self.layers * WIDTH / self.devices

    def weights(self, kind: Kind) -> float:
        """Return the bytes of a kind's weights on one device, of all layers; the embedding counts to the head."""
        return self.parameters(kind) * WIDTH / self.devices

    def parameters(self, kind: Kind) -> float:
        """Return the parameters of a kind, of all layers."""
        d = self.decoder
        each = {
            "qkv": d.hidden * (d.attended + 2 * d.cached),
            "attention": 0,
            "out": d.attended * d.hidden,
            "mlp": 3 * d.hidden * d.inner * self.experts,
        }
        return float(2 * d.vocabulary * d.hidden if kind == "head" else each[kind] * self.layers)

    def operations(self, kind: Kind, rows: float, context: float) -> float:
        """Return the operations of one call on one device: of one layer, or of the head."""
        d = self.decoder
        if kind == "attention":
            return 4 * d.attended * context * rows / self.devices
        if kind == "head":
            return 2 * d.vocabulary * d.hidden * rows / self.devices
        used = self.chosen / self.experts if kind == "mlp" else 1.0
        return 2 * used * self.parameters(kind) / self.layers * rows / self.devices

    def passed(self, to: Kind) -> float:
        """Return the bytes that one row sends to an operator from the one before it."""
        d = self.decoder
        sizes = {"attention": d.attended + 2 * d.cached, "out": d.attended + d.hidden}
        return sizes.get(to, d.hidden) * WIDTH


@dataclass(frozen=True)
class Surface:
    """Seconds of decode attention: lines over positions for numbers of rows, with straight lines between them."""

    rows: tuple[float, ...]
    lines: tuple[Line, ...]

    def __call__(self, rows: float, context: float) -> float:
        """Return the seconds of rows that see so many positions each; beyond the ends the nearest slope goes on."""
        i = min(max(bisect_right(self.rows, rows), 1), len(self.rows) - 1)
        low, high = self.rows[i - 1], self.rows[i]
        at_low, at_high = self.lines[i - 1](context), self.lines[i](context)
        return max(0.0, at_low + (at_high - at_low) * (rows - low) / (high - low))


@dataclass(frozen=True)
class OperatorProfile:
    """Seconds of one call of each kind on one device: of one layer, or of the head."""

    shape: Shape
    machine: Machine
    dense: tuple[tuple[Kind, Line], ...]
    """By rows."""
    decode: Surface
    prompt: Line
    """Attention of one prompt, by its tokens."""
    basis: Basis
    """Of products and attention. What lies between them is always an estimate: `between`."""
    source: str
    between: float = 1.0
    """Factor of the estimated seconds of norms, rotary angles and activations; 0 where `dense` has them already."""

    def seconds(self, kind: Kind, rows: float, context: float) -> float:
        """Return the seconds of a call with decoding rows that see `context` positions each."""
        if kind == "attention":
            return self.decode(rows, context)
        return self._lines[kind](rows) + self.elementwise(kind, rows)

    def prompt_seconds(self, kind: Kind, tokens: float) -> float:
        """Return the seconds of a call for each token of a prompt, beside one decoding row."""
        if kind == "attention":
            return self.prompt(tokens) / tokens
        line, end = self._lines[kind], min(max(tokens, LEAST_ROWS), MOST_ROWS)
        rest = self.elementwise(kind, end) - self.elementwise(kind, 1)
        return (line(end) - line(1) + rest) / (end - 1)

    def elementwise(self, kind: Kind, rows: float) -> float:
        """Return the estimated seconds of what stands around a product: bytes moved, and a launch for each kernel."""
        if kind not in ("qkv", "mlp") or not self.between:
            return 0.0
        d = self.shape.decoder
        numbers = 4 * d.hidden + (3 * d.inner * self.shape.chosen if kind == "mlp" else 2 * (d.attended + d.cached))
        moved = numbers * WIDTH * rows / self.shape.devices
        return self.between * (KERNELS * LAUNCH_S + moved / (self.machine.bandwidth * REACHED))

    def compute_share(self, kind: Kind, rows: float, context: float) -> float:
        """Return the share of the machine's products that a call keeps busy."""
        seconds = self.seconds(kind, rows, context)
        return min(1.0, self.shape.operations(kind, rows, context) / (self.machine.fp16 * seconds)) if seconds else 0.0

    @property
    def told(self) -> str:
        """Return the basis in words."""
        if not self.between or self.basis == "estimated":
            return self.basis
        return f"{self.basis}, norms and activations estimated"

    @property
    def whole(self) -> Basis:
        """Return the weakest basis of a step."""
        return weakest((self.basis, "estimated")) if self.between else self.basis

    @cached_property
    def _lines(self) -> dict[Kind, Line]:
        return dict(self.dense)


LEAST_ROWS, MOST_ROWS = 512.0, 4096.0
"""Rows up to which the slope of a product is taken as what a prompt token takes: the prompt's own, within these."""
KERNELS = 2
LAUNCH_S, REACHED = 3e-6, 0.8
"""Seconds of a kernel without work, and the share of a data sheet's bandwidth that is reached: the constants that
aiconfigurator-core 0.12.0 (systems/h100_sxm.yaml) gives for operators without a table."""
