"""Two 4-bit codes in one byte, as a torch operator that an import turns into the compiler's own `i4`.

The compiler folds a bit cast and a sign extension into whatever reads them; shifts and masks written in torch take it
three times as long.
"""

from __future__ import annotations

from typing import Any

import torch
from iree.compiler import ir

from llmbuild.frontend.splice import operators
from llmbuild.transform.quantized import unpack_nibbles

_NAME = "torch.llmbuild_nibbles.unpack"


@torch.library.custom_op("llmbuild_nibbles::unpack", mutates_args=())
def unpack(data: torch.Tensor) -> torch.Tensor:
    """Return the codes int8[..., n] of bytes int8[..., n/2]: the low half first."""
    return torch.from_numpy(unpack_nibbles(data.numpy()))


@unpack.register_fake
def _(data: torch.Tensor) -> torch.Tensor:
    return data.new_empty((*data.shape[:-1], 2 * data.shape[-1]))


def picked(data: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Return codes int32 at places i64 of the codes in bytes int8[n]: for reads here and there, not of all.

    Places are halved by a shift: the compiler divides integers in f32, which is wrong beyond 2^24 of them.
    """
    byte = data[place >> 1].to(torch.int32)
    return torch.where(place & 1 == 0, low(byte), high(byte))


def low(byte: torch.Tensor) -> torch.Tensor:
    """Return the first codes int32 of bytes int32."""
    return (byte << 28) >> 28


def high(byte: torch.Tensor) -> torch.Tensor:
    """Return the second codes int32 of bytes int32."""
    return byte >> 4


def lower(module: ir.Module) -> None:
    """Replace every `unpack` in a module by a bit cast to `i4` and a sign extension."""
    with module.context, ir.Location.unknown():
        for operation in operators(module.operation, _NAME):
            _replace(operation)


def _replace(operation: Any) -> None:
    wanted = operation.results[0].type
    sizes = [int(size) for size in str(wanted).partition("[")[2].partition("]")[0].split(",")]
    with ir.InsertionPoint(operation):
        bytes_, codes = [*sizes[:-1], sizes[-1] // 2], sizes
        segments = {"operandSegmentSizes": ir.DenseI32ArrayAttr.get([1, 0, 0])}  # the source, and no dynamic sizes
        value = _operation("torch_c.to_builtin_tensor", _tensor(bytes_, 8), operation.operands[0])
        value = _operation("flow.tensor.bitcast", _tensor(codes, 4), value, segments)
        value = _operation("arith.extsi", _tensor(codes, 8), value)
        value = _operation("torch_c.from_builtin_tensor", wanted, value)
        operation.results[0].replace_all_uses_with(value)
    operation.erase()


def _tensor(sizes: list[int], bits: int) -> Any:
    return ir.RankedTensorType.get(sizes, ir.IntegerType.get_signless(bits))


def _operation(name: str, kind: Any, operand: Any, attributes: dict[str, Any] | None = None) -> Any:
    return ir.Operation.create(name, results=[kind], operands=[operand], attributes=attributes).result
