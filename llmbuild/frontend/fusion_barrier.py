"""A fusion barrier between the producer of a tensor and its readers: a torch operator that the compiler does not
fuse across.

Without one, the product with the scales of an int8 head is fused with the choice of the largest logit, which GPU
backends do as one work-group: the product is then unrolled over the whole vocabulary. With 49152 tokens LLVM aborts
for cuda ("SmallVector unable to grow") and does not end for rocm. With one, the scales go with the matrix product.

The mask of a model with one layer needs one too: with a single reader it is computed inside the softmax, and SPIR-V has
no memory to share the positions in that it compares. The mask of several layers is a dispatch of its own anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from iree.compiler import ir

from llmbuild.frontend.splice import operators

_NAME = "torch.llmbuild_barrier.fusion"


@torch.library.custom_op("llmbuild_barrier::fusion", mutates_args=())
def fusion_barrier(x: torch.Tensor) -> torch.Tensor:
    """Return x f32, as it is."""
    return x.clone()


@fusion_barrier.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def lower(module: ir.Module) -> None:
    """Replace every `fusion_barrier` in a module by the compiler's barrier of fusion."""
    with module.context, ir.Location.unknown():
        for operator in operators(module.operation, _NAME):
            _replace(operator)


def _replace(operator: Any) -> None:
    wanted = operator.results[0].type
    sizes = str(wanted).partition("[")[2].partition("]")[0].split(",")
    unknown = ir.ShapedType.get_dynamic_size()
    plain = ir.RankedTensorType.get([unknown if s == "?" else int(s) for s in sizes], ir.F32Type.get())
    with ir.InsertionPoint(operator):
        value = _made("torch_c.to_builtin_tensor", plain, operator.operands[0])
        known = [_size(value, axis) for axis, size in enumerate(sizes) if size == "?"]
        value = _made("iree_tensor_ext.compute_barrier.start", plain, value, *known)
        operator.results[0].replace_all_uses_with(_made("torch_c.from_builtin_tensor", wanted, value))
    operator.erase()


def _size(value: Any, axis: int) -> Any:
    index = ir.IndexType.get()
    constant = ir.Operation.create(
        "arith.constant", results=[index], attributes={"value": ir.IntegerAttr.get(index, axis)}
    )
    return _made("tensor.dim", index, value, constant.result)


def _made(name: str, kind: Any, *operands: Any) -> Any:
    """Return the result of a new operation."""
    return ir.Operation.create(name, results=[kind], operands=list(operands)).result
