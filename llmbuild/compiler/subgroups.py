"""Sizes of subgroups in SPIR-V: code that adds up over a subgroup is right for one size, and has to say so.

The compiler generates it for the first size that it knows of the chip, but leaves out of the artifact which one that
was. Drivers then take their own: llvmpipe 8 lanes, others perhaps 64 for code of 32. Each such sum is wrong, and
nothing tells. With the size in the dispatch's configuration the runtime has the driver make subgroups of that size, or
refuses the artifact.
"""

from __future__ import annotations

import re

_SIZES = re.compile(r"subgroup_size_choices = \[(\d+)")
_UNSAID = re.compile(r"(#iree_gpu\.spirv_pipeline<SubgroupReduce> workgroup_size = \[[\d, ]+\])(?! subgroup_size)")


def size(text: str) -> int:
    """Return the size that code is generated for; 0 where the text describes no subgroups."""
    found = _SIZES.search(text)
    return int(found[1]) if found else 0


def said(configured: str) -> str:
    """Return configured dispatches of which each that depends on the size of its subgroups says it."""
    told = size(configured)
    return _UNSAID.sub(rf"\1 subgroup_size = {told}", configured) if told else configured
