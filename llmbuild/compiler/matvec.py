"""Matrix-vector products on GPUs that the compiler gives a work-group for each row: how many rows share one instead.

A choice `lanes x subgroups` says how many lanes of a subgroup share a row, each with up to eight neighbouring elements
at a time, and how many subgroups a work-group has. Fewer lanes for a row means longer reads by each and fewer steps to
add up what they found. It is written onto each product that it divides evenly; the others keep the compiler's own.
"""

from __future__ import annotations

import re

from llmbuild.compiler import dispatches
from llmbuild.compiler.dispatches import Product

ELEMENTS = (8, 4, 2, 1)
"""Neighbouring elements that a lane may take at a time: sixteen bytes of f16 are the longest read there is."""

_SUBGROUP = re.compile(r"subgroup_size_choices = \[(\d+)")


def configure(text: str, choice: str) -> str:
    """Return a front half whose matrix-vector products are shared out as `choice` says, like `8x4`.

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
    """Return what to write onto a product; empty where its rows or columns cannot be shared out evenly."""
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
