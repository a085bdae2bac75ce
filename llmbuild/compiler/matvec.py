"""Matrix-vector products on GPUs that the compiler gives a work-group per row: several rows share one instead.

A choice `lanes x subgroups` is the number of lanes of a subgroup per row, each with up to eight adjacent elements at a
time, and the number of subgroups of a work-group. Fewer lanes per row means longer reads per lane and fewer reduction
steps. It is attached to each product that it divides evenly; the others keep the compiler's own configuration.
"""

from __future__ import annotations

import re

from llmbuild.compiler import dispatches
from llmbuild.compiler.dispatches import Product

ELEMENTS = (8, 4, 2, 1)
"""Adjacent elements that a lane reads at a time: sixteen bytes of f16 are the longest read."""

_SUBGROUP = re.compile(r"subgroup_size_choices = \[(\d+)")


def configure(text: str, choice: str) -> str:
    """Return a front half whose matrix-vector products are divided as `choice` says, such as `8x4`.

    Raises:
        ValueError: no GPU is described in the text.
    """
    found = _SUBGROUP.search(text)
    if not found:
        raise ValueError("no executable target with subgroups to share a matrix-vector product out to")
    lanes, groups = map(int, choice.split("x"))
    told = {p.line: _configuration(p, lanes, groups, int(found[1])) for p in dispatches.products(text)}
    return dispatches.annotated(text, {line: each for line, each in told.items() if each})


def _configuration(product: Product, lanes: int, groups: int, subgroup: int) -> str:
    """Return the configuration of a product; empty where its rows or columns cannot be divided evenly."""
    if len(product.bounds) != 2:
        return ""
    rows, columns = product.bounds
    side_by_side = subgroup // lanes
    each = next((n for n in ELEMENTS if columns % (lanes * n) == 0), 0)
    if not each or rows % (side_by_side * groups):
        return ""
    return (
        "lowering_config = #iree_gpu.lowering_config<{"
        f"workgroup = [{side_by_side * groups}, 0], partial_reduction = [0, {lanes * each}], thread = [0, {each}], "
        f"lane_basis = [[{side_by_side}, {lanes}], [0, 1]], subgroup_basis = [[{groups}, 1], [0, 1]]}}>, "
        "translation_info = #iree_codegen.translation_info<pipeline = #iree_gpu.pipeline<VectorDistribute> "
        f"workgroup_size = [{subgroup * groups}, 1, 1] subgroup_size = {subgroup}>"
    )
