"""Seconds by operator from a catalog's rows: those of a decode step as llmbuild measured them, at one batch.

A row names dispatches by what the compiler made of them. Products tell their kind by their sizes. Our own kernels run
all layers as one dispatch: such a row knows the head and the layers, and cannot say what lies between these.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from llmbuild.fleet.operators.profile import Kind
from llmbuild.spec.decoder import Decoder
from llmbuild.spec.measurement import Operator

_PRODUCT = re.compile(r"(?:batch_)?matmul(?:_like)?_(\d+(?:x\d+)*)_")
_OWN_LAYERS, _OWN_HEAD = "llmbuild_layers", "llmbuild_head"


@dataclass(frozen=True)
class ByKind:
    """Seconds of a decode step by kind of operator, of all layers, on the one thread that it was measured on."""

    seconds: tuple[tuple[Kind, float], ...]
    rest_s: float
    """Of what has no kind: norms, sums, copies; and of all layers, where the kernels are our own."""

    @property
    def total_s(self) -> float:
        """Return the seconds of the step's dispatches."""
        return sum(each for _, each in self.seconds) + self.rest_s

    @property
    def apart(self) -> bool:
        """Return whether operators can be told apart: a plan by operators needs it."""
        return {"qkv", "attention", "out", "mlp"} <= {kind for kind, _ in self.seconds}


def by_kind(operators: Iterable[Operator], of: Decoder) -> ByKind:
    """Return a row's operators by kind.

    Where a model's `out` has the sizes of its query product, both count half each.
    """
    found: dict[Kind, float] = {}
    rest = 0.0
    for operator in operators:
        kinds = _kinds(operator.name, of)
        for kind in kinds:
            found[kind] = found.get(kind, 0.0) + operator.seconds / len(kinds)
        rest += 0.0 if kinds else operator.seconds
    return ByKind(tuple(sorted(found.items())), rest)


def _kinds(name: str, of: Decoder) -> tuple[Kind, ...]:
    """Return the kinds that a dispatch may be of."""
    if name.startswith(_OWN_HEAD):
        return ("head",)
    if name.startswith(_OWN_LAYERS):
        return ()
    if "softmax" in name or "attention" in name:
        return ("attention",)
    sizes = _PRODUCT.match(name)
    if not sizes:
        return ()
    *outer, n, k = (int(size) for size in sizes.group(1).split("x"))
    if max(outer, default=1) > 1 and outer[0] in (of.heads, of.kv_heads):
        return ("attention",)  # a product for each head
    pair = (n, k)
    if of.vocabulary in pair:
        return ("head",)
    if of.inner in pair or 2 * of.inner in pair:
        return ("mlp",)
    query, output = pair == (of.attended, of.hidden), pair == (of.hidden, of.attended)
    if query and output:
        return ("qkv", "out")
    if output:
        return ("out",)
    widths = (of.attended, of.cached, 2 * of.cached, of.attended + 2 * of.cached)
    return ("qkv",) if k == of.hidden and n in widths else ()
