"""Subgroup sizes in SPIR-V: a reduction over a subgroup is correct for one size, which must be declared.

The compiler generates code for the first size that it knows of the chip, but does not record the size in the artifact.
Drivers then use their own: llvmpipe 8 lanes, others perhaps 64 for code of 32. Each such sum is wrong, without an
error. With the size in the dispatch's configuration the runtime requests subgroups of that size from the driver, or
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
    """Return configured dispatches with the subgroup size declared on each that depends on it."""
    told = size(configured)
    return _UNSAID.sub(rf"\1 subgroup_size = {told}", configured) if told else configured
