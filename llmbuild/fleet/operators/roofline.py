"""Operators' profiles where no table has them: the larger of bytes and products over what a data sheet promises."""

from __future__ import annotations

from llmbuild.fleet.operators.profile import (
    DENSE,
    LAUNCH_S,
    REACHED,
    WIDTH,
    Kind,
    OperatorProfile,
    Shape,
    Surface,
)
from llmbuild.spec.figures import Machine
from llmbuild.spec.fleet import Line

ROWS = (1.0, 8.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0)
CONTEXT = (256.0, 1024.0, 8192.0)
TOKENS = (128.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0)
PRODUCTS = 0.7
"""Share of a data sheet's products that is reached: 0.57 to 0.93 at 2048 rows in the published tables."""


def roofline(of: Shape, machine: Machine) -> OperatorProfile:
    """Return the estimated profile of a model's operators on a machine."""

    def call(kind: Kind, rows: float, context: float, read: float) -> float:
        products = of.operations(kind, rows, context) / (machine.fp16 * PRODUCTS)
        return LAUNCH_S + max(read / (machine.bandwidth * REACHED), products)

    def dense(kind: Kind) -> Line:
        calls = 2 if kind == "head" else of.layers  # a head's embedding is looked up, not read
        read = of.weights(kind) / calls
        return Line(ROWS, tuple(call(kind, rows, 0, read * _touched(of, kind, rows)) for rows in ROWS))

    cached = of.kv_bytes / of.layers
    seen = tuple(Line(CONTEXT, tuple(call("attention", r, c, r * c * cached) for c in CONTEXT)) for r in ROWS)
    own = tuple(call("attention", n, n / 2, n * (cached + of.decoder.attended * WIDTH)) for n in TOKENS)
    return OperatorProfile(
        shape=of,
        machine=machine,
        dense=tuple((kind, dense(kind)) for kind in DENSE),
        decode=Surface(ROWS, seen),
        prompt=Line(TOKENS, own),
        basis="estimated",
        source=f"roofline by {machine.source}: {REACHED:.0%} of the bandwidth, {PRODUCTS:.0%} of the products",
    )


def _touched(of: Shape, kind: Kind, rows: float) -> float:
    """Return the share of a kind's weights that rows read: of experts, those that any row chose."""
    missed: float = (1 - of.chosen / of.experts) ** rows if kind == "mlp" and of.experts > 1 else 0.0
    return 1 - missed
