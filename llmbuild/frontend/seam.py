"""A seam between what computes a tensor and what reads it: a torch operator that the compiler does not fuse across.

Without one, the product with the scales of an int8 head is fused with the choice of the largest logit, which GPU
backends do as one work-group: the product is then unrolled over the whole vocabulary. With 49152 tokens LLVM aborts
for cuda ("SmallVector unable to grow") and does not end for rocm. With one, the scales go with the matrix product.
"""

from __future__ import annotations

from typing import Any

import torch
from iree.compiler import ir

from llmbuild.frontend.splice import operators

_NAME = "torch.llmbuild_seam.apart"


@torch.library.custom_op("llmbuild_seam::apart", mutates_args=())
def apart(x: torch.Tensor) -> torch.Tensor:
    """Return x f32 of a fixed shape, as it is."""
    return x.clone()


@apart.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def lower(module: ir.Module) -> None:
    """Replace every `apart` in a module by the compiler's barrier of fusion."""
    with module.context, ir.Location.unknown():
        for operator in operators(module.operation, _NAME):
            _replace(operator)


def _replace(operator: Any) -> None:
    wanted = operator.results[0].type
    sizes = [int(size) for size in str(wanted).partition("[")[2].partition("]")[0].split(",")]
    plain = ir.RankedTensorType.get(sizes, ir.F32Type.get())
    with ir.InsertionPoint(operator):
        value = operator.operands[0]
        for name, kind in (
            ("torch_c.to_builtin_tensor", plain),
            ("iree_tensor_ext.compute_barrier.start", plain),
            ("torch_c.from_builtin_tensor", wanted),
        ):
            value = ir.Operation.create(name, results=[kind], operands=[value]).result
        operator.results[0].replace_all_uses_with(value)
    operator.erase()
